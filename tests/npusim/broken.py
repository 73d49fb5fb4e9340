"""Callers that are wrong, each in its own way: ``python -m tests.npusim.broken WHAT LIBRARY MODEL``.

Each must end in an abort of the process, or the simulator is too lax.
"""

from __future__ import annotations

import ctypes as c
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rkvlmd.engine import rkllm_cross
from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine import rkllm_types as types
from rkvlmd.engine.rkllm_library import open_library
from rkvlmd.engine.rkllm_session import ImageTags, Session, Setup, infer_param
from rkvlmd.engine.rkllm_types import Floats
from rkvlmd.models.manifest import CrossAttention
from tests.npusim import models

TAGS = ImageTags(b"<|vision_start|>", b"<|vision_end|>", b"<|image_pad|>")
EMBED, OUTPUTS, SIDE, TOKENS = 8, 4, 64, 4

Caller = Callable[[Session], Any]
CALLERS: dict[str, tuple[str, Caller]] = {}


def caller(section: str) -> Callable[[Caller], Caller]:
    """Register a caller, with the section of the fact sheet that forbids what it does."""

    def register(function: Caller) -> Caller:
        CALLERS[function.__name__] = (section, function)
        return function

    return register


CROSSING: dict[str, tuple[str, Caller]] = {}


def crossing(section: str) -> Callable[[Caller], Caller]:
    """Register a caller of a model with cross attention."""

    def register(function: Caller) -> Caller:
        CROSSING[function.__name__] = (section, function)
        return function

    return register


def picture(session: Session, prompt: bytes = b"<image>x", **changes: Any) -> Any:
    """Return a right input with one picture, then changed."""
    rows = models.rows_of(7, TOKENS, EMBED, OUTPUTS)
    block = inputs.stack(
        [rows], tokens=TOKENS, row=EMBED * OUTPUTS, width=SIDE, height=SIDE, tags=TAGS
    )
    value = inputs.multimodal_input(session.library.layout, b"<image>x", block)
    value.kept = block
    multimodal = value.multimodal_input
    multimodal.prompt = prompt
    target = multimodal.image if session.library.layout.per_run else multimodal
    for name, wanted in changes.items():
        setattr(target, name, wanted)
    return value


def text(session: Session, prompt: bytes = b"hello") -> Any:
    return inputs.prompt_input(session.library.layout, prompt)


def run(session: Session, value: Any, infer: Any = None, sink: Any = None) -> int:
    return session.run(value, infer or infer_param(session.library), sink or (lambda *_: 0))


@caller("2.10")
def more_places_than_pictures(session: Session) -> None:
    run(session, picture(session, b"<image> and <image>"))


@caller("2.10")
def more_pictures_than_places(session: Session) -> None:
    run(session, picture(session, b"no place"))


@caller("7")
def a_place_in_a_text_without_pictures(session: Session) -> None:
    run(session, text(session, b"what is <image>?"))


@caller("1.4")
def a_count_that_reads_past_the_buffer(session: Session) -> None:
    # Mapped memory ends right after the rows, so that one row more is outside.
    rows = models.rows_of(7, TOKENS, EMBED, OUTPUTS).tobytes()
    mapped = mmap.mmap(-1, mmap.PAGESIZE * 2)
    base = c.addressof(c.c_char.from_buffer(mapped))
    libc = c.CDLL(None)
    libc.mprotect.argtypes = [c.c_void_p, c.c_size_t, c.c_int]
    libc.mprotect(base + mmap.PAGESIZE, mmap.PAGESIZE, 0)
    start = base + mmap.PAGESIZE - len(rows)
    c.memmove(start, rows, len(rows))
    run(session, picture(session, image_embed=c.cast(start, Floats)))
    run(session, picture(
        session, image_embed=c.cast(start, Floats), n_image_tokens=2 * TOKENS,
        image_width=2 * SIDE,
    ))  # fmt: skip


@caller("3.1")
def only_the_first_output(session: Session) -> None:
    # What a caller does that knows nothing of deepstack: rows of one embedding. The memory behind
    # them is mapped, so only the marks tell.
    rows = models.rows_of(7, TOKENS, EMBED, OUTPUTS).reshape(TOKENS, OUTPUTS, EMBED)
    room = np.zeros((64, EMBED), np.float32)
    room[:TOKENS] = rows[:, 0]
    run(session, picture(session, image_embed=room.ctypes.data_as(Floats)))


@caller("3.1")
def outputs_one_after_the_other(session: Session) -> None:
    rows = models.rows_of(7, TOKENS, EMBED, OUTPUTS).reshape(TOKENS, OUTPUTS, EMBED)
    planes = np.ascontiguousarray(rows.transpose(1, 0, 2))
    run(session, picture(session, image_embed=planes.ctypes.data_as(Floats)))


@caller("3.4")
def a_size_that_makes_other_tokens(session: Session) -> None:
    run(session, picture(session, image_width=2 * SIDE))


