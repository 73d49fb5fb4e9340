"""Answers of the OpenAI chat API as bytes; what repeats in a stream is encoded once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import msgspec

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelView, Timings, Usage
from rkvlmd.wire import sse

_encode = msgspec.json.encode

# Line ends to some text libraries though not in the event stream's grammar: clients that split
# decoded text into lines would break an event in two.
_LINE_ENDS = (
    (b"\xc2\x85", b"\\u0085"),
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
)


def encode_text(text: str) -> bytes:
    """Return ``text`` as a JSON string without any kind of line end in it."""
    if text.isascii():
        return _encode(text)
    try:
        data = _encode(text)
    except UnicodeEncodeError:  # half a surrogate pair
        data = _encode(text.encode("utf-8", "replace").decode())
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return data


class Answer:
    """The answer to one request: the same id, time, model and fingerprint on every piece.

    Args:
      job: unique id; the answer's is ``chatcmpl-`` and it.
      model: the name that the request resolved to.
      digest: of the model's files; empty: no fingerprint.
      created: Unix time in seconds.
      include_usage: whether a stream ends with a usage chunk; its other
        chunks then carry ``"usage": null``.

    """

    def __init__(
        self, *, job: str, model: str, digest: str, created: int, include_usage: bool = False
    ) -> None:
        fingerprint = f"rkvlmd-{digest.rpartition(':')[2][:12]}" if digest else None
        self._base: dict[str, Any] = {
            "id": f"chatcmpl-{job}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._include_usage = include_usage
        head = _encode(self._base)[:-1] + b',"choices":[{"index":0,"delta":'
        self._tail = b"]" + (b',"usage":null' if include_usage else b"") + b"}\n\n"
        self._head = b"data: " + head
        self._text_head = self._head + b'{"content":'
        self._thought_head = self._head + b'{"reasoning_content":'
        self._text_tail = b'},"finish_reason":null,"logprobs":null}' + self._tail

    def role(self) -> bytes:
        """Return the first chunk of a stream."""
        return (
            self._head
            + b'{"role":"assistant","content":""},"finish_reason":null,"logprobs":null}'
            + self._tail
        )

    def text(self, text: str) -> bytes:
        """Return a chunk with text."""
        return self._text_head + encode_text(text) + self._text_tail

    def thought(self, thought: str) -> bytes:
        """Return a chunk with thoughts, under both names that clients look for.

        Servers have not agreed on one: llama.cpp, SGLang and LMDeploy say
        ``reasoning_content``, vLLM and Ollama ``reasoning``.
        """
        said = encode_text(thought)
        return self._thought_head + said + b',"reasoning":' + said + self._text_tail

    def finish(self, reason: str, usage: Usage, timings: Timings) -> bytes:
        """Return the end of a whole stream: finish chunk, usage chunk if asked for, ``[DONE]``."""
        seconds = {"timings": _timings(timings)}
        last = self._head + b'{},"finish_reason":%b,"logprobs":null}' % _encode(reason)
        last += self._tail[: -len(b"}\n\n")] + b"," + _encode(seconds)[1:] + b"\n\n"
        if not self._include_usage:
            return last + sse.DONE
        with_usage = {**self._base, "choices": [], "usage": _usage(usage)}
        return last + sse.event(_encode(with_usage)) + sse.DONE

    def whole(
        self, text: str, reason: str, usage: Usage, timings: Timings, thought: str = ""
    ) -> bytes:
        """Return the answer to a request that does not stream; ``content`` is always a string."""
        message = {"role": "assistant", "content": msgspec.Raw(encode_text(text)), "refusal": None}
        if thought:
            message |= dict.fromkeys(
                ("reasoning_content", "reasoning"), msgspec.Raw(encode_text(thought))
            )
        choice = {"index": 0, "finish_reason": reason, "logprobs": None, "message": message}
        return _encode(
            {
                **self._base,
                "object": "chat.completion",
                "choices": [choice],
                "usage": _usage(usage),
                "timings": _timings(timings),
            }
        )


def _usage(usage: Usage) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
            "text_tokens": max(usage.prompt_tokens - usage.image_tokens, 0),
            "audio_tokens": 0,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
    if usage.estimated:
        counts["estimated"] = True
    return counts


def _timings(timings: Timings) -> dict[str, float]:
    """Return the seconds of each stage."""
    return {name: round(value, 6) for name, value in dataclasses.asdict(timings).items()}


def error_body(error: RkvlmdError) -> bytes:
    """Return the error object, as the body of a response or the data of an event."""
    return _encode(
        {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def model_card(view: ModelView) -> dict[str, Any]:
    """Return one model in the shape that readers of OpenAI, vLLM and llama.cpp look for."""
    modalities = ["text"] + ["image"] * view.image + ["video"] * view.video
    # the words of Ollama
    can = ["completion"] * ("text" in view.makes) + ["embedding"] * ("embeddings" in view.makes)
    can += ["vision"] * view.image + ["thinking"] * view.thinking
    return {
        "id": view.name,
        "object": "model",
        "created": view.created,
        "owned_by": "rkvlmd",
        "root": view.name,
        "parent": view.parent or None,
        "max_model_len": view.context,
        "aliases": ["default"] if view.default else [],
        "meta": {"n_ctx": view.context},
        "architecture": {"input_modalities": modalities, "output_modalities": list(view.makes)},
        "capabilities": can,
    }


def model_list(views: Iterable[ModelView]) -> dict[str, Any]:
    """Return the list of models."""
    cards = []
    for view in views:
        cards.append(model_card(view))
        for adapter in view.adapters:
            name = f"{view.name}:{adapter}"
            cards.append(
                model_card(dataclasses.replace(view, name=name, parent=view.name, default=False))
            )
    return {"object": "list", "data": cards}
