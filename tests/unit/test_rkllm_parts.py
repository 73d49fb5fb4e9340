"""The pure parts of the RKLLM engine: the record of the cache, prompts, estimates, sampling."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rkvlmd.engine import render, rkllm_defects, rkllm_sampling, sampling
from rkvlmd.engine import rkllm_types as types
from rkvlmd.engine.rkllm_record import Record, differs_at_picture, parts
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import estimate, manifest, prompt, rkllm
from rkvlmd.models.manifest import Tags
from rkvlmd.wire import child
from tests.fakes.laid import one_view
from tests.npusim import folders

# --- the record ------------------------------------------------------------------------------


def test_parts() -> None:
    assert parts("a<image>b<image>", ["x", "y"]) == ("a", "x", "b", "y", "")
    assert parts("", []) == ("",)
    for text, keys in (("a", ["x"]), ("<image>", []), ("<image><image>", ["x"])):
        with pytest.raises(ValueError, match="places <image> for"):
            parts(text, keys)


@pytest.mark.parametrize(
    ("held", "wanted", "differs"),
    [
        (("a",), ("a",), False),
        (("a",), ("b",), False),
        (("a",), ("ab",), False),
        (("ab",), ("a",), False),
        (("",), ("a", "x", ""), False),  # nothing is held
        (("a", "x", "b"), ("a", "x", "bc"), False),
        (("a", "x", "b"), ("a", "x", "c"), False),
        (("a", "x", "b"), ("a", "y", "b"), True),
        (("a", "x", "b"), ("c", "y", "b"), False),  # the text before differs first
        (("a", "x", "b"), ("ab",), True),  # text where a picture is held
        (("ab",), ("a", "x", "b"), True),  # a picture where text is held
        (("a", "x", ""), ("a",), False),  # the prompt ends first
        (("a",), ("a", "x", ""), False),  # the cache ends first
        (("a", "x", "b", "y", "c"), ("a", "x", "b", "z", "c"), True),
        (("a", "x", "b", "y", "c"), ("a", "x", "B", "z", "c"), False),
    ],
)
def test_where_the_first_difference_lies(held: Any, wanted: Any, differs: bool) -> None:
    assert differs_at_picture(held, wanted) is differs


@given(
    st.lists(st.sampled_from(["", "a", "ab", "b"]), min_size=1, max_size=4),
    st.lists(st.sampled_from(["", "a", "ab", "b"]), min_size=1, max_size=4),
    st.lists(st.sampled_from("xy"), min_size=6, max_size=6),
)
def test_the_difference_is_that_of_the_places(first: Any, second: Any, keys: Any) -> None:
    def weave(texts: list[str], shift: int) -> tuple[str, ...]:
        found = [texts[0]]
        for i, text in enumerate(texts[1:]):
            found += [keys[i + shift], text]
        return tuple(found)

    def places(value: tuple[str, ...]) -> list[Any]:
        found: list[Any] = []
        for i, part in enumerate(value):
            found += [("picture", part)] if i % 2 else list(part)
        return found

    held, wanted = weave(first, 0), weave(second, 3)
    a, b = places(held), places(wanted)
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    expected = at is not None and (isinstance(a[at], tuple) or isinstance(b[at], tuple))
    assert differs_at_picture(held, wanted) is expected


def test_a_record_lives() -> None:
    record = Record()
    first, second = ("a", "x", "b"), ("a", "y", "b")
    assert record.empty
    assert not record.must_clear(first, told_apart=False)
    record.holds(first, " and an answer")
    assert not record.empty
    assert not record.must_clear(("a", "x", "b and an answer, then more"), told_apart=False)
    assert record.must_clear(second, told_apart=False)
    assert not record.must_clear(second, told_apart=True)
    record.unknown()
    assert record.must_clear(first, told_apart=True)
    record.cleared()
    assert not record.must_clear(second, told_apart=False)


# --- the prompt ------------------------------------------------------------------------------


def turns(*texts: Any) -> list[dict[str, Any]]:
    roles = ["user", "assistant"]
    return [
        {"role": roles[i % 2], "parts": [{"text": t} if isinstance(t, str) else {"picture": t} for t in part]}
        for i, part in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "m")


def rendered(folder: Path, *texts: Any, count_tokens: bool = True) -> render.Rendered:
    tree = folders.manifest(folder, count_tokens=count_tokens)
    pictures = sum(isinstance(t, int) for part in texts for t in part)
    model = manifest.from_builtins(tree)
    laid = one_view(model, [folders.TOKENS] * pictures)
    return render.render_text(str(folder), model, turns(*texts), laid)


PIECES = [*"<|>imagevdo_ptrs\0\u200b\ufdd0é\n ", "<image>", "<video>", "<|im_end|>"]
HOSTILE = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.lists(st.one_of(HOSTILE, st.just(0)), min_size=1, max_size=5))
def test_places_are_always_as_many_as_pictures(
    tmp_path_factory: pytest.TempPathFactory, content: list[Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile"
    if not folder.exists():
        folders.write(folder)
    pictures = iter(range(9))
    made = rendered(folder, [next(pictures) if part == 0 else part for part in content])
    count = content.count(0)
    assert made.text.count("<image>") == count == len(made.spans)
    assert "<video>" not in made.text
    assert "<audio>" not in made.text
    assert "\0" not in made.text
    # Of special strings there is what the template wrote, and nothing else.
    assert made.text.count("<|im_end|>") == 1
    assert made.text.count("<|im_start|>") == 2
    assert made.text.count("<|vision_start|>") == 0
    assert made.most == len(made.tokens)
    assert sum(t == folders.IDS["<|image_pad|>"] for t in made.tokens) == count * folders.TOKENS


def test_tokens_are_those_of_the_expanded_prompt(folder: Path) -> None:
    made = rendered(folder, ["look ", 0, "there"], ["yes"], [1])
    pads = "<|image_pad|>" * folders.TOKENS
    whole = made.text.replace("<image>", f"<|vision_start|>{pads}<|vision_end|>")
    assert made.tokens == folders.tokenizer().encode(whole).ids
    assert [index for _, _, index, _ in made.spans] == [0, 1]


def test_without_a_tokenizer_the_count_is_an_estimate(folder: Path) -> None:
    exact = rendered(folder, [0, "how many words are there in this question?"])
    made = rendered(folder, [0, "how many words are there in this question?"], count_tokens=False)
    assert made.text == exact.text
    assert made.tokens == []
    assert [(count, index) for _, count, index, _ in made.spans] == [(folders.TOKENS, 0)]
    assert folders.TOKENS + 10 < made.most < len(exact.tokens)


def test_pictures_out_of_order_keep_their_place(folder: Path) -> None:
    made = rendered(folder, [1, "then", 0])
    assert [index for _, _, index, _ in made.spans] == [1, 0]


@pytest.mark.parametrize(
    ("template", "says"),
    [("no place at all", "0 places for 1"),
     (folders.CHATML + " <image>", "<image> where no picture is"),
     (folders.CHATML + " <video>", "<video> where no picture is")],
)  # fmt: skip
def test_templates_that_write_places_of_their_own(folder: Path, template: str, says: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RkvlmdError, match=says) as caught:
        rendered(folder, [0])
    assert caught.value.code == "invalid_model"


def test_marks_of_the_library() -> None:
    tags = Tags(start="<s>", content="<c>", end="</s>")
    one = ["<s>", 0, "</s>"]
    assert prompt.mark_pictures("a [P] b [P]", "[P]", tags, [one, one]) == "a <image> b <image>"
    assert prompt.mark_pictures("nothing", "[P]", tags, []) == "nothing"
    split = ["row 1:<s>", 0, "</s>\n<s>", 1, f"</s>whole {prompt.NUMBER}"]
    marked = prompt.mark_pictures("[P][P]", "[P]", tags, [split, split])
    assert marked == "row 1:<image>\n<image>whole 0row 1:<image>\n<image>whole 1"


def test_tags_where_the_library_cannot_put_them() -> None:
    tags = Tags(start="<s>", content="<c>", end="</s>")
    for layout in ([0], ["<s>", 0, 1, "</s>"], ["</s>", 0, "<s>"]):
        with pytest.raises(prompt.PromptError, match="tags"):
            prompt.mark_pictures("[P]", "[P]", tags, [layout])
    bare = Tags(content="<c>")
    assert prompt.mark_pictures("[P]", "[P]", bare, [["<s>", 0, 1, "</s>"]]) == (
        "<s><image><image></s>"
    )


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("", 0, 0), ("hello", 1, 3), ("the quick brown fox", 4, 8), ("12345", 5, 5), ("你好吗", 3, 3),
     ("\n\n\n", 1, 1), ("    x", 1, 2), ("🙂", 2, 2), ("f(x) = y;", 6, 8)],
)  # fmt: skip
def test_estimates(text: str, least: int, most: int) -> None:
    assert least <= estimate.most_tokens(text) <= most


# --- sampling --------------------------------------------------------------------------------


def order(**fields: Any) -> child.Generate:
    return child.Generate(id=1, tokens=[1], max_tokens=1, **fields)


def test_greedy_is_one_choice() -> None:
    first = rkllm_sampling.convert(order(temperature=0.0, top_k=50, top_p=0.5))
    assert (first.top_k, first.top_p, first.temperature) == (1, 1.0, 1.0)
    assert first == rkllm_sampling.convert(order())
    warm = rkllm_sampling.convert(order(temperature=0.5))
    assert (warm.top_k, warm.temperature) == (rkllm.ALL_TOKENS, 0.5)


#: What the HTTP interface lets through, and the library's fields, of 32 bits, cannot hold.
BEYOND_32_BITS = [
    ({"top_k": (1 << 31) - 1}, "top_k", rkllm.ALL_TOKENS),
    ({"top_k": 1 << 31}, "top_k", rkllm.ALL_TOKENS),
    ({"top_k": (1 << 32) + 1}, "top_k", rkllm.ALL_TOKENS),
    ({"top_k": (1 << 63) - 1}, "top_k", rkllm.ALL_TOKENS),
    ({"top_k": -5}, "top_k", rkllm.ALL_TOKENS),
    ({"top_p": 1e-300}, "top_p", rkllm.LEAST),
    ({"repetition_penalty": 1e-300}, "repeat_penalty", rkllm.LEAST),
    ({"frequency_penalty": 1e-300}, "frequency_penalty", 0.0),
    ({"presence_penalty": -1e-300}, "presence_penalty", 0.0),
]


@pytest.mark.parametrize(("asked", "field", "value"), BEYOND_32_BITS, ids=str)
def test_numbers_fit_the_fields_of_the_library(
    asked: dict[str, Any], field: str, value: float
) -> None:
    terms = types.SamplingParam()
    made = asdict(rkllm_sampling.convert(order(temperature=1.0, **asked)))
    for name in made:
        setattr(terms, name, made[name])
    assert getattr(terms, field) == pytest.approx(value, rel=1e-6)
    assert 0 < terms.top_k <= rkllm.ALL_TOKENS
    assert min(terms.top_p, terms.temperature, terms.repeat_penalty) > 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-50, 9e-5])
def test_a_temperature_that_is_nearly_none_is_greedy(temperature: float) -> None:
    assert rkllm_sampling.convert(order(temperature=temperature)) == rkllm_sampling.convert(order())
    defaults = manifest.Defaults()
    assert rkllm.differences(order(temperature=temperature, top_k=5), defaults) == []
    assert rkllm.differences(order(), manifest.Defaults(temperature=temperature)) == []
    # One bound for all engines.
    assert (rkllm.GREEDY_BELOW, rkllm.LEAST) == (sampling.GREEDY_BELOW, sampling.LEAST)


def test_numbers_that_become_the_same_do_not_differ() -> None:
    warm = manifest.Defaults(temperature=0.5)
    for same in ({"top_k": 1 << 40}, {"frequency_penalty": 1e-300}, {"presence_penalty": 1e-300}):
        assert rkllm.differences(order(temperature=0.5, **same), warm) == []
    tiny = manifest.Defaults(temperature=0.5, top_p=1e-300, repetition_penalty=1e-300)
    low = order(temperature=0.5, top_p=1e-200, repetition_penalty=1e-200)
    assert rkllm.differences(low, tiny) == []


def test_differences() -> None:
    defaults = manifest.Defaults()
    assert rkllm.differences(order(top_k=5, top_p=0.5), defaults) == []  # both greedy
    assert rkllm.differences(order(temperature=0.5, top_k=5), defaults) == ["temperature"]
    warm = manifest.Defaults(temperature=0.5)
    assert rkllm.differences(order(), warm) == ["temperature"]
    assert rkllm.differences(order(temperature=0.5, top_k=5), warm) == ["top_k"]
    assert rkllm.differences(order(presence_penalty=1.0), defaults) == ["presence_penalty"]


def test_parameters_without_effect(folder: Path) -> None:
    tree = json.loads((folder / "rkvlm.json").read_text())
    model = manifest.from_builtins(tree)

    def names(asked: child.Generate, seed: int | None = None, **info: Any) -> list[str]:
        return rkllm.without_effect(model, asked, seed, info)

    assert names(order()) == []
    assert names(order(temperature=1.0, min_p=0.5), 7) == ["seed", "min_p"]
    assert names(order(min_p=0.5)) == []  # greedy
    assert names(order(min_p=0.5, temperature=1e-300)) == []  # greedy, too
    assert names(order(temperature=1.0), sampling_per_request=False) == ["temperature"]
    assert names(order(temperature=1.0), sampling_per_request=True) == []
    tree["decoder"]["runtime_versions"] = ["1.2.3"]
    model = manifest.from_builtins(tree)
    assert names(order(temperature=1.0)) == ["temperature"]
    assert names(order(temperature=1.0), sampling_per_request=True) == []
    tree["decoder"]["engine"] = "onnx"
    model = manifest.from_builtins(tree)
    assert names(order(temperature=1.0, min_p=0.5), 7) == []


# --- known defects ---------------------------------------------------------------------------


def test_every_defect_has_a_source_and_a_version_that_exists() -> None:
    from rkvlmd.engine.rkllm_abi import VERSIONS

    names = [d.name for d in rkllm_defects.DEFECTS]
    assert len(names) == len(set(names))
    for defect in rkllm_defects.DEFECTS:
        assert "#" in defect.source
        assert defect.text.endswith(".")
        assert set(defect.versions) <= set(VERSIONS)
    assert rkllm_defects.has("leaks", "1.3.0", "qwen3_5")
    assert not rkllm_defects.has("leaks", "1.3.1", "qwen3_5")
    assert not rkllm_defects.has("leaks", "1.3.0", "smolvlm")
    assert not rkllm_defects.has("unheard", "1.3.0", "smolvlm")
    assert "one_model" in rkllm_defects.met("1.2.1", "smolvlm")


ADAPTER = {"name": "a", "file": "a.rkllm", "sha256": "0" * 64}

# --- manifests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decoder", "says"),
    [({"cpu_mask": 3}, "decoder.cpu_mask: has 2 CPUs, but decoder.npu_cores is 3"),
     ({"iommu_domain": 16}, "decoder.iommu_domain: must be at most 15"),
     ({"context": 32768}, "decoder.context: must be at most 16384 for rkllm"),
     # These would reach the library as other numbers: its fields have 32 bits.
     ({"cpu_mask": (1 << 40) + 0xF0}, "decoder.cpu_mask: must be at most 0xff, one bit a CPU"),
     ({"n_keep": (1 << 40) + 7}, "decoder.n_keep: must be from -1 to decoder.context"),
     ({"n_keep": -2}, "decoder.n_keep: must be from -1 to decoder.context"),
     ({"adapters": [{**ADAPTER, "scale": 1e300}]}, "decoder.adapters[0].scale: must be from"
      " -1000 to 1000, and not nearer to 0 than 1e-06 unless it is 0"),
     ({"adapters": [{**ADAPTER, "scale": 1e-300}]}, "decoder.adapters[0].scale: must be from"
      " -1000 to 1000, and not nearer to 0 than 1e-06 unless it is 0"),
     ({"prompt_cache": "a <image> b"}, "decoder.prompt_cache: must not hold <image>, which"
      " librkllmrt takes for a picture or sound")],
)  # fmt: skip
def test_manifests_that_cannot_be(folder: Path, decoder: dict[str, Any], says: str) -> None:
    tree = folders.manifest(folder, decoder=decoder)
    with pytest.raises(manifest.ManifestError) as caught:
        manifest.parse(json.dumps(tree).encode())
    assert caught.value.problems == [says]


@pytest.mark.parametrize(
    ("encoder", "says"),
    [({"width": 1 << 40}, "encoders[0].width, .height: must be at most 16384 pixels"),
     ({"core_mask": 1 << 40}, "encoders[0].core_mask: must be at most 0xffff")],
)  # fmt: skip
def test_encoders_that_cannot_be(folder: Path, encoder: dict[str, Any], says: str) -> None:
    tree = folders.manifest(folder)
    tree["encoders"][0] |= encoder
    with pytest.raises(manifest.ManifestError) as caught:
        manifest.parse(json.dumps(tree).encode())
    assert caught.value.problems == [says]


def test_an_rknn_encoder_takes_bytes_channels_last(folder: Path) -> None:
    for key, value in (("baked", False), ("layout", "nchw")):
        tree = folders.manifest(folder)
        tree["encoders"][0][key] = value
        with pytest.raises(manifest.ManifestError, match="baked = true, layout = nhwc"):
            manifest.parse(json.dumps(tree).encode())
