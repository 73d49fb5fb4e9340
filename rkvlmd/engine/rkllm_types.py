"""What every version of ``librkllmrt.so`` shares: its enums, callbacks and structures."""

from __future__ import annotations

import ctypes as c
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar


class State(IntEnum):
    """``LLMCallState``: what a result event is."""

    NORMAL = 0
    WAITING = 1
    FINISH = 2
    ERROR = 3


class InputType(IntEnum):
    """``RKLLMInputType``: which member of an input's union is meant."""

    PROMPT = 0
    TOKEN = 1
    EMBED = 2
    MULTIMODAL = 3


class Mode(IntEnum):
    """``RKLLMInferMode``: what a run gives."""

    GENERATE = 0
    LAST_HIDDEN_LAYER = 1
    LOGITS = 2


if TYPE_CHECKING:

    class Structure(c.Structure):
        _fields_: ClassVar[Any]
        _anonymous_: ClassVar[Any]

    class Union(c.Union):
        _fields_: ClassVar[Any]

else:
    Structure, Union = c.Structure, c.Union

Floats = c.POINTER(c.c_float)
Ints = c.POINTER(c.c_int32)


class ExtendParam(Structure):
    """``RKLLMExtendParam``."""

    _fields_ = (
        ("base_domain_id", c.c_int32),
        ("embed_flash", c.c_int8),
        ("enabled_cpus_num", c.c_int8),
        ("enabled_cpus_mask", c.c_uint32),
        ("n_batch", c.c_uint8),
        ("use_cross_attn", c.c_int8),
        ("reserved", c.c_uint8 * 104),
    )


class LoraAdapter(Structure):
    """``RKLLMLoraAdapter``."""

    _fields_ = (
        ("lora_adapter_path", c.c_char_p),
        ("lora_adapter_name", c.c_char_p),
        ("scale", c.c_float),
    )


class EmbedInput(Structure):
    """``RKLLMEmbedInput``: ``n_tokens`` rows of float32."""

    _fields_ = (("embed", Floats), ("n_tokens", c.c_size_t))


class TokenInput(Structure):
    """``RKLLMTokenInput``."""

    _fields_ = (("input_ids", Ints), ("n_tokens", c.c_size_t))


class LoraParam(Structure):
    """``RKLLMLoraParam``."""

    _fields_ = (("lora_adapter_name", c.c_char_p),)


class PromptCacheParam(Structure):
    """``RKLLMPromptCacheParam``."""

    _fields_ = (("save_prompt_cache", c.c_int), ("prompt_cache_path", c.c_char_p))


class CrossAttnParam(Structure):
    """``RKLLMCrossAttnParam``."""

    _fields_ = (
        ("encoder_k_cache", Floats),
        ("encoder_v_cache", Floats),
        ("encoder_mask", Floats),
        ("encoder_pos", Ints),
        ("num_tokens", c.c_int),
    )


class LastHiddenLayer(Structure):
    """``RKLLMResultLastHiddenLayer``: ``num_tokens`` rows of ``embd_size`` float32."""

    _fields_ = (("hidden_states", Floats), ("embd_size", c.c_int), ("num_tokens", c.c_int))


class Logits(Structure):
    """``RKLLMResultLogits``: ``num_tokens`` rows of ``vocab_size`` float32."""

    _fields_ = (("logits", Floats), ("vocab_size", c.c_int), ("num_tokens", c.c_int))


class PerfStat(Structure):
    """``RKLLMPerfStat``: valid in the FINISH event alone."""

    _fields_ = (
        ("prefill_time_ms", c.c_float),
        ("prefill_tokens", c.c_int),
        ("generate_time_ms", c.c_float),
        ("generate_tokens", c.c_int),
        ("memory_usage_mb", c.c_float),
    )


class Result(Structure):
    """``RKLLMResult``; ``text`` may be NULL, and is valid inside the callback alone."""

    _fields_ = (
        ("text", c.c_char_p),
        ("token_id", c.c_int32),
        ("last_hidden_layer", LastHiddenLayer),
        ("logits", Logits),
        ("perf", PerfStat),
    )


class SamplingParam(Structure):
    """``RKLLMSamplingParam``, from 1.3.0: replaces the whole set, so every field is filled."""

    _fields_ = (
        ("top_k", c.c_int32),
        ("top_p", c.c_float),
        ("temperature", c.c_float),
        ("repeat_penalty", c.c_float),
        ("frequency_penalty", c.c_float),
        ("presence_penalty", c.c_float),
        ("mirostat", c.c_int32),
        ("mirostat_tau", c.c_float),
        ("mirostat_eta", c.c_float),
    )


ResultCallback = c.CFUNCTYPE(c.c_int, c.POINTER(Result), c.c_void_p, c.c_int)
#: userdata, text, bytes of text, room for tokens, size of the room: returns the count.
TokenizerCallback = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_void_p, c.c_int32, Ints, c.c_int32)
#: userdata, tokens, how many, room for float32 rows, bytes of the room: returns 0.
EmbedCallback = c.CFUNCTYPE(c.c_int, c.c_void_p, Ints, c.c_uint64, c.c_void_p, c.c_uint64)


class Callback(Structure):
    """``RKLLMCallback``, from 1.3.0: the third argument of ``rkllm_init`` points to it."""

    _fields_ = (
        ("result_callback", ResultCallback),
        ("result_userdata", c.c_void_p),
        ("tokenizer_callback", TokenizerCallback),
        ("tokenizer_userdata", c.c_void_p),
        ("embed_callback", EmbedCallback),
        ("embed_userdata", c.c_void_p),
    )


def pointer(array: Any, kind: Any) -> Any:
    """Return a pointer of type ``kind`` to a NumPy array, which the caller keeps.

    That of NumPy, made from an object, refers to itself: with each run some
    hundred bytes would wait for the collector.
    """
    return c.cast(array.ctypes.data, kind)
