"""``rkvlm.json``: what is wrong with a manifest is said with its key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rkvlmd.errors import ManifestError
from rkvlmd.models import manifest
from tests.fakes.models import tree

Edit = Callable[[dict[str, Any]], object]


def parse(value: Any) -> manifest.Manifest:
    return manifest.parse(json.dumps(value).encode(), "folder")


def problems(value: Any) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse(value)
    return caught.value.problems


def rkllm() -> dict[str, Any]:
    """Return a manifest for the NPU: no tokenizer, no template."""
    built = tree()
    built["decoder"] |= {
        "engine": "rkllm",
        "files": {"model": {"file": "model.rkllm", "sha256": "0" * 64}},
        "lease": "npu",
    }
    del built["tokenizer"], built["template"]
    return built


def test_a_right_manifest() -> None:
    m = parse(tree())
    assert m.name == "model"
    assert m.encoders[0].resize == manifest.Resize()
    assert list(manifest.files(m)) == [
        "encoders[0]",
        "decoder.files.embed",
        "decoder.files.decoder",
        "tokenizer",
        "template",
    ]
    assert parse(rkllm()).tokenizer is None


def test_there_and_back() -> None:
    m = parse(tree())
    built = json.loads(json.dumps(manifest.to_builtins(m)))
    assert manifest.from_builtins(built) == m


def test_digest_changes_with_everything_that_is_said() -> None:
    base = manifest.digest(parse(tree()))
    assert manifest.digest(parse(dict(reversed(tree().items())))) == base
    other = tree()
    other["encoders"][0]["sha256"] = "0" * 64
    assert manifest.digest(parse(other)) != base
    encoder = parse(tree()).encoders[0]
    assert manifest.preparation_key(encoder) != manifest.preparation_key(parse(other).encoders[0])
    assert manifest.preparation_key(encoder) == manifest.preparation_key(
        parse(tree(name="other")).encoders[0]
    )


def test_thinking_needs_tags_that_can_be_told_apart() -> None:
    assert parse(tree(thinking={}, capabilities=["thinking"])).thinking == manifest.Thinking()
    for built in (tree(thinking={}), tree(capabilities=["thinking"])):
        assert any(p.startswith("thinking:") for p in problems(built))
    for start, end in (("<t>", "<t>"), ("<t>", "a<t>"), ("<t>a", "<t>")):
        built = tree(thinking={"start": start, "end": end}, capabilities=["thinking"])
        assert any(p.startswith("thinking.start") for p in problems(built))
    for tag in ("", "x" * 65):
        assert problems(tree(thinking={"start": tag}, capabilities=["thinking"]))


# --- the shape -------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside ``value``."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in inner:
        found.append((*path, key))
        if isinstance(child, (dict, list)):
            found += places(child, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new
    return value


FULL: dict[str, Any] = json.loads(json.dumps(manifest.to_builtins(parse(tree()))))
FULL["decoder"]["embed_flash"] = True  # where the default is null, true would be right
FULL["defaults"]["enable_thinking"] = True


@pytest.mark.parametrize("path", places(FULL), ids=lambda p: ".".join(map(str, p)))
def test_every_wrong_type_is_refused(path: tuple[Any, ...]) -> None:
    for wrong in ({"unheard": 1}, [["unheard"]], True, -1.5):
        built = json.loads(json.dumps(FULL))
        before = built
        for key in path:
            before = before[key]
        if isinstance(before, bool) and wrong is True:
            continue
        if isinstance(before, float) and path[-2:-1] == ("mean",) and wrong == -1.5:
            continue
        if path[:2] == ("defaults", path[-1]) and wrong == -1.5 and "penalty" in path[-1]:
            continue
        put(built, path, wrong)
        assert problems(built)


REQUIRED = [
    ("schema",), ("name",), ("family",), ("decoder",), ("encoders", 0, "engine"),
    ("encoders", 0, "file"), ("encoders", 0, "sha256"), ("encoders", 0, "width"),
    ("encoders", 0, "height"), ("encoders", 0, "tokens"), ("encoders", 0, "embedding"),
    ("decoder", "engine"), ("decoder", "files"), ("decoder", "context"), ("decoder", "embedding"),
    ("tokenizer", "file"), ("tokenizer", "sha256"), ("image", "content"),
]  # fmt: skip


@pytest.mark.parametrize("path", REQUIRED, ids=lambda p: ".".join(map(str, p)))
def test_missing_keys(path: tuple[Any, ...]) -> None:
    built = tree()
    value: Any = built
    for key in path[:-1]:
        value = value[key]
    del value[path[-1]]
    (problem,) = problems(built)
    assert path[-1] in problem


@pytest.mark.parametrize("path", [(), ("encoders", 0), ("decoder",), ("image",), ("tokenizer",)])
def test_unknown_keys(path: tuple[Any, ...]) -> None:
    built = tree()
    put(built, (*path, "unheard_of"), 1)
    (problem,) = problems(built)
    assert "unheard_of" in problem


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2), (("schema",), "1"), (("name",), ""), (("name",), "../x"),
        (("name",), "a b"), (("name",), "a" * 65), (("name",), "-a"), (("name",), "a\n"),
        (("encoders", 0, "engine"), "tflite"), (("encoders", 0, "sha256"), "0" * 63),
        (("encoders", 0, "sha256"), "A" * 64), (("encoders", 0, "width"), 0),
        (("encoders", 0, "tokens"), -1), (("encoders", 0, "colour"), "cmyk"),
        (("encoders", 0, "mean"), [0.5, 0.5]), (("encoders", 0, "lease"), "gpu"),
        (("decoder", "engine"), "gguf"), (("decoder", "context"), 0), (("decoder", "context"), 1.5),
        (("capabilities",), ["telepathy"]), (("stop_ids",), [-1]),
        (("defaults",), {"temperature": 2.1}), (("defaults",), {"top_p": 0}),
        (("defaults",), {"repetition_penalty": 0}), (("defaults",), {"max_tokens": 0}),
    ],
)  # fmt: skip
def test_wrong_values(path: tuple[Any, ...], value: Any) -> None:
    built = tree()
    put(built, path, value)
    assert problems(built)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest.parse(data, "folder")
    assert caught.value.name == "folder"
    assert caught.value.problems


@pytest.mark.parametrize(
    "data",
    [b"", b"[" * 100_000, b'{"name":"\xed\xa0\x80"}', b" " * (manifest.MAX_BYTES + 1), b"{}{}"],
    ids=["empty", "deep", "not UTF-8", "big", "two"],
)
def test_hostile_bytes(data: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest.parse(data, "folder")


# --- what the values say about each other ----------------------------------------------


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/../../b", "..", "", "a/.."])
@pytest.mark.parametrize(
    "path",
    [
        ("encoders", 0, "file"),
        ("decoder", "files", "embed", "file"),
        ("decoder", "files", "decoder", "file"),
        ("tokenizer", "file"),
        ("template", "file"),
    ],
    ids=lambda p: ".".join(map(str, p)),
)
def test_files_lie_inside_the_folder(path: tuple[Any, ...], name: str) -> None:
    built = tree()
    put(built, path, name)
    (problem,) = problems(built)
    assert problem.endswith(": must lie inside the model folder")


def test_files_may_lie_in_folders_of_the_folder() -> None:
    built = tree()
    built["tokenizer"]["file"] = "text/tokenizer.json"
    parse(built)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.pop("image"), "image: a model with encoders needs the tags of a picture"),
        (
            lambda t: t["encoders"][0].update(embedding=33),
            "encoders[0].embedding: 33, but decoder.embedding is 32",
        ),
        (lambda t: t["encoders"][0].update(std=[1, 0, 1]), "encoders[0].std: must be above 0"),
        (lambda t: t["encoders"][0].update(std=[1, 1, -1]), "encoders[0].std: must be above 0"),
        (
            lambda t: t["encoders"][0].update(tokens=512),
            "encoders[0].tokens: do not fit decoder.context",
        ),
        (
            lambda t: t["encoders"][0].update(resize={"fill": [0, 0, 256]}),
            "encoders[0].resize.fill: must be at most 255",
        ),
        (lambda t: t["decoder"]["files"].pop("embed"), "decoder.files: missing embed"),
        (
            lambda t: t["decoder"].update(files={"model": {"file": "a", "sha256": "0" * 64}}),
            "decoder.files: missing decoder, embed",
        ),
        (lambda t: t.pop("tokenizer"), "tokenizer: needed by the onnx engine"),
        (lambda t: t.pop("template"), "template: needed by the onnx engine"),
        (lambda t: t.update(encoders=[]), "capabilities: image without an encoder"),
    ],
)
def test_values_that_do_not_go_together(edit: Edit, expected: str) -> None:
    built = tree()
    edit(built)
    assert problems(built) == [expected]


def test_rkllm_needs_its_model() -> None:
    built = rkllm()
    built["decoder"]["files"] = tree()["decoder"]["files"]
    assert problems(built) == ["decoder.files: missing model"]


def test_all_problems_at_once() -> None:
    built = tree()
    built["encoders"].append({**built["encoders"][0], "embedding": 1, "tokens": 9999, "file": "/x"})
    del built["template"]
    with pytest.raises(ManifestError) as caught:
        parse(built)
    assert caught.value.name == "model"
    assert [p.partition(":")[0] for p in caught.value.problems] == [
        "encoders[1].file",
        "encoders[1].embedding",
        "encoders[1].tokens",
        "template",
    ]


def test_file_problems(tmp_path: Path) -> None:
    m = parse(tree())
    for named in manifest.files(m).values():
        (tmp_path / named.file).write_bytes(b"x")
    assert manifest.file_problems(m, tmp_path) == []
    (tmp_path / "vision.onnx").write_bytes(b"")
    (tmp_path / "embed.onnx").unlink()
    (tmp_path / "template.jinja").unlink()
    (tmp_path / "template.jinja").mkdir()
    assert manifest.file_problems(m, tmp_path) == [
        "encoders[0].file: vision.onnx is empty",
        "decoder.files.embed.file: embed.onnx is missing",
        "template.file: template.jinja is missing",
    ]


# --- how pictures are cut -----------------------------------------------------------------

PATCHES = {"size": 14, "temporal": 2, "merge": 2}
ASPECT = {"rule": "aspect", "multiple": 28, "min_pixels": 3136, "max_pixels": 200704}


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        ({"resize": ASPECT, "tokens": 256, "patches": PATCHES}, None),
        ({"resize": ASPECT, "tokens": 255, "patches": PATCHES}, "tokens: must be at least 256"),
        ({"resize": {**ASPECT, "multiple": 30}, "tokens": 256, "patches": PATCHES},
         "patches: the sides must be multiples of 28 pixels"),
        ({"resize": {"rule": "aspect"}}, "aspect needs all three"),
        ({"resize": {**ASPECT, "min_pixels": 300_000}}, "aspect needs all three"),
        ({"resize": {"multiple": 14}}, "resize.multiple: means nothing to stretch"),
        ({"resize": {"rule": "tiles", "min_tiles": 3, "max_tiles": 2}}, "must be in order"),
        ({"resize": {"rule": "tiles", "max_tiles": 65}}, "at most 64"),
        ({"resize": {"rule": "split", "longest": 64}}, None),
        ({"resize": {"rule": "split"}}, "resize.longest: must make 1 to 64"),
        ({"resize": {"rule": "split", "longest": 10**6}}, "resize.longest: must make 1 to 64"),
        ({"resize": {"rule": "split", "longest": 640}, "height": 9}, "squares"),
        ({"resize": {"rule": "crop", "short": 1}}, "resize.short: must be at least"),
        ({"resize": {"rule": "base_tiles"}}, "base_tiles needs an encoder with tile = true"),
        ({"tile": True}, "one at least must take whole pictures"),
        ({"tile": True, "resize": {"rule": "tiles"}}, "tile: such an encoder cuts nothing"),
        ({"patches": PATCHES, "width": 30, "height": 28, "tokens": 1}, "multiples of 28"),
        ({"patches": PATCHES, "width": 56, "height": 56, "tokens": 4, "baked": True},
         "patches: are floats"),
        ({"resize": {"rule": "slices", "multiple": 14}, "engine": "rknn", "baked": True,
          "layout": "nhwc"}, "an rknn encoder has one size"),
    ],
)  # fmt: skip
def test_rules_and_their_numbers(encoder: dict[str, Any], expected: str | None) -> None:
    built = tree()
    built["encoders"][0] |= {"width": 16, "height": 16, **encoder}
    if expected is None:
        assert parse(built).encoders[0].tokens
    else:
        assert any(expected in problem for problem in problems(built)), problems(built)


def test_what_the_library_cannot_lay_out() -> None:
    built = rkllm()
    tags, (encoder,) = built["image"], built["encoders"]
    encoder["resize"] = {"rule": "tiles", "max_tiles": 4}
    tags |= {"start": "<s>", "end": "</s>"}
    assert any("must be empty for tiles with rkllm" in problem for problem in problems(built))
    built["image"] = {"content": tags["content"]}
    assert parse(built).encoders[0].resize.max_tiles == 4
    encoder["resize"]["rule"] = "base_tiles"
    tile = {**encoder, "tile": True, "tokens": encoder["tokens"] + 1, "resize": {}}
    built["encoders"] = [encoder, tile]
    assert any("as many tokens of a tile" in problem for problem in problems(built))
    tile["tokens"] = encoder["tokens"]
    assert len(parse(built).encoders) == 2
