"""The language decoder on ONNX Runtime: cache, abort, ends, errors; tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from rkvlmd.engine import onnx_cache, onnx_decoder
from rkvlmd.engine.onnx_decoder import OnnxDecoder
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child, prefix
from rkvlmd.wire.thinking import Thinking
from tests.fakes import tiny_model

CONTEXT = 300
PROMPT = [0, 40, 50, 60, 70, 80]


@dataclass
class Answer:
    """What one order led to."""

    done: child.GenerateDone
    said: list[Any]
    text: str = field(init=False)
    cached: int = field(init=False)

    def __post_init__(self) -> None:
        self.text = "".join(m.text for m in self.said if isinstance(m, child.Text))
        self.cached = next((m.cached for m in self.said if isinstance(m, child.Prefilled)), -1)


def load(folder: Path, *, keep: int = 0, **changes: Any) -> OnnxDecoder:
    made = manifests.parse((folder / manifests.FILE).read_bytes())
    tree = manifests.to_builtins(made)
    for key, value in changes.items():
        if isinstance(value, dict):
            tree[key] |= value
        else:
            tree[key] = value
    decoder = OnnxDecoder()
    options = {"threads": 1, "conversations_bytes": keep}
    decoder.load(child.Load(folder=str(folder), manifest=tree, options=options), lambda *_: None)
    return decoder


def ask(
    decoder: OnnxDecoder,
    tokens: list[int],
    rows: list[np.ndarray] | None = None,
    spans: list[tuple[int, int, str]] | None = None,
    hear: Callable[[Any], None] = lambda _: None,
    **fields: Any,
) -> Answer:
    said: list[Any] = []

    def say(message: Any) -> None:
        said.append(message)
        hear(message)

    order = child.Generate(
        id=5,
        tokens=tokens,
        spans=[child.Span(start=s, count=c, key=k) for s, c, k in spans or []],
        **{"max_tokens": 12} | fields,
    )
    return Answer(decoder.generate(order, rows or [], say), said)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind in ("plain", "gqa"):
        tiny_model.make_model(root / kind, attention=kind, context=CONTEXT)
    return {kind: root / kind for kind in ("plain", "gqa")}


@pytest.fixture(params=["plain", "gqa"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def decoder(folder: Path) -> OnnxDecoder:
    return load(folder, stop_ids=[])


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.5, (4, 64)).astype(np.float32)


def test_an_answer_is_prefilled_then_one_text_a_token_then_the_end(decoder: OnnxDecoder) -> None:
    answer = ask(decoder, PROMPT)
    assert isinstance(answer.said[0], child.Prefilled)
    assert (answer.said[0].prompt, answer.cached) == (len(PROMPT), 0)
    assert [m.tokens for m in answer.said[1:]] == [1] * 12
    assert (answer.done.reason, answer.done.completion) == ("length", 12)
    assert all(m.id == 5 for m in [*answer.said, answer.done])


def test_both_layouts_give_the_same_text(folders: dict[str, Path]) -> None:
    texts = {ask(load(f, stop_ids=[]), PROMPT, max_tokens=30).text for f in folders.values()}
    assert len(texts) == 1


def test_the_cache_changes_nothing_but_the_count(folder: Path, decoder: OnnxDecoder) -> None:
    def fresh(tokens: list[int]) -> str:
        return ask(load(folder, stop_ids=[]), tokens).text

    longer = [*PROMPT, 90, 100, 110]
    other = [*PROMPT[:3], 7, 8, 9, 10]
    for tokens, cached in (
        (PROMPT, 0),
        (longer, len(PROMPT)),
        (other, 3),
        (other, len(other) - 1),
        (PROMPT[:2], 1),
        ([33, *PROMPT], 0),
    ):
        answer = ask(decoder, tokens)
        assert (answer.cached, answer.text) == (cached, fresh(tokens)), tokens


def test_the_next_turn_reuses_the_answer(decoder: OnnxDecoder) -> None:
    ask(decoder, PROMPT)
    answered = [p for p in decoder._record if isinstance(p, int)]
    # The twelfth token was said, but nothing was computed after it.
    assert len(answered) == len(PROMPT) + 11
    assert ask(decoder, [*answered, 5, 6]).cached == len(answered)


def test_pictures_are_told_apart_by_their_key(folder: Path, decoder: OnnxDecoder) -> None:
    tokens = [0, 40, 2, 2, 2, 2, 50]
    first = ask(decoder, tokens, [picture(1)], [(2, 4, "one")])
    second = ask(decoder, tokens, [picture(2)], [(2, 4, "two")])
    assert second.cached == 2
    assert second.text != first.text
    assert second.text == ask(
        load(folder, stop_ids=[]), tokens, [picture(2)], [(2, 4, "two")]
    ).text  # fmt: skip
    again = ask(decoder, [*tokens[:6], 51], [picture(2)], [(2, 4, "two")])
    assert again.cached == 6


def test_rows_go_to_their_places_across_chunks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [0, 40, 2, 2, 2, 2, 50, 2, 2, 2, 2, 60]
    rows, spans = [picture(1), picture(2)], [(2, 4, "one"), (7, 4, "two")]
    whole = ask(load(folder, stop_ids=[]), tokens, rows, spans)
    monkeypatch.setattr(onnx_decoder, "CHUNK", 3)
    assert ask(load(folder, stop_ids=[]), tokens, rows, spans).text == whole.text
    turned = ask(load(folder, stop_ids=[]), tokens, rows[::-1], spans)
    assert turned.text != whole.text


def test_a_stop_id_ends_the_answer_and_is_not_counted(folder: Path) -> None:
    decoder = load(folder, stop_ids=[])
    ask(decoder, PROMPT)
    third = decoder._record[len(PROMPT) + 2]
    answer = ask(load(folder, stop_ids=[319, third]), PROMPT)
    assert (answer.done.reason, answer.done.completion) == ("stop", 2)
    assert len(answer.said) == 3


def test_tags_of_thoughts_are_shown_even_where_they_are_special_tokens(folder: Path) -> None:
    made = manifests.parse((folder / manifests.FILE).read_bytes())
    first, second, *_ = tiny_model.SPECIALS
    tags = manifests.Thinking(start=first, end=second)
    hidden = onnx_decoder._open_vocabulary(folder, made)
    shown = onnx_decoder._open_vocabulary(folder, msgspec.structs.replace(made, thinking=tags))
    ids = {hidden.tokenizer.token_to_id(tag) for tag in (first, second)}
    assert hidden.special - shown.special == ids


def test_a_stop_string_ends_the_answer_before_it(decoder: OnnxDecoder) -> None:
    whole = ask(decoder, PROMPT, max_tokens=30).text
    stop = whole[6:9]
    answer = ask(decoder, PROMPT, max_tokens=30, stop=["never", stop])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.done.reason == "stop"
    assert answer.done.completion < 30
    # Thoughts are no answer.
    thinking = Thinking(start="<think>", end="</think>", opened=True)
    answer = ask(decoder, PROMPT, max_tokens=30, stop=[stop], thinking=thinking)
    assert (answer.text, answer.done.reason) == (whole, "length")


def test_text_that_was_held_back_comes_out_at_the_end(folder: Path, decoder: OnnxDecoder) -> None:
    whole = ask(decoder, PROMPT, max_tokens=8).text
    held = ask(decoder, PROMPT, max_tokens=8, stop=[whole[-2:] + "\0"])
    assert (held.text, held.done.reason) == (whole, "length")
    # The same where an end-of-text token follows: this text has no token of its own.
    ask(decoder, PROMPT, max_tokens=12)
    answer = decoder._record[len(PROMPT) :]
    at = next(i for i in range(4, 11) if answer[i] not in answer[:i])
    plain = ask(load(folder, stop_ids=[answer[at]]), PROMPT)
    last = plain.text[-1] + "\0"
    ended = ask(load(folder, stop_ids=[answer[at]]), PROMPT, stop=[last])
    assert ended.text == plain.text
    assert [m.tokens for m in ended.said[1:]] == [1] * at + [0]
    assert ended.done.completion == at


def test_max_tokens_is_clamped_to_what_the_context_leaves(decoder: OnnxDecoder) -> None:
    tokens = [10 + i % 200 for i in range(CONTEXT - 3)]
    answer = ask(decoder, tokens, max_tokens=50)
    assert (answer.done.reason, answer.done.completion) == ("length", 3)
    full = ask(decoder, [*tokens, 1, 2, 3])
    assert (full.done.reason, full.done.completion) == ("length", 0)
    with pytest.raises(RkvlmdError, match=rf"{CONTEXT} tokens.*{CONTEXT + 1}") as caught:
        ask(decoder, [1] * (CONTEXT + 1))
    assert caught.value.code == "context_length_exceeded"
    assert ask(decoder, tokens, max_tokens=1).cached == len(tokens) - 1


def test_same_seed_same_text(decoder: OnnxDecoder) -> None:
    hot = {"temperature": 1.5, "top_p": 0.95, "seed": 11, "max_tokens": 20}
    ask(decoder, PROMPT, max_tokens=1)
    texts = {ask(decoder, PROMPT, **hot).text for _ in range(3)}
    assert len(texts) == 1
    assert ask(decoder, PROMPT, **hot | {"seed": 12}).text not in texts


def test_an_abort_between_tokens_keeps_what_was_computed(
    folder: Path, decoder: OnnxDecoder
) -> None:
    heard: list[Any] = []

    def hear(message: Any) -> None:
        heard.append(message)
        if len(heard) == 4:
            decoder.abort()

    answer = ask(decoder, PROMPT, hear=hear)
    assert (answer.done.reason, answer.done.completion) == ("aborted", 3)
    again = ask(decoder, [*PROMPT, 77])
    assert again.cached == len(PROMPT)
    assert again.text == ask(load(folder, stop_ids=[]), [*PROMPT, 77]).text
    assert again.done.reason == "length"


class AbortingGraph:
    """A graph that calls for an abort just before its ``at``-th step."""

    def __init__(self, decoder: OnnxDecoder, at: int) -> None:
        self.inner, self.decoder, self.left = decoder._graph, decoder, at

    @property
    def length(self) -> int:
        return self.inner.length

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)

    def step(self, embeds: np.ndarray, run: ort.RunOptions, **rest: Any) -> np.ndarray:
        self.left -= 1
        if self.left == 0:
            self.decoder.abort()
        return self.inner.step(embeds, run, **rest)


def test_an_abort_inside_a_prefill_ends_it_and_the_cache_stays_true(
    folder: Path, decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_decoder, "CHUNK", 4)
    tokens = list(range(10, 30))
    graph = decoder._graph
    decoder._graph = AbortingGraph(decoder, at=3)
    answer = ask(decoder, tokens)
    assert (answer.done.reason, answer.done.completion, answer.said) == ("aborted", 0, [])
    decoder._graph = graph
    again = ask(decoder, tokens)
    assert again.cached == 8
    assert again.text == ask(load(folder, stop_ids=[]), tokens).text


def test_an_error_clears_the_cache(decoder: OnnxDecoder) -> None:
    ask(decoder, PROMPT)

    def deaf(_: Any) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        ask(decoder, PROMPT, hear=deaf)
    assert ask(decoder, PROMPT).cached == 0


def test_a_failing_run_is_an_engine_error_without_the_librarys_words(
    decoder: OnnxDecoder, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken(AbortingGraph):
        def step(self, embeds: np.ndarray, run: ort.RunOptions, **rest: Any) -> np.ndarray:
            return self.inner.step(embeds[..., :-1], run, **rest)

    graph, decoder._graph = decoder._graph, Broken(decoder, 0)
    with pytest.raises(RkvlmdError) as caught:
        ask(decoder, PROMPT)
    assert (caught.value.code, caught.value.message) == (
        "engine_error",
        "The language decoder failed.",
    )
    assert "inputs_embeds" in capfd.readouterr().err
    decoder._graph = graph
    assert ask(decoder, PROMPT).done.completion == 12


def test_rows_that_are_no_numbers_are_an_engine_error(decoder: OnnxDecoder) -> None:
    with pytest.raises(RkvlmdError, match="not a number"):
        ask(decoder, [0, 2, 2, 2, 2, 9], [picture(1) * np.nan], [(1, 4, "x")])
    assert ask(decoder, PROMPT).cached == 0


@pytest.mark.parametrize(
    ("tokens", "rows", "spans"),
    [
        ([], [], []),
        ([1, 320], [], []),
        ([1, 2, 2, 2, 2], [], [(1, 4, "x")]),
        ([1, 2, 2, 2, 2], [picture(1)[:3]], [(1, 4, "x")]),
        ([1, 2, 2, 2, 2], [picture(1)[:, :32]], [(1, 4, "x")]),
        ([1, 2, 2, 2, 2], [picture(1)], [(2, 4, "x")]),
    ],
)
def test_an_order_that_does_not_fit_is_an_engine_error(
    decoder: OnnxDecoder, tokens: list[int], rows: list[Any], spans: list[Any]
) -> None:
    with pytest.raises(RkvlmdError) as caught:
        ask(decoder, tokens, rows, spans)
    assert caught.value.code == "engine_error"


def test_keys_and_values_stay_in_the_runtime(
    decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[Any] = []
    numpy, from_numpy = ort.OrtValue.numpy, ort.OrtValue.ortvalue_from_numpy

    def out(self: ort.OrtValue) -> np.ndarray:
        shapes.append(tuple(self.shape()))
        return numpy(self)

    def back(array: np.ndarray, *rest: Any) -> ort.OrtValue:
        shapes.append(array.shape)
        return from_numpy(array, *rest)

    monkeypatch.setattr(ort.OrtValue, "numpy", out)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", staticmethod(back))
    ask(decoder, PROMPT)
    ask(decoder, PROMPT[:4])
    assert shapes
    assert all(len(s) < 4 for s in shapes), "a cache has four dimensions"


def test_the_shared_cache_is_one_buffer(folders: dict[str, Path]) -> None:
    decoder = load(folders["gqa"], stop_ids=[])
    graph = decoder._graph
    assert isinstance(graph, onnx_cache.SharedGraph)
    before = [b.data_ptr() for b in graph._buffers]
    ask(decoder, PROMPT)
    bound = graph._binding.get_outputs()
    assert [v.data_ptr() for v in bound if len(v.shape()) == 4] == before


def test_ready_says_what_was_loaded(folder: Path) -> None:
    tree = manifests.to_builtins(manifests.parse((folder / manifests.FILE).read_bytes()))
    told: list[Any] = []
    order = child.Load(folder=str(folder), manifest=tree, options={"threads": 1})
    info = OnnxDecoder().load(order, lambda *progress: told.append(progress))
    assert info["libraries"] == {"onnxruntime": ort.__version__}
    assert info["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 4
    assert (info["context"], info["embedding"], info["vocabulary"]) == (CONTEXT, 64, 320)
    assert [f for f, _ in told] == sorted(f for f, _ in told)


# --- several conversations -------------------------------------------------------------------


def test_conversations_that_take_turns_are_not_computed_again(folder: Path) -> None:
    """Sixteen of them, with a beginning in common and a picture each: as if each was alone."""
    decoder, plain = load(folder, keep=64 << 20, stop_ids=[]), load(folder, stop_ids=[])
    common = [0, 40, 41, 42]
    chats = {n: [*common, 2, 2, 2, 2, 60 + n] for n in range(16)}
    for turn in range(3):
        for n, tokens in chats.items():
            rows, spans = [picture(n)], [(4, 4, f"picture {n}")]
            before = len(decoder._record)
            answer = ask(decoder, tokens, rows, spans)
            plain._kept.clear()
            assert answer.text == ask(plain, tokens, rows, spans).text
            expected = len(tokens) - 4 if turn else len(common) * (n > 0)
            assert answer.cached == expected, (turn, n, before)
            said = [p for p in decoder._record[len(tokens) :] if isinstance(p, int)]
            # The new turn: the last token of the answer, which nothing was computed after, and 3.
            chats[n] = [*tokens, *said, 70, 71, 72, 73]
            assert answer.done.held == list(
                prefix.of_tokens(
                    [*tokens, *said], [child.Span(start=4, count=4, key=f"picture {n}")]
                )
            )
    assert len(decoder._kept) == 16


def test_the_budget_of_the_caches_holds(folder: Path) -> None:
    decoder = load(folder, stop_ids=[])
    size = decoder._shape.bytes_per_token
    decoder = load(folder, keep=100 * size, stop_ids=[])
    alive: set[int] = set()
    for n in range(12):
        done = ask(decoder, [60 + n, *range(30)], max_tokens=10).done
        alive = (alive | {done.conversation}) - set(done.forgot)
        assert decoder._kept.kept_bytes <= 100 * size
        assert len(alive) == len(decoder._kept)
    assert 2 < len(decoder._kept) < 6
    # The last ones are there, the first one is not.
    assert ask(decoder, [71, *range(30)]).cached == 30
    assert ask(decoder, [70, *range(30)]).cached == 30
    assert ask(decoder, [60, *range(30)]).cached == 0


def test_an_error_costs_the_conversation_in_hand_alone(folder: Path) -> None:
    decoder = load(folder, keep=64 << 20, stop_ids=[])
    ask(decoder, PROMPT)
    ask(decoder, [90, *PROMPT], max_tokens=2)

    def deaf(_: Any) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        ask(decoder, [90, *PROMPT], hear=deaf)
    assert ask(decoder, [90, *PROMPT]).cached == 0
    assert ask(decoder, PROMPT).cached == len(PROMPT) - 1


def test_a_conversation_takes_the_memory_of_its_places_and_gives_it_back(
    folders: dict[str, Path],
) -> None:
    """Buffers for a whole context each, of which a page a head is touched."""
    decoder = load(folders["gqa"], keep=1 << 30, stop_ids=[])
    shape = decoder._shape
    graph = onnx_cache.SharedGraph(decoder._graph._session, shape, 200_000)  # type: ignore[attr-defined]
    embeds, _ = decoder._embed_tokens([1])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    graph.step(embeds, ort.RunOptions(), logits=True)
    before = resident()
    kept = [graph.fork(1) for _ in range(20)]
    whole = 200_000 * shape.bytes_per_token
    assert resident() - before < whole
    kept[0].step(embeds, ort.RunOptions(), logits=True)
    kept.clear()
