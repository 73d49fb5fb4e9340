"""What a decoder file takes beside embeddings and caches, and how that is filled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rkvlmd.engine import onnx_common as common
from rkvlmd.engine.backend import Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.models import positions
from rkvlmd.wire import child

#: Features of pictures that are added after a layer: one tensor a layer, or all in one.
DEEPSTACK = re.compile(r"deepstack(?:_visual)?_(?:features|embeds)(?:[._](\d+))?")
#: One value a token that the file of the embeddings gives too (Gemma 3n, Gemma 4).
PER_LAYER = "per_layer_inputs"
#: 1 at a picture's places, where they see each other (Gemma 3).
TYPES = "token_type_ids"
POSITIONS = "position_ids"
#: Rows of ``position_ids``: time, row and column, or the place before them.
MROPE_ROWS = (3, 4)


def known(name: str) -> bool:
    """Return whether an input of this name is filled here."""
    return name in {PER_LAYER, TYPES, POSITIONS} or DEEPSTACK.fullmatch(name) is not None


@dataclass(frozen=True)
class Inputs:
    """The inputs of one decoder file.

    ``rows``: of ``position_ids``, 0 where it has two dimensions or is none.
    ``stacked``: all layers of ``deepstack`` are one input of shape (layers,
    batch, places, embedding). ``beside``: takes ``per_layer_inputs``; ``types``:
    takes ``token_type_ids``, so that a picture must not be cut in two.
    """

    rows: int
    deepstack: tuple[str, ...]
    layers: int
    stacked: bool
    kind: np.dtype[np.generic]
    beside: bool
    types: bool

    def feeds(
        self, prompt: Prompt, start: int, end: int, beside: Mapping[str, npt.NDArray[Any]]
    ) -> dict[str, npt.NDArray[Any]]:
        """Return what places ``start`` to ``end`` need; ``beside`` from the embeddings' file."""
        feeds = dict(beside) if self.beside else {}
        if self.rows:
            axes = prompt.positions.rows(start, end)
            text = [list(range(start, end))] if self.rows > len(axes) else []
            feeds[POSITIONS] = np.array([*text, *axes], np.int64)[:, None]
        if self.types:
            feeds[TYPES] = prompt.types(start, end)
        if self.deepstack:
            features = prompt.features(self.layers, start, end).astype(self.kind, copy=False)
            if self.stacked:
                feeds[self.deepstack[0]] = features
            else:
                feeds |= zip(self.deepstack, features, strict=True)
        return feeds


def read(
    session: ort.InferenceSession, embed: ort.InferenceSession, manifest: manifests.Manifest
) -> Inputs:
    """Read a decoder's inputs, and compare them with the manifest.

    Raises:
      RkvlmdError: ``invalid_model``.

    """
    key = "decoder.files.decoder"
    inputs = {arg.name: arg for arg in session.get_inputs()}
    shape = inputs[POSITIONS].shape if POSITIONS in inputs else [None, None]
    rows = _rows(shape, manifest.decoder.rope)
    found = sorted(
        (m for name in inputs if (m := DEEPSTACK.fullmatch(name))), key=lambda m: int(m[1] or 0)
    )
    stacked = bool(found) and len(inputs[found[0][0]].shape) == 4
    layers = len(manifest.decoder.deepstack)
    if found and stacked:
        common.agree("decoder.deepstack", "the number of layers",
                     inputs[found[0][0]].shape[0], layers)  # fmt: skip
    elif len(found) != layers:
        common.agree("decoder.deepstack", "the number of layers", len(found), layers)
    outputs = {out.name for out in embed.get_outputs()}
    if PER_LAYER in inputs and PER_LAYER not in outputs:
        raise RkvlmdError(
            "invalid_model", f"{key}: takes {PER_LAYER}, which decoder.files.embed does not give."
        )
    return Inputs(
        rows=rows,
        deepstack=tuple(m[0] for m in found),
        layers=layers,
        stacked=stacked,
        kind=np.dtype(common.dtype_of(inputs[found[0][0]], key) if found else np.float32),
        beside=PER_LAYER in inputs,
        types=TYPES in inputs,
    )


