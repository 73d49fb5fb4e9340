"""Answers as bytes: golden texts."""

from __future__ import annotations

import json
from dataclasses import replace

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState, ModelView, Timings, Usage
from rkvlmd.wire.openai import Answer, error_body, model_card, model_list

USAGE = Usage(prompt_tokens=241, completion_tokens=52, cached_tokens=196, image_tokens=190)


def answer(*, include_usage: bool = False, digest: str = "sha256:abcdef0123456789") -> Answer:
    return Answer(
        job="j", model='m"x', digest=digest, created=1764000000, include_usage=include_usage
    )


def test_chunks_byte_for_byte() -> None:
    head = (
        b'data: {"id":"chatcmpl-j","object":"chat.completion.chunk","created":1764000000,'
        b'"model":"m\\"x","system_fingerprint":"rkvlmd-abcdef012345","choices":[{"index":0,"delta":'
    )
    plain = answer()
    assert plain.role() == (
        head + b'{"role":"assistant","content":""},"finish_reason":null,"logprobs":null}]}\n\n'
    )
    assert plain.text('a"\n') == (
        head + b'{"content":"a\\"\\n"},"finish_reason":null,"logprobs":null}]}\n\n'
    )
    counted = answer(include_usage=True)
    assert counted.text("é") == (
        head + '{"content":"é"},"finish_reason":null,"logprobs":null}],"usage":null}\n\n'.encode()
    )


def test_the_end_of_a_stream() -> None:
    events = answer().finish("length", USAGE, Timings(total=1.5)).decode().split("\n\n")
    assert events[1:] == ["data: [DONE]", ""]
    last = json.loads(events[0].removeprefix("data: "))
    assert last["choices"] == [
        {"index": 0, "delta": {}, "finish_reason": "length", "logprobs": None}
    ]
    assert last["timings"]["total"] == 1.5
    assert "usage" not in last
    events = answer(include_usage=True).finish("stop", USAGE, Timings()).decode().split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["usage"] is None
    usage = json.loads(events[1].removeprefix("data: "))
    assert usage["choices"] == []
    assert usage["id"] == "chatcmpl-j"
    assert usage["usage"] == {
        "prompt_tokens": 241,
        "completion_tokens": 52,
        "total_tokens": 293,
        "prompt_tokens_details": {
            "cached_tokens": 196,
            "image_tokens": 190,
            "text_tokens": 51,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert events[2:] == ["data: [DONE]", ""]


def test_a_whole_answer() -> None:
    whole = json.loads(answer(digest="").whole("hé", "stop", Usage(estimated=True), Timings()))
    assert whole["system_fingerprint"] is None
    assert whole["object"] == "chat.completion"
    assert whole["usage"]["estimated"] is True
    assert whole["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "hé", "refusal": None},
        }
    ]


def test_thoughts_go_under_both_names_and_the_content_is_a_string() -> None:
    chunk = json.loads(answer().thought('hm "\n').removeprefix(b"data: "))
    assert chunk["choices"] == [
        {
            "index": 0,
            "delta": {"reasoning_content": 'hm "\n', "reasoning": 'hm "\n'},
            "finish_reason": None,
            "logprobs": None,
        }
    ]
    usage = Usage(completion_tokens=9, reasoning_tokens=7)
    whole = json.loads(answer().whole("", "length", usage, Timings(), "hm\u2028"))
    assert whole["choices"][0]["message"] == {
        "role": "assistant", "content": "", "refusal": None, "reasoning_content": "hm\u2028",
        "reasoning": "hm\u2028",
    }  # fmt: skip
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 7}


def test_an_error() -> None:
    error = RkvlmdError("image_too_large", "Too large.", param="messages[0].content[1].image_url")
    assert json.loads(error_body(error)) == {
        "error": {
            "message": "Too large.",
            "type": "invalid_request_error",
            "param": "messages[0].content[1].image_url",
            "code": "image_too_large",
        }
    }


def test_models() -> None:
    view = ModelView("m", "f", ModelState.ABSENT, 4096, False, 1764000000, "")
    assert model_card(view) == {
        "id": "m",
        "object": "model",
        "created": 1764000000,
        "owned_by": "rkvlmd",
        "root": "m",
        "parent": None,
        "max_model_len": 4096,
        "aliases": [],
        "meta": {"n_ctx": 4096},
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "capabilities": ["completion"],
    }
    able = replace(view, image=True, makes=("text", "embeddings"), thinking=True)
    assert model_card(able)["capabilities"] == ["completion", "embedding", "vision", "thinking"]
    assert model_list([]) == {"object": "list", "data": []}


def test_every_answer_says_how_long_each_stage_took() -> None:
    names = (
        "queue", "fetch", "decode_image", "prepare", "load", "encode", "prefill", "first_token",
        "generate", "total",
    )  # fmt: skip
    took = Timings(**{name: number + 0.25 for number, name in enumerate(names)})
    events = answer().finish("stop", USAGE, took).decode().split("\n\n")
    last = json.loads(events[0].removeprefix("data: "))
    whole = json.loads(answer().whole("x", "stop", USAGE, took))
    for said in (last["timings"], whole["timings"]):
        assert said == {name: number + 0.25 for number, name in enumerate(names)}