def film(session: Session, prompt: bytes = b"<video>x", **changes: Any) -> Any:
    """Return a right input with one video of two frames, then changed."""
    rows = [models.rows_of(p, TOKENS, EMBED, OUTPUTS) for p in (7, 8)]
    block = inputs.stack(
        rows, tokens=TOKENS, row=EMBED * OUTPUTS, width=SIDE, height=SIDE, tags=TAGS
    )
    value = inputs.multimodal_input(
        session.library.layout, b"<video>x", None, videos=block, frames=2
    )
    value.kept = block
    value.multimodal_input.prompt = prompt
    for name, wanted in changes.items():
        setattr(value.multimodal_input.video, name, wanted)
    return value


@caller("2.10")
def more_videos_than_places(session: Session) -> None:
    run(session, film(session))
    run(session, film(session, n_video=2, n_frame_per_video=1))


@caller("2.10")
def a_video_in_a_picture_s_place(session: Session) -> None:
    run(session, film(session, b"<image>x"))


@caller("3.1")
def frames_with_another_stride(session: Session) -> None:
    frames = models.rows_of(7, 2 * TOKENS, EMBED, OUTPUTS)
    run(session, film(session, video_embed=frames.ctypes.data_as(Floats)))


@caller("3.4")
def frames_of_another_size(session: Session) -> None:
    run(session, film(session, frame_width=2 * SIDE))


@caller("1.4")
def rows_at_an_odd_address(session: Session) -> None:
    room = np.zeros(10_000, np.uint8)
    run(session, picture(session, image_embed=c.cast(room.ctypes.data + 1, Floats)))


@caller("1.4")
def rows_nowhere(session: Session) -> None:
    run(session, picture(session, image_embed=c.cast(16, Floats)))


@caller("3.1")
def rows_that_were_freed(session: Session) -> None:
    value = picture(session)
    # What an allocator leaves of a block that it has given to somebody else.
    value.kept.rows.reshape(-1)[:10] = np.float32(0)
    run(session, value)


@caller("1.4")
def rows_that_change_during_the_run(session: Session) -> None:
    value = picture(session, b"<image>" + b"word " * 500)
    kept, other = value.kept.rows, models.rows_of(8, TOKENS, EMBED, OUTPUTS)
    # The library has looked at the rows when it says that it waits, and goes on when they are others.
    os.environ["NPUSIM_FAULT"] = "wait@prefill"

    def change() -> None:
        while not models.read_trace(Path(os.environ["NPUSIM_TRACE"]), "fault"):
            time.sleep(0.001)
        kept[0] = other
        Path(os.environ["NPUSIM_GO"]).touch()

    threading.Thread(target=change, daemon=True).start()
    run(session, value)


@caller("1.4")
def no_image_tags(session: Session) -> None:
    run(session, picture(session, image_start=None))


@caller("2.1")
def a_second_run_beside_the_first(session: Session) -> None:
    started = threading.Event()

    def sink(*_: Any) -> int:
        started.set()
        return 0

    thread = threading.Thread(target=run, args=(session, text(session), None, sink))
    thread.start()
    started.wait()
    run(session, text(session))


@caller("2.1")
def a_run_from_the_callback(session: Session) -> None:
    run(session, text(session), None, lambda *_: run(session, text(session)))


@caller("2.1")
def a_clear_from_the_callback(session: Session) -> None:
    run(session, text(session), None, lambda *_: session.clear() or 0)


@caller("2.1")
def a_destroy_during_a_run(session: Session) -> None:
    run(session, text(session), None, lambda *_: session.close() or 0)


@caller("2.3")
def a_run_after_destroy(session: Session) -> None:
    handle = session._handle.value
    session.close()
    session._handle = c.c_void_p(handle)
    run(session, text(session))


@caller("2.1")
def a_handle_that_never_was(session: Session) -> None:
    session._handle = c.c_void_p(0x1234)
    run(session, text(session))


@caller("2.4")
def a_range_cleared_outside_a_pause(session: Session) -> None:
    run(session, text(session))
    session.clear_range([0], [1])


@caller("2.2")
def a_pause_with_history(session: Session) -> None:
    run(session, text(session), infer_param(session.library, keep_history=True), lambda *_: 1)


@caller("1.2")
def a_callback_without_a_known_answer(session: Session) -> None:
    run(session, text(session), None, lambda *_: 7)


@caller("1.2")
def an_input_of_no_kind(session: Session) -> None:
    value = text(session)
    value.input_type = 9
    run(session, value)


@caller("1.4")
def no_role(session: Session) -> None:
    value = text(session)
    value.role = None
    run(session, value)


@caller("1.4")
def top_k_as_a_float(session: Session) -> None:
    infer = infer_param(session.library)
    sampling = types.SamplingParam(0x42200000, 0.9, 0.8, 1.1, 0, 0, 0, 5.0, 0.1)
    infer.sampling_params = c.pointer(sampling)
    run(session, text(session), infer)