def _rows(shape: Sequence[Any], rope: str) -> int:
    if (rope == "mrope") != (len(shape) == 3):
        says = "two dimensions" if len(shape) == 2 else f"{len(shape)} dimensions"
        raise RkvlmdError(
            "invalid_model", f"decoder.rope: is {rope}, but position_ids of the file has {says}."
        )
    if len(shape) == 2:
        return 0
    rows = shape[0] if isinstance(shape[0], int) else MROPE_ROWS[0]
    if rows not in MROPE_ROWS:
        raise RkvlmdError(
            "invalid_model", f"decoder.files.decoder: position_ids has {rows} rows, not 3 or 4."
        )
    return rows


class Prompt:
    """One order's tokens with the rows of its pictures, by place.

    A row holds one embedding for each output of the encoder: the first stands
    at the picture's place, the others are its deepstack features.

    Raises:
      RkvlmdError: ``engine_error`` when pictures, places and grids do not fit.

    """

    def __init__(
        self,
        order: child.Generate | child.Embed,
        rows: Sequence[Rows],
        embedding: int,
        inputs: Inputs,
    ) -> None:
        if len(rows) != len(order.spans):
            raise RkvlmdError("engine_error", "Pictures and their places differ in number.")
        self._spans = list(zip(order.spans, rows, strict=True))
        self._embedding = embedding
        width = embedding * (1 + inputs.layers)
        for span, values in self._spans:
            if values.shape != (span.count, width) or span.start + span.count > len(order.tokens):
                raise RkvlmdError("engine_error", "A picture does not fit its place.")
        self.positions = self._positions(order) if inputs.rows else positions.mrope(0, ())

    @staticmethod
    def _positions(order: child.Generate | child.Embed) -> positions.Positions:
        try:
            return positions.mrope(
                len(order.tokens),
                [positions.Seen(s.start, s.count, s.grid, s.video, s.time) for s in order.spans],
            )
        except ValueError as exc:
            raise RkvlmdError("engine_error", "A picture does not fit its place.") from exc

    def embed(self, embeds: npt.NDArray[Any], start: int) -> None:
        """Put rows into ``embeds`` of shape (1, places, embedding), the places from ``start``."""
        for at, values in self._within(start, start + embeds.shape[1]):
            embeds[0, at : at + len(values)] = values[:, : self._embedding]

    def features(self, layers: int, start: int, end: int) -> npt.NDArray[np.float32]:
        """Return the deepstack features, (layers, 1, places, embedding), 0 where text is."""
        found = np.zeros((layers, 1, end - start, self._embedding), np.float32)
        for at, values in self._within(start, end):
            parts = values.reshape(len(values), 1 + layers, self._embedding)
            found[:, 0, at : at + len(values)] = parts[:, 1:].transpose(1, 0, 2)
        return found

    def types(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return 1 at pictures' places and 0 elsewhere, of shape (1, places)."""
        found = np.zeros((1, end - start), np.int64)
        for at, values in self._within(start, end):
            found[0, at : at + len(values)] = 1
        return found

    def whole(self, place: int) -> tuple[int, int] | None:
        """Return the first place of the picture that ``place`` cuts in two, and of what follows."""
        for span, _ in self._spans:
            if span.start < place < span.start + span.count:
                return span.start, span.start + span.count
        return None

    def _within(self, start: int, end: int) -> list[tuple[int, Rows]]:
        """Return pictures' rows among the places, each with its place counted from ``start``."""
        found = []
        for span, values in self._spans:
            first, last = max(span.start, start), min(span.start + span.count, end)
            if first < last:
                found.append((first - start, values[first - span.start : last - span.start]))
        return found
