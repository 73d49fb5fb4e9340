"""The lines of the control socket, without a socket."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkvlmd.wire import control

OWN, OPERATORS = 990, 777


def call(**members):
    return json.dumps({"jsonrpc": "2.0", "id": 1} | members).encode()


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (control.Peer(1, 0, 0), "change"),
        (control.Peer(1, OWN, 5), "change"),
        (control.Peer(1, 1000, OPERATORS), "change"),
        (control.Peer(1, 1000, 5, frozenset({4, OPERATORS})), "change"),
        (control.Peer(1, 1000, 5, frozenset({4, 6})), "look"),
        (control.Peer(1, 65534, 0, frozenset({0})), "look"),
    ],
)
def test_tier(peer, expected):
    assert control.tier(peer, own_uid=OWN, operator_gid=OPERATORS) == expected


def test_without_operator_group_no_group_helps():
    peer = control.Peer(1, 1000, OPERATORS, frozenset({OPERATORS}))
    assert control.tier(peer, own_uid=OWN, operator_gid=None) == "look"


def test_changing_methods_need_the_higher_tier():
    changing = {name for name, method in control.METHODS.items() if method.tier == "change"}
    orders = {"load", "unload", "pin", "unpin", "drain", "resume", "reload"}
    assert changing == orders | {"cancel"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (call(method="status"), control.Call("status", {}, 1)),
        (call(method="load", params={"model": "m"}), control.Call("load", {"model": "m"}, 1)),
        (call(method="load", params=["m"]), control.Call("load", {"model": "m"}, 1)),
        (call(method="jobs", params=None, id="x"), control.Call("jobs", {}, "x")),
        (call(method="jobs", id=None), control.Call("jobs", {}, None)),
        (
            b'{"jsonrpc":"2.0","method":"jobs"}',
            control.Call("jobs", {}, None, wants_reply=False),
        ),
    ],
)
def test_good_calls(line, expected):
    assert control.parse_call(line) == expected


@pytest.mark.parametrize(
    ("line", "number", "id_"),
    [
        (b"hello", control.PARSE_ERROR, None),
        (b"\xff\xfe", control.PARSE_ERROR, None),
        (b'{"jsonrpc":"2.0"', control.PARSE_ERROR, None),
        (b"[" * 100_000, control.PARSE_ERROR, None),
        (b"1" * 10_000, control.PARSE_ERROR, None),
        (b"[]", control.INVALID_REQUEST, None),
        (b"7", control.INVALID_REQUEST, None),
        (b'{"id":4,"method":"status"}', control.INVALID_REQUEST, 4),
        (call(), control.INVALID_REQUEST, 1),
        (call(method=3), control.INVALID_REQUEST, 1),
        (call(method="status", id={}), control.INVALID_REQUEST, None),
        (call(method="status", id=True), control.INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":1e999,"method":"status"}', control.INVALID_REQUEST, None),
        (call(method="reboot"), control.METHOD_NOT_FOUND, 1),
        (call(method="load"), control.INVALID_PARAMS, 1),
        (call(method="load", params={"model": 3}), control.INVALID_PARAMS, 1),
        (call(method="load", params={"model": ""}), control.INVALID_PARAMS, 1),
        (call(method="load", params={"model": "m", "x": "y"}), control.INVALID_PARAMS, 1),
        (call(method="load", params=["m", "n"]), control.INVALID_PARAMS, 1),
        (call(method="load", params="m"), control.INVALID_PARAMS, 1),
        (call(method="status", params=["m"]), control.INVALID_PARAMS, 1),
    ],
)
def test_bad_calls(line, number, id_):
    with pytest.raises(control.RpcError) as caught:
        control.parse_call(line)
    assert (caught.value.number, caught.value.id) == (number, id_)
    json.loads(control.encode(control.failure(caught.value)))


def test_wrong_parameter_is_named():
    with pytest.raises(control.RpcError) as caught:
        control.parse_call(call(method="load", params={"name": "m"}))
    assert caught.value.data == {"code": "invalid_request", "param": "name"}


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_no_line_does_harm(line):
    try:
        control.parse_call(line)
        answer = b"\n"
    except control.RpcError as error:
        answer = control.encode(control.failure(error))
    assert answer.count(b"\n") == 1


texts = st.text(max_size=30)


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(texts, texts, max_size=3), max_size=6),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_lines_survive_every_cut(messages, cuts):
    data = b"".join(control.encode(message) for message in messages)
    decoder = control.LineDecoder(1 << 16)
    lines, turn = [], 0
    while data:
        size = cuts[turn % len(cuts)]
        turn += 1
        lines += decoder.feed(data[:size])
        data = data[size:]
    assert [json.loads(line) for line in lines] == messages


def test_empty_lines_are_skipped():
    assert control.LineDecoder(10).feed(b"\n\r\n  \na\n\n") == [b"a"]


def test_a_line_at_the_limit_passes_and_one_above_does_not():
    assert control.LineDecoder(4).feed(b"abcd\n") == [b"abcd"]
    with pytest.raises(control.LineTooLongError):
        control.LineDecoder(4).feed(b"abcde\n")
    decoder = control.LineDecoder(4)
    assert decoder.feed(b"abcd") == []
    with pytest.raises(control.LineTooLongError):
        decoder.feed(b"e")


def test_answers_are_read_back():
    line = control.encode(control.reply(3, {"a": 1}))
    assert control.parse_answer(line) == control.Answer(3, result={"a": 1})
    step = control.progress(model="m", state="loading", progress=0.5, detail="decoder")
    expected = control.Progress("m", "loading", 0.5, "decoder")
    assert control.parse_answer(control.encode(step)) == expected
    refusal = control.RpcError(
        control.PERMISSION_DENIED, "no", id=4, data={"code": "permission_denied"}
    )
    answer = control.parse_answer(control.encode(control.failure(refusal)))
    assert isinstance(answer, control.Answer)
    assert answer.error is not None
    assert (answer.id, answer.error.number, answer.error.message) == (4, -32001, "no")
    assert answer.error.data == {"code": "permission_denied"}
    assert control.parse_answer(b'{"jsonrpc":"2.0","method":"news"}') is None


@pytest.mark.parametrize(
    "line", [b"x", b"3", b"{}", b'{"result":3}', b'{"method":"progress"}', b"[" * 100_000, b"\xff"]
)
def test_nonsense_from_a_daemon_is_a_value_error(line):
    with pytest.raises(ValueError):  # noqa: PT011 - the type is the contract
        control.parse_answer(line)


def test_importing_it_is_cheap():
    code = (
        "import sys; before = set(sys.modules); import rkvlmd.wire.control;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "['rkvlmd']"