@caller("1.3")
def sampling_filled_in_part(session: Session) -> None:
    infer = infer_param(session.library)
    infer.sampling_params = c.pointer(types.SamplingParam(top_k=1))
    run(session, text(session), infer)


@caller("1.4")
def a_callback_structure_that_changed(session: Session) -> None:
    structure = next(k for k in session._kept if isinstance(k, types.Callback))
    structure.result_userdata = 0x55AA
    run(session, text(session))


@caller("1.5")
def sound_that_was_not_zeroed(session: Session) -> None:
    value = picture(session)
    value.multimodal_input.audio.n_audio = 1
    run(session, value)


@caller("1.1")
def thinking_that_is_no_bool(session: Session) -> None:
    value = text(session)
    c.memset(c.addressof(value) + types_offset(value, "enable_thinking"), 0x40, 1)
    run(session, value)


# --- models with cross attention ----------------------------------------------------------

LAYERS, HEADS, DIM = 2, 3, 4


def beside(session: Session, **changes: Any) -> Any:
    """Give right caches of two pictures, changed; return what must stay alive."""
    shape = CrossAttention(layers=LAYERS, kv_heads=HEADS, head_dim=DIM)
    rows = [
        rkllm_cross.rows_of(models.caches_of(p, TOKENS, LAYERS, HEADS, DIM), shape, TOKENS)
        for p in (1, 2)
    ]
    caches = rkllm_cross.caches(rows, shape)
    param = caches.param
    for name, value in changes.items():
        setattr(param, name, value)
    session.set_cross_attention(param)
    return caches


def floats(array: Any) -> Any:
    return np.ascontiguousarray(array).ctypes.data_as(Floats)


@crossing("2.9")
def values_laid_out_like_keys(session: Session) -> None:
    keys, _ = models.caches_of(1, 2 * TOKENS, LAYERS, HEADS, DIM)
    wrong = keys + np.float32(0.5)
    beside(session, encoder_k_cache=floats(keys), encoder_v_cache=floats(wrong))


@crossing("2.9")
def tokens_before_layers(session: Session) -> None:
    keys, _ = models.caches_of(1, 2 * TOKENS, LAYERS, HEADS, DIM)
    beside(session, encoder_k_cache=floats(keys.transpose(1, 0, 2, 3)))


@crossing("2.9")
def more_tokens_than_there_are(session: Session) -> None:
    beside(session, num_tokens=2 * TOKENS + 1)


@crossing("2.9")
def no_tokens(session: Session) -> None:
    beside(session, num_tokens=0)


@crossing("1.4")
def caches_nowhere(session: Session) -> None:
    beside(session, encoder_v_cache=c.cast(16, Floats))


@crossing("2.9")
def a_second_run_without_caches(session: Session) -> None:
    kept = beside(session)
    run(session, text(session))
    run(session, text(session))
    del kept


@crossing("2.9")
def caches_that_change_before_the_run(session: Session) -> None:
    kept = beside(session)
    kept.keys[0] += 1
    run(session, text(session))


def types_offset(value: Any, name: str) -> int:
    return int(getattr(type(value), name).offset)


#: What goes wrong before there is a handle: a setup's changes.
SETUPS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "a_domain_that_is_none": ("5.4", lambda p: setattr(p.extend_param, "base_domain_id", 99)),
    "reserved_bytes_that_are_set": (
        "1.3",
        lambda p: p.extend_param.reserved.__setitem__(3, 1),
    ),
    "no_model_path": ("1.4", lambda p: setattr(p, "model_path", None)),
    "image_tags_of_null": ("1.4", lambda p: setattr(p, "img_start", None)),
}


class Wrong(Session):
    """A session that changes its parameters just before the library sees them."""

    change: Callable[[Any], None]

    def _fill(self, param: Any, setup: Setup) -> None:
        super()._fill(param, setup)
        self.change(param)


def main(what: str, library: str, model: str) -> None:
    opened = open_library(library)
    setup = Setup(Path(model), context=4096, max_new_tokens=16, tags=TAGS)
    if what in SETUPS:
        wrong = Wrong(opened)
        wrong.change = SETUPS[what][1]
        wrong.open(setup)
        return
    if what == "a_second_model_in_one_process":
        Session(opened).open(setup)
        Session(opened).open(setup)
        return
    session = Session(opened)
    if what in CROSSING:
        cross = models.rkllm(
            Path(model).with_name("cross.rkllm"), embed=EMBED, signed_rows=True, cross=True,
            layers=LAYERS, kv_heads=HEADS, head_dim=DIM,
        )  # fmt: skip
        session.open(replace(setup, model=cross, cross_attention=True))
        session.raw_template()
        kept = beside(session)
        assert run(session, text(session)) == 0, "a right caller must be served"
        del kept
        CROSSING[what][1](session)
        return
    session.open(setup)
    session.raw_template()
    assert run(session, picture(session)) == 0, "a right caller must be served"
    CALLERS[what][1](session)


if __name__ == "__main__":
    main(*sys.argv[1:])
    print("nobody complained")
