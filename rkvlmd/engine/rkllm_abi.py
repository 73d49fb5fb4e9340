"""The memory layouts of ``librkllmrt.so`` as ctypes structures: 1.2.1 to 1.2.3, 1.3.0 and 1.3.1.

All versions export the same 15 names and differ in what lies behind the
pointers, so the layout follows from the version of the file
(``engine.rkllm_library``). Sizes and offsets are those of LP64 Linux, the same
on aarch64 and x86-64; tests hold them against tables and against a compiler.
``bool`` is one byte, enums are ``int``, ``top_k`` is int32.
"""

from __future__ import annotations

import ctypes as c
from dataclasses import dataclass
from typing import Any

from rkvlmd.engine.rkllm_types import (
    EmbedInput,
    ExtendParam,
    Floats,
    LoraParam,
    PromptCacheParam,
    SamplingParam,
    Structure,
    TokenInput,
    Union,
)

# --- parameters of rkllm_init ------------------------------------------------------------

_PARAM_HEAD = (
    ("model_path", c.c_char_p),
    ("max_context_len", c.c_int32),
    ("max_new_tokens", c.c_int32),
    ("top_k", c.c_int32),
    ("n_keep", c.c_int32),
    ("top_p", c.c_float),
    ("temperature", c.c_float),
    ("repeat_penalty", c.c_float),
    ("frequency_penalty", c.c_float),
    ("presence_penalty", c.c_float),
    ("mirostat", c.c_int32),
    ("mirostat_tau", c.c_float),
    ("mirostat_eta", c.c_float),
    ("skip_special_token", c.c_bool),
)


class Param12(Structure):
    """``RKLLMParam`` of 1.2.1 to 1.2.3; a NULL image tag crashes these libraries."""

    _fields_ = (
        *_PARAM_HEAD,
        ("is_async", c.c_bool),
        ("img_start", c.c_char_p),
        ("img_end", c.c_char_p),
        ("img_content", c.c_char_p),
        ("extend_param", ExtendParam),
    )


class Param13(Structure):
    """``RKLLMParam`` from 1.3.0."""

    _fields_ = (
        *_PARAM_HEAD,
        ("ignore_eos_token", c.c_bool),
        ("is_async", c.c_bool),
        ("extend_param", ExtendParam),
    )


# --- inputs of rkllm_run -----------------------------------------------------------------


class MultiModal12(Structure):
    """``RKLLMMultiModalInput`` of 1.2.1 to 1.2.3."""

    _fields_ = (
        ("prompt", c.c_char_p),
        ("image_embed", Floats),
        ("n_image_tokens", c.c_size_t),
        ("n_image", c.c_size_t),
        ("image_width", c.c_size_t),
        ("image_height", c.c_size_t),
    )


class Image13(Structure):
    """The member ``image`` of ``RKLLMMultiModalInput`` from 1.3.0."""

    _fields_ = (
        ("image_embed", Floats),
        ("n_image_tokens", c.c_size_t),
        ("n_image", c.c_size_t),
        ("image_start", c.c_char_p),
        ("image_end", c.c_char_p),
        ("image_content", c.c_char_p),
        ("image_width", c.c_size_t),
        ("image_height", c.c_size_t),
    )


class Video13(Structure):
    """The member ``video`` of ``RKLLMMultiModalInput`` from 1.3.0."""

    _fields_ = (
        ("video_embed", Floats),
        ("n_frame_tokens", c.c_size_t),
        ("n_frame_per_video", c.c_size_t),
        ("n_video", c.c_size_t),
        ("video_start", c.c_char_p),
        ("video_end", c.c_char_p),
        ("video_content", c.c_char_p),
        ("frame_width", c.c_size_t),
        ("frame_height", c.c_size_t),
    )


class Audio131(Structure):
    """The member ``audio`` of ``RKLLMMultiModalInput`` of 1.3.1."""

    _fields_ = (
        ("audio_embed", Floats),
        ("n_audio_tokens", c.c_size_t),
        ("n_audio", c.c_size_t),
        ("audio_start", c.c_char_p),
        ("audio_end", c.c_char_p),
        ("audio_content", c.c_char_p),
    )


