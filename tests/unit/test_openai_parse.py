"""Request bodies: what is accepted, what is refused, and which field an error names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.errors import CODES, RkvlmdError
from rkvlmd.messages import ChatRequest, PicturePart, Sampling, TextPart, Turn
from rkvlmd.wire.openai import parse_chat
from rkvlmd.wire.openai_params import IGNORED, MOST_UNKNOWN, READ, SILENT, UNSUPPORTED
from tests.fakes.chat_bodies import PNG, REMOTE, URI, message, parse, refused, with_options

# --- options -----------------------------------------------------------------------------


def test_the_smallest_request() -> None:
    assert with_options() == ChatRequest(turns=(Turn("user", (TextPart("hi"),)),))


def test_all_options() -> None:
    request = with_options(
        model="m", temperature=0.5, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.1,
        frequency_penalty=-2, presence_penalty=2.0, seed=-(2**63), max_tokens=5, stop=["a", "b"],
        stream=True, stream_options={"include_usage": True, "include_obfuscation": False},
        timeout=2.5,
    )  # fmt: skip
    assert request.model == "m"
    assert request.sampling == Sampling(0.5, 40, 0.9, 0.1, 1.1, -2.0, 2.0, -(2**63))
    assert (request.max_tokens, request.stop) == (5, ("a", "b"))
    assert request.stream
    assert request.include_usage
    assert request.timeout == 2.5
    assert request.ignored == request.unknown == ()


def test_null_equals_absent_for_everything_but_the_messages() -> None:
    names = READ | SILENT | IGNORED | set(UNSUPPORTED) | {"unheard_of"}
    nulls = dict.fromkeys(names - {"messages"})
    assert with_options(**nulls) == with_options()
    part = {"type": "image_url", "image_url": {"url": URI, "detail": None}, "detail": None}
    assert message([part], images=None, name=None, tool_calls=None).pictures


def test_special_values() -> None:
    assert with_options(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert with_options(max_completion_tokens=7).max_tokens == 7
    assert with_options(top_k=-1).sampling.top_k == 0
    assert with_options(repeat_penalty=1.5).sampling.repetition_penalty == 1.5
    assert with_options(stop="x").stop == ("x",)
    assert with_options(stop=[]).stop == ()
    assert with_options(model="").model is None
    assert with_options(temperature=1).sampling.temperature == 1.0
    assert with_options(max_tokens=2**62).max_tokens == 2**62


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 2.1, "1", True, [], 10**400]),
        ("top_p", [0, 1.1, "1", False]),
        ("top_k", [-2, 1.5, "1", True, 2**63]),
        ("min_p", [-0.1, 1.1, {}]),
        ("repetition_penalty", [0, 2.5, "x"]),
        ("repeat_penalty", [0, 2.5, "x"]),
        ("frequency_penalty", [-2.1, 2.1, "x", True]),
        ("presence_penalty", [-2.1, 2.1, "x", True]),
        ("seed", [2**63, -(2**63) - 1, 1.0, "1", True]),
        ("max_tokens", [0, -1, 1.5, "5", True]),
        ("max_completion_tokens", [0, -1, 1.5, "5", True]),
        ("stop", [1, "", ["a"] * 17, {}, "x" * 2000]),
        ("stop[1]", [["a", ""], ["a", 1], ["a", None], ["a", "x" * 2000]]),
        ("stream", [1, 0, "true", []]),
        ("stream_options", [[], "x", True, 1]),
        ("stream_options.include_usage", [{"include_usage": 1}, {"include_usage": "yes"}]),
        ("model", [1, ["m"], True, "x" * 1000]),
        ("timeout", [0, -1, "5", True, 1e9]),
        ("n", [0, -1, "1", 1.5, True]),
    ],
)
def test_wrong_values_name_their_field(name: str, values: list[Any]) -> None:
    field = name.partition("[")[0].partition(".")[0]
    for value in values:
        text = refused("invalid_request", name, with_options, **{field: value})
        assert name in text


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_tokens", 0, "must be at least 1."),
        ("max_tokens", 10**30, "must fit in 64 bits."),
        ("max_tokens", 1e30, "must be an integer."),
        ("max_completion_tokens", 2**63, "must fit in 64 bits."),
        ("top_k", -2, "must be at least -1."),
        ("top_k", 2**63, "must fit in 64 bits."),
        ("seed", -(2**63) - 1, "must fit in 64 bits."),
        ("seed", 2**63, "must fit in 64 bits."),
    ],
)
def test_a_number_out_of_range_is_told_the_bound_that_it_breaks(
    name: str, value: float, says: str
) -> None:
    assert refused("invalid_request", name, with_options, **{name: value}).endswith(says)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("best_of", 2), ("logprobs", True), ("top_logprobs", 1), ("logit_bias", {"1": 1}),
        ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("tool_choice", {"a": 1}),
        ("functions", [{}]), ("function_call", {"name": "f"}), ("audio", {"voice": "x"}),
        ("response_format", {"type": "json_object"}), ("response_format", {"type": "json_schema"}),
        ("response_format", "text"), ("modalities", ["text", "audio"]), ("prediction", {"type": "x"}),
        ("web_search_options", {"a": 1}), ("echo", True), ("grammar", "root ::="), ("min_tokens", 3),
        ("ignore_eos", True), ("stop_token_ids", [1]), ("guided_json", {"a": 1}), ("format", "json"),
        ("chat_template", "{{ x }}"), ("documents", [{}]), ("continue_final_message", True),
        ("logprobs", 0), ("tools", True), ("echo", 0),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused(name: str, value: Any) -> None:
    refused("unsupported_parameter", name, with_options, **{name: value})


def test_unsupported_parameters_with_values_that_change_nothing() -> None:
    request = with_options(
        n=1, logprobs=False, top_logprobs=0, logit_bias={}, tools=[], tool_choice="auto",
        functions=[], function_call="none", response_format={"type": "text"}, modalities=["text"],
        echo=False, format="", best_of=1, length_penalty=1,
    )  # fmt: skip
    assert request == with_options()


def test_ignored_silent_and_unknown_parameters() -> None:
    request = with_options(
        user="u", store=False, metadata={"a": "b"}, parallel_tool_calls=True, service_tier="auto",
        chat_template_kwargs={"other": False}, verbosity="low", zz=1, aa=[[]],
    )  # fmt: skip
    assert request.ignored == ("chat_template_kwargs", "verbosity")
    assert request.unknown == ("aa", "zz")
    many = with_options(**{f"{i}" + "x" * 100: 1 for i in range(100)})
    assert len(many.unknown) == MOST_UNKNOWN
    assert max(map(len, many.unknown)) == 64


def test_every_parameter_has_one_place() -> None:
    groups = [READ, SILENT, IGNORED, frozenset(UNSUPPORTED)]
    assert sum(map(len, groups)) == len(frozenset().union(*groups))


# --- messages ----------------------------------------------------------------------------


def test_roles() -> None:
    request = parse(
        {
            "messages": [
                {"role": "system", "content": "a"},
                {"role": "developer", "content": [{"type": "text", "text": "b"}]},
                {"role": "user", "content": "", "name": "x"},
                {"role": "assistant", "content": None, "refusal": None},
                {"role": "assistant"},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"},
            ]
        }
    )
    assert [t.role for t in request.turns] == [
        "system", "system", "user", "assistant", "assistant", "assistant", "user"
    ]  # fmt: skip
    assert [t.parts for t in request.turns] == [
        (TextPart("a"),), (TextPart("b"),), (), (), (), (TextPart("c"),), (TextPart("d"),)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        (None, "invalid_request", "messages"),
        ([], "invalid_request", "messages"),
        ("hi", "invalid_request", "messages"),
        ({"role": "user"}, "invalid_request", "messages"),
        (["hi"], "invalid_request", "messages[0]"),
        ([None], "invalid_request", "messages[0]"),
        ([{"content": "x"}], "invalid_request", "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "invalid_request", "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "invalid_request", "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "unsupported_parameter", "messages[0].role"),
        ([{"role": "function", "content": "x"}], "unsupported_parameter", "messages[0].role"),
        ([{"role": "user"}], "invalid_request", "messages[0].content"),
        ([{"role": "user", "content": []}], "invalid_request", "messages[0].content"),
        ([{"role": "user", "content": 5}], "invalid_request", "messages[0].content"),
        ([{"role": "user", "content": {}}], "invalid_request", "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "invalid_request", "messages[0].content[0]"),
        ([{"role": "user", "content": [{}]}], "invalid_request", "messages[0].content[0].type"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        (
            [{"role": "user", "content": "x", "images": "abc"}],
            "invalid_request",
            "messages[0].images",
        ),
        (
            [{"role": "user", "content": "x", "images": [URI, 5]}],
            "invalid_request",
            "messages[0].images[1]",
        ),
        (
            [{"role": "user", "content": "x", "images": [" "]}],
            "empty_image_file",
            "messages[0].images[0]",
        ),
    ],
)
def test_wrong_messages(messages: Any, code: str, param: str) -> None:
    refused(code, param, parse, {"messages": messages})


@pytest.mark.parametrize(
    ("part", "code", "field"),
    [
        ({"type": "text"}, "invalid_request", "text"),
        ({"type": "text", "text": 5}, "invalid_request", "text"),
        ({"type": "audio_url", "audio_url": {}}, "invalid_request", "type"),
        ({"type": "file", "file": {}}, "invalid_request", "type"),
        ({"type": ["text"]}, "invalid_request", "type"),
        ({"type": "image_url"}, "invalid_request", "image_url"),
        ({"type": "image_url", "image_url": 5}, "invalid_request", "image_url"),
        ({"type": "image_url", "image_url": {}}, "invalid_request", "image_url"),
        ({"type": "image_url", "image_url": {"url": None}}, "invalid_request", "image_url"),
        (
            {"type": "image_url", "image_url": {"url": URI, "detail": 1}},
            "invalid_request",
            "detail",
        ),
        ({"type": "input_image", "file_id": "f"}, "unsupported_parameter", "file_id"),
        ({"type": "image_url", "image_url": ""}, "invalid_image_url", "image_url"),
    ],
)
def test_wrong_parts(part: Any, code: str, field: str) -> None:
    content = [{"type": "text", "text": "x"}, part]
    refused(code, f"messages[0].content[1].{field}", message, content)


def test_too_many_parts_and_messages() -> None:
    parts = [{"type": "text", "text": "x"}] * 10_000
    assert "1024" in refused("invalid_request", "messages", message, parts)
    turns = [{"role": "user", "content": "x"}] * 2000
    refused("invalid_request", "messages", parse, {"messages": turns})
    assert len(parse({"messages": turns[:1024]}).turns) == 1024


# --- anything at all ---------------------------------------------------------------------

LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=20)
    | st.sampled_from(
        [URI, PNG, "file:///x", "http://x/", "user", "text", "image_url", "<|image|>"]
    )
)
KEYS = st.sampled_from(["role", "content", "images", "type", "text", "image_url", "url", "detail"])
TREE = st.recursive(
    LEAF, lambda t: st.lists(t, max_size=4) | st.dictionaries(KEYS, t, max_size=4), max_leaves=12
)
NAMES = st.sampled_from(sorted(READ | IGNORED | SILENT | set(UNSUPPORTED)))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
        optional={"content": TREE, "images": TREE},
    ),
    max_size=3,
)


def check_any(body: bytes) -> None:
    try:
        request = parse_chat(body, REMOTE)
    except RkvlmdError as caught:
        error = caught
    else:
        check_request(request)
        return
    assert CODES[error.code][0] == 400


def check_request(request: ChatRequest) -> None:
    places = [p.index for t in request.turns for p in t.parts if isinstance(p, PicturePart)]
    assert sorted(places) == list(range(len(request.pictures)))
    assert request.turns


@given(st.dictionaries(NAMES, TREE, max_size=5), MESSAGES | TREE)
def test_any_json_is_a_request_or_an_error(options: dict[str, Any], messages: Any) -> None:
    check_any(json.dumps({**options, "messages": messages}).encode())


@given(TREE)
def test_any_json_at_the_top(tree: Any) -> None:
    check_any(json.dumps(tree).encode())


@given(st.binary() | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_an_error(data: bytes) -> None:
    check_any(data)
