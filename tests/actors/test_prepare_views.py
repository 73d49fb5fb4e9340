"""Views on their way from a prep child to the engine's orders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from rkvlmd.actors import prepare
from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.embeddings import Rows
from rkvlmd.actors.prepare import Picture, Prompt, View
from rkvlmd.messages import Sampling
from rkvlmd.models.catalog import Entry
from rkvlmd.models.manifest import Decoder, Encoder, File, Manifest, Resize, Tags
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
    job: Any = SimpleNamespace(request=request, adapter="")
    found = prepare.order(job, MODEL, Prompt([1] * 9, [(1, 4, 0, 0), (5, 2, 0, 1)]), [made], 7)
    assert [(s.start, s.count, s.key, s.grid) for s in found.spans] == [
        (1, 4, "one", (1, 2, 2)), (5, 2, "two", None),
    ]  # fmt: skip
    assert made.tokens == 6
    made.close()
    assert Blob.live == 0
