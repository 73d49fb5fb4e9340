"""Views on their way from a prep child to the engine's orders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from rkvlmd.actors import prepare, ready
from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.embeddings import Rows
from rkvlmd.actors.prepare import Picture, Prompt, View
from rkvlmd.messages import Sampling
from rkvlmd.models.catalog import Entry
from rkvlmd.models.manifest import Assembly, Decoder, Encoder, File, Manifest, Resize, Tags
from rkvlmd.wire import child as wire
from tests.fakes.children import memfd

NOTHING = File(file="nothing", sha256="0" * 64)
TENSOR = wire.Tensor(shape=(8,), dtype="uint8")


def encoder(tokens: int, **more: Any) -> Encoder:
    return Encoder(
        engine="onnx", file="v.onnx", sha256="0" * 64, width=16, height=16, tokens=tokens,
        embedding=8, **more,
    )  # fmt: skip


def entry(*encoders: Encoder) -> Entry:
    manifest = Manifest(
        schema=1, name="m", family="smolvlm", encoders=encoders, image=Tags(content="<i>"),
        decoder=Decoder(engine="onnx", files={"embed": NOTHING, "decoder": NOTHING}, context=512,
                        embedding=8),
    )  # fmt: skip
    return Entry("m", Path("/m"), manifest, "digest", 0, 0)


def done(*views: wire.View, layout: list[str | int] | None = None) -> wire.PictureDone:
    places: list[str | int] = [*range(len(views))] if layout is None else layout
    return wire.PictureDone(
        id=1, sha256="a", width=4, height=4, format="png", views=list(views), layout=places
    )


def view(number: int = 0, tokens: int = 4, **more: Any) -> wire.View:
    return wire.View(encoder=number, tensor=TENSOR, tokens=tokens, **more)


MODEL = entry(encoder(4), encoder(2, tile=True))


@pytest.mark.parametrize(
    ("answer", "descriptors", "good"),
    [
        (done(view()), 1, True),
        (done(view(1, 2), view(1, 1), view()), 3, True),
        (done(view(), layout=["<", 0, ">"]), 1, True),
        (done(view()), 0, False),
        (done(view()), 2, False),
        (done(), 0, False),
        (done(view(2)), 1, False),  # no such encoder
        (done(view(0, 5)), 1, False),  # more rows than it gives
        (done(view(0, 0)), 1, False),
        (done(view(), layout=["no place"]), 1, False),
        (done(view(), layout=[0, 0]), 1, False),
        (done(view(), layout=[1]), 1, False),
    ],
)
def test_what_a_prep_child_may_answer(
    answer: wire.PictureDone, descriptors: int, good: bool
) -> None:
    assert prepare._expected(answer, descriptors, MODEL) is good


def keys(model: Entry, answer: wire.PictureDone, *, exact: bool = False) -> list[str]:
    blobs = [Blob(memfd(8)) for _ in answer.views]
    made = list(prepare._views(answer, blobs, model, "auto", exact=exact))
    for one in made:
        assert one.pixels is not None
        one.pixels.blob.close()
    return [one.key for one in made]


def test_the_key_of_a_views_rows() -> None:
    two = done(view(), view())
    first = keys(MODEL, two)
    assert len(set(first)) == 2
    assert keys(MODEL, two) == first
    # Whatever makes other pixels or other rows makes another key.
    others = [
        keys(MODEL, two, exact=True),
        keys(MODEL, done(view(), view(), view())),
        keys(MODEL, msgspec.structs.replace(two, sha256="b")),
        keys(entry(encoder(4, resize=Resize(rule="tiles", max_tiles=2)), encoder(2)), two),
        keys(MODEL, done(view(1, 2), view(1, 2))),
    ]
    assert not {key for other in others for key in other} & set(first)


def test_spans_name_their_view_and_its_grid() -> None:
    rows = Rows(Blob(memfd(8)), TENSOR)
    made = Picture(
        (View(rows, "one", 0, 4, (1, 4, 4), (1, 2, 2)), View(rows, "two", 1, 2)), ("<", 0, 1), "a"
    )
    request = SimpleNamespace(sampling=Sampling(), stop=())
    job: Any = SimpleNamespace(request=request, adapter="", thinking=None)
    found = prepare.order(job, MODEL, Prompt([1] * 9, [(1, 4, 0, 0), (5, 2, 0, 1)]), [made], 7)
    assert [(s.start, s.count, s.key, s.grid) for s in found.spans] == [
        (1, 4, "one", (1, 2, 2)), (5, 2, "two", None),
    ]  # fmt: skip
    assert made.tokens == 6
    made.close()
    assert Blob.live == 0


def assembled() -> Entry:
    """Return a model whose encoders see 2 x 2 and 1 x 1 squares, with the ends of lines."""
    whole, tile = encoder(7), encoder(3, tile=True)
    tile = msgspec.structs.replace(tile, width=8, height=8)
    made = entry(whole, tile)
    manifest = msgspec.structs.replace(made.manifest, assembly=Assembly(square=8))
    return replace(made, manifest=manifest)


def of(tiles: tuple[int, int] | None, *views: wire.View, places: int = 1) -> wire.PictureDone:
    answer = done(*views, layout=["<", *range(places), ">"])
    return msgspec.structs.replace(answer, tiles=tiles)


PAGE, TILE = view(0, 7), view(1, 3)


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (of((0, 0), PAGE), True),
        (of((1, 2), TILE, TILE, PAGE), True),
        (of((1, 2), TILE, PAGE), False),  # as many views as the grid has, and one
        (of((0, 2), TILE, TILE, PAGE), False),
        (of(None, PAGE), False),
        (of((1, 1), TILE, PAGE, places=2), False),  # all of them are one place
    ],
)
def test_what_a_prep_child_may_answer_for_a_block(answer: wire.PictureDone, good: bool) -> None:
    assert prepare._expected(answer, len(answer.views), assembled()) is good


def test_a_block_is_one_span_of_several_views() -> None:
    rows = Rows(Blob(memfd(8)), TENSOR)
    parts = tuple(View(rows, key, 1, 3) for key in ("a", "b"))
    page = View(rows, "page", 0, 7)
    picture = Picture((*parts, page), ("", 0, ""), "x", tiles=(1, 2), block=10)
    lone = Picture((page,), ("", 0, ""), "x", tiles=(0, 0), block=7)
    assert (picture.places, picture.tokens) == ((10,), 10)
    prompt = Prompt([1] * 20, [(1, 10, 0, 0), (12, 7, 1, 0)])
    assert [v.key for v in ready.needed(prompt, [picture, lone])] == ["a", "b", "page", "page"]
    first, second = ready.spans(prompt, [picture, lone])
    assert (first.start, first.count, first.tiles) == (1, 10, (1, 2))
    assert (second.key, second.tiles) == ("page", (0, 0))
    # Whatever stands at the place has a name of its own.
    other = replace(picture, views=(parts[0], parts[0], page))
    keys = {first.key, second.key, ready.spans(prompt, [other, lone])[0].key}
    assert len(keys) == 3
    rows.blob.close()
    assert Blob.live == 0