class MultiModal130(Structure):
    """``RKLLMMultiModalInput`` of 1.3.0."""

    _fields_ = (("prompt", c.c_char_p), ("image", Image13), ("video", Video13))


class MultiModal131(Structure):
    """``RKLLMMultiModalInput`` of 1.3.1."""

    _fields_ = (
        ("prompt", c.c_char_p),
        ("image", Image13),
        ("video", Video13),
        ("audio", Audio131),
    )


def _union(multimodal: type[c.Structure]) -> tuple[tuple[str, Any], ...]:
    return (
        ("prompt_input", c.c_char_p),
        ("embed_input", EmbedInput),
        ("token_input", TokenInput),
        ("multimodal_input", multimodal),
    )


class _Union12(Union):
    _fields_ = _union(MultiModal12)


class _Union130(Union):
    _fields_ = _union(MultiModal130)


class _Union131(Union):
    _fields_ = _union(MultiModal131)


_INPUT_HEAD = (
    ("role", c.c_char_p),
    ("enable_thinking", c.c_bool),
    ("input_type", c.c_int),
)


class Input12(Structure):
    """``RKLLMInput`` of 1.2.1 to 1.2.3."""

    _anonymous_ = ("value",)
    _fields_ = (*_INPUT_HEAD, ("value", _Union12))


class Input130(Structure):
    """``RKLLMInput`` of 1.3.0."""

    _anonymous_ = ("value",)
    _fields_ = (*_INPUT_HEAD, ("value", _Union130))


class Input131(Structure):
    """``RKLLMInput`` of 1.3.1."""

    _anonymous_ = ("value",)
    _fields_ = (*_INPUT_HEAD, ("value", _Union131))


class InferParam12(Structure):
    """``RKLLMInferParam`` of 1.2.1 to 1.2.3."""

    _fields_ = (
        ("mode", c.c_int),
        ("lora_params", c.POINTER(LoraParam)),
        ("prompt_cache_params", c.POINTER(PromptCacheParam)),
        ("keep_history", c.c_int),
    )


class InferParam13(Structure):
    """``RKLLMInferParam`` from 1.3.0; ``max_new_tokens`` of 0 or less means that of the init."""

    _fields_ = (
        ("mode", c.c_int),
        ("lora_params", c.POINTER(LoraParam)),
        ("prompt_cache_params", c.POINTER(PromptCacheParam)),
        ("sampling_params", c.POINTER(SamplingParam)),
        ("keep_history", c.c_int),
        ("max_new_tokens", c.c_int32),
    )


# --- which belongs to which --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """The structures that differ between versions.

    ``per_run``: sampling and the token limit can be given with each run, the
    image tags belong to the input, and the callback travels in a structure.
    """

    name: str
    param: type[c.Structure]
    multimodal: type[c.Structure]
    input: type[c.Structure]
    infer: type[c.Structure]
    per_run: bool


V12 = Layout("1.2", Param12, MultiModal12, Input12, InferParam12, per_run=False)
V130 = Layout("1.3.0", Param13, MultiModal130, Input130, InferParam13, per_run=True)
V131 = Layout("1.3.1", Param13, MultiModal131, Input131, InferParam13, per_run=True)

#: The layout of each version that is known; betas had others and are not among them.
VERSIONS: dict[str, Layout] = {
    "1.2.1": V12,
    "1.2.2": V12,
    "1.2.3": V12,
    "1.3.0": V130,
    "1.3.1": V131,
}

#: Bytes that an input gets, zeroed: more than any known version reads.
INPUT_ROOM = 256


def new_input(layout: Layout) -> Any:
    """Return a zeroed ``RKLLMInput`` with room behind it for what later versions append."""
    return layout.input.from_buffer((c.c_char * INPUT_ROOM)())
