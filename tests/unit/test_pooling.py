"""Blocks of hidden states to one vector."""

from __future__ import annotations

import base64
import struct
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import pooling, vectors
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import Embeddings
from rkvlmd.wire import child

FIRST = np.array([[1.0, 2.0, 2.0], [3.0, 4.0, 0.0]], np.float32)
SECOND = np.array([[0.0, 0.0, 5.0]], np.float32)


def how(**more: Any) -> Embeddings:
    return Embeddings(**{"normalise": False, **more})


@pytest.mark.parametrize(
    ("pool", "wanted"),
    [("last", [0, 0, 5]), ("first", [1, 2, 2]), ("mean", [4 / 3, 2, 7 / 3])],
)
def test_the_pool_goes_over_all_blocks(pool: str, wanted: list[float]) -> None:
    found = pooling.vector([FIRST, SECOND], how(pool=pool))
    assert found.dtype == np.float32
    assert np.allclose(found, wanted)


def test_a_vector_has_length_one_where_the_model_says_so() -> None:
    found = pooling.vector([FIRST], how(pool="first", normalise=True))
    assert np.allclose(found, [1 / 3, 2 / 3, 2 / 3])


def test_the_beginning_of_a_vector_has_length_one_too() -> None:
    found = pooling.vector([FIRST], how(normalise=True), size=2)
    assert np.allclose(found, [0.6, 0.8])


def test_zeros_stay_zeros() -> None:
    found = pooling.vector([np.zeros((2, 3), np.float32)], how(normalise=True))
    assert found.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_an_error(bad: float) -> None:
    with pytest.raises(RkvlmdError, match="not a number") as error:
        pooling.vector([np.array([[1.0, bad]], np.float32)], how())
    assert error.value.code == "engine_error"


def test_no_states_are_an_error() -> None:
    with pytest.raises(RkvlmdError, match="nothing"):
        pooling.vector([np.zeros((0, 3), np.float32)], how())


def test_the_text_form_is_base64_of_little_endian_floats() -> None:
    assert base64.b64decode(pooling.text(FIRST[0])) == struct.pack("<3f", 1.0, 2.0, 2.0)


class _Backend:
    def embed(self, order: child.Embed, rows: Any) -> Any:
        return FIRST


def _floats(done: child.EmbedDone) -> list[float]:
    return list(struct.unpack(f"<{done.size}f", base64.b64decode(done.vector)))


def test_rows_of_pictures_need_no_hidden_states() -> None:
    order = child.Embed(id=3, tokens=[], spans=[child.Span(start=0, count=2, key="k")])
    done = vectors.embed(object(), order, [FIRST], how(pool="mean", pictures="rows"))
    assert (_floats(done), done.tokens, done.id) == ([2.0, 3.0, 1.0], 2, 3)
    # A text of the same model still does.
    with pytest.raises(RkvlmdError, match="no hidden states"):
        vectors.embed(object(), child.Embed(id=4, tokens=[1]), [], how(pictures="rows"))


def test_hidden_states_are_asked_for_with_pictures_too() -> None:
    order = child.Embed(id=3, tokens=[7, 7, 7], spans=[child.Span(start=0, count=2, key="k")])
    done = vectors.embed(_Backend(), order, [SECOND], how())
    assert (_floats(done), done.tokens) == ([3.0, 4.0, 0.0], 3)


def test_a_model_without_the_section_makes_none() -> None:
    assert vectors.described({"decoder": {}}) is None
    with pytest.raises(RkvlmdError, match="makes no embeddings"):
        vectors.embed(_Backend(), child.Embed(id=1, tokens=[1]), [], None)
