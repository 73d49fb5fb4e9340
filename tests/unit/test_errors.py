"""The table of errors, and the messages of the children."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from rkvlmd import messages
from rkvlmd.errors import CODES, ManifestError, RkvlmdError, SettingsError
from rkvlmd.wire import child

#: What a client of the OpenAI API knows (its libraries map the status, people read the type).
TYPES = {
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error",
    "rate_limit_error", "server_error", "service_unavailable_error",
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_code(code: str) -> None:
    error = RkvlmdError(code, "A sentence.", param="messages", retry_after=3)
    assert (error.status, error.type) == CODES[code]
    assert 400 <= error.status < 600
    assert error.type in TYPES
    assert str(error) == "A sentence."
    assert code in repr(error)
    assert (error.status >= 500) == (error.type in {"server_error", "service_unavailable_error"})


def test_errors_that_hold_lists() -> None:
    assert "a; b" in str(SettingsError(["a", "b"]))
    assert str(ManifestError("m", ["a", "b"])) == "model 'm': a; b"


def test_every_end_is_good_or_has_a_code() -> None:
    ends = set(get_args(messages.EndReason))
    assert ends > messages.GOOD_ENDS
    assert {"deadline", "client_gone", "cancelled", "shutdown", "error"} < ends


SAMPLES: list[child.ToChild | child.FromChild] = [
    child.Load(folder="/m", manifest={"a": 1}, options={"threads": 2}),
    child.Picture(
        id=1,
        encoding="raw",
        manifest={},
        max_bytes=1,
        max_pixels=1,
        min_side=1,
        max_aspect=1,
        fds=1,
    ),
    child.Frames(
        id=1,
        manifest={},
        size=(2, 2),
        max_bytes=1,
        max_pixels=1,
        fds=2,
    ),
    child.Video(
        id=1,
        encoding="frames",
        manifest={},
        max_frames=1,
        max_tokens=1,
        max_bytes=1,
        max_pixels=1,
        max_seconds=1.0,
        frame_pixels=1,
        seconds=1.0,
        fds=1,
    ),
    child.Render(
        id=1,
        folder="/m",
        manifest={},
        turns=[],
        pictures=[child.Laid(layout=["<", 0, ">"], tokens=[64])],
    ),
    child.Encode(id=1, pixels=child.Tensor(shape=(1, 3, 4, 4), dtype="float32"), fds=1),
    child.Generate(
        id=1, tokens=[1, 2], spans=[child.Span(start=0, count=1, key="k")], max_tokens=3, fds=1
    ),
    child.Embed(id=1, tokens=[1], spans=[child.Span(start=0, count=1, key="k")], size=8, fds=1),
    child.Abort(id=1),
    child.Hello(pid=1, role="prep"),
    child.Beat(),
    child.Progress(fraction=0.5, doing="reading"),
    child.Ready(info={"x": [1]}),
    child.PictureDone(
        id=1,
        sha256="0",
        width=1,
        height=1,
        format="png",
        layout=["<", 0, ">"],
        fds=1,
        views=[child.View(encoder=0, tensor=child.Tensor(shape=(2, 3), dtype="uint8"), tokens=2)],
    ),
    child.VideoDone(id=1, format="mp4", frames=2, times=[0.0, 1.5], duration=2.0, fds=2),
    child.RenderDone(id=1, tokens=[1], spans=[(0, 1, 0, 0)]),
    child.EncodeDone(id=1, rows=child.Tensor(shape=(64, 32), dtype="float32"), seconds=0.1, fds=1),
    child.Prefilled(id=1, prompt=3, cached=1, seconds=0.1),
    child.Text(id=1, text="é"),
    child.GenerateDone(id=1, reason="stop", completion=1, seconds=0.1),
    child.EmbedDone(id=1, vector="AACAPw==", size=1, tokens=3, seconds=0.1),
    child.Failed(code="engine_error", message="A sentence."),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_messages_of_the_children_go_there_and_back(
    message: child.ToChild | child.FromChild,
) -> None:
    parse = child.parse_to_child if isinstance(message, child.ToChild) else child.parse_from_child
    built = child.build(message)
    assert built["type"]
    assert parse(msgspec.json.decode(msgspec.json.encode(built))) == message
    other = child.parse_from_child if parse is child.parse_to_child else child.parse_to_child
    with pytest.raises(msgspec.ValidationError):
        other(built)


def test_every_message_is_sampled() -> None:
    both = get_args(child.ToChild) + get_args(child.FromChild)
    assert {type(sample) for sample in SAMPLES} == set(both)
