"""Which request parameters there are, and what happens to those that have no effect here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkvlmd.wire import openai_thinking
from rkvlmd.wire.openai_fields import Fields, invalid, unsupported

#: Parameters that ``parse_chat`` reads.
READ: frozenset[str] = openai_thinking.NAMES | frozenset(
    [
        "messages",
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "repeat_penalty",
        "frequency_penalty",
        "presence_penalty",
        "seed",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "stream",
        "stream_options",
        "timeout",
        "priority",
        "keep_alive",
    ]
)

#: Known, and without any influence on the answer.
SILENT: frozenset[str] = frozenset(
    [
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "timings_per_token",
        "return_progress",
        "cache_prompt",
        "id_slot",
        "request_id",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "extra_headers",
        "extra_query",
        "add_generation_prompt",
    ]
)

#: Known, asked for in good faith, without effect: named in ``x-rkvlmd-ignored``.
IGNORED: frozenset[str] = frozenset(
    [
        "verbosity",
        "options",
    ]
)


def _is(*neutral: Any) -> Callable[[Any], bool]:
    # 0 == False in Python, not in JSON
    return lambda value: any(type(value) is type(n) and value == n for n in neutral)


def _empty(value: Any) -> bool:
    return isinstance(value, (str, list, dict)) and not value


def _plain_text(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


#: Known parameters that change the answer, and the values with which they do not.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "n": _is(1),
    "best_of": _is(1),
    "logprobs": _is(False),
    "top_logprobs": _is(0),
    "prompt_logprobs": _is(0),
    "logit_bias": _empty,
    "tools": _empty,
    "tool_choice": _is("none", "auto"),
    "functions": _empty,
    "function_call": _is("none", "auto"),
    "response_format": _plain_text,
    "format": _empty,
    "audio": _empty,
    "modalities": _is(["text"]),
    "prediction": _empty,
    "web_search_options": _empty,
    "moderation": _empty,
    "echo": _is(False),
    "suffix": _empty,
    "prompt": _empty,
    "chat_template": _empty,
    "documents": _empty,
    "mm_processor_kwargs": _empty,
    "media_io_kwargs": _empty,
    "continue_final_message": _is(False),
    "grammar": _empty,
    "json_schema": _empty,
    "structured_outputs": _empty,
    "guided_json": _empty,
    "guided_regex": _empty,
    "guided_choice": _empty,
    "guided_grammar": _empty,
    "regex": _empty,
    "ebnf": _empty,
    "min_tokens": _is(0),
    "n_predict": _is(-1),
    "ignore_eos": _is(False),
    "stop_token_ids": _empty,
    "include_stop_str_in_output": _is(False),
    "bad_words": _empty,
    "allowed_token_ids": _empty,
    "logits_processors": _empty,
    "use_beam_search": _is(False),
    "length_penalty": _is(1, 1.0),
    "no_repeat_ngram_size": _is(0),
    "typical_p": _is(1, 1.0),
    "mirostat": _is(0),
    "dynatemp_range": _is(0, 0.0),
    "xtc_probability": _is(0, 0.0),
    "dry_multiplier": _is(0, 0.0),
    "lora": _empty,
}

#: Counts of answers: below one is an error of another kind than above.
_COUNTS = frozenset({"n", "best_of"})

#: How many unknown names one request may report, and how long they may be.
MOST_UNKNOWN = 32
UNKNOWN_CHARACTERS = 64


def sort_out(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names without effect and the names that nobody knows, both sorted.

    Raises:
      RkvlmdError: ``unsupported_parameter`` with the name in ``param``.

    """
    ignored: list[str] = []
    unknown: list[str] = []
    for name, value in fields.values.items():
        if value is None or name in READ or name in SILENT:
            continue
        if name in IGNORED:
            ignored.append(name)
        elif name in UNSUPPORTED:
            if UNSUPPORTED[name](value):
                continue
            if name in _COUNTS and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise invalid(name, "must be 1.")
            raise unsupported(name, "this value is not supported by this server.")
        elif len(unknown) < MOST_UNKNOWN:
            unknown.append(name[:UNKNOWN_CHARACTERS])
    return tuple(sorted(ignored)), tuple(sorted(unknown))
