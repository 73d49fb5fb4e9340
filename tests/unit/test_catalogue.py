"""The catalogue: its files, and which model a folder of published files holds."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkvlmd.ctl import placing
from rkvlmd.errors import ManifestError
from rkvlmd.models import building, families, manifest, published, templates, views
from rkvlmd.models.building import Parts, Text
from rkvlmd.models.matching import Candidate, Folder, Tower, by_config, choose, hints, judge
from rkvlmd.models.templates import Template
from tests.house.tree import PACKAGE, ROOT
from tests.parity.cases import CASES, Case

CATALOGUE, BROKEN = templates.load([ROOT / "etc" / "models.d"])
EVERY = pytest.mark.parametrize("template", CATALOGUE.values(), ids=list(CATALOGUE))
#: What must be there.
WANTED = {
    "qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "qwen3-vl-4b", "qwen3.5-0.8b", "qwen3.5-2b",
    "internvl3-1b", "internvl3-2b", "internvl3.5-1b", "internvl3.5-2b", "smolvlm-256m", "smolvlm-500m", "smolvlm2-256m",
    "smolvlm2-500m", "internvl3-1b-tiles", "internvl3.5-1b-tiles", "deepseek-ocr", "deepseek-ocr-tiles", "minicpm-v-2.6", "minicpm-v-2.6-slices", "janus-pro-1b", "gemma3-4b", "gemma3n-e2b",
    "clip-vit-base-patch32", "clip-vit-large-patch14", "gemma4-e2b", "fastvlm-0.5b", "llava-1.5-7b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b",
}  # fmt: skip


def digest(file: str) -> str:
    return f"{len(file):064x}"


def tower(template: Template, engine: str = "rknn", size: tuple[int, int] | None = None) -> Tower:
    """Return the encoder that a template describes."""
    match = template.match
    assert match.tokens is not None
    width, height = size or match.sizes[0]
    return Tower(
        file="vision." + engine, engine="rknn" if engine == "rknn" else "onnx", width=width,
        height=height, tokens=match.tokens.of(width, height), embedding=match.embedding,
        outputs=match.outputs,
    )  # fmt: skip


def parts(template: Template, engine: str) -> Parts:
    """Return the files of a whole model."""
    npu = engine == "npu"
    towers: tuple[Tower, ...] = ()
    if template.match.tokens is not None:
        made = tower(template, "rknn" if npu else "onnx")
        tile = template.match.tile
        # A published ONNX encoder leaves its sizes open.
        towers = (made if npu else replace(made, width=None, height=None, tokens=None),)
        towers += (tower(template, size=tile),) if tile else ()
    known = template.known(engine)
    special = {text: i for i, text in enumerate(known.get("special_strings", ()))}
    npu_files = {"model": "a.rkllm", "embed": "embed.npy"}
    onnx_files = {"embed": "e.onnx", "decoder": "d.onnx"}
    if template.family == "clip":
        onnx_files = {"text": "t.onnx"}
    return Parts(
        decoder=npu_files if npu else onnx_files,
        towers=towers,
        text=Text("tokenizer.json", special, "chat_template.jinja"),
        longest=77 if template.family == "clip" else 32768,
        context=None,
        outputs=("logits", "hidden_states"),
    )


def test_every_model_is_there() -> None:
    assert not BROKEN
    assert set(CATALOGUE) == WANTED


@EVERY
def test_a_file_has_the_name_of_its_model(template: Template) -> None:
    assert (ROOT / "etc" / "models.d" / f"{template.model}.json").is_file()
    assert template.family in families.known()


@EVERY
def test_each_engine_makes_a_valid_manifest(template: Template) -> None:
    engines = template.engines()
    for engine, needs in (("npu", "rkllm"), ("onnx", "onnx")):
        if needs not in engines:
            continue
        tree, _ = building.build(template, "x", parts(template, engine), digest)
        made = placing.check(tree)  # parses it, by the rules of rkvlm.json
        assert made.family == template.family
        assert made.decoder.runtime_versions == (
            template.versions("rkllm") if engine == "npu" else ()
        )
        if template.match.tokens is not None:
            assert made.encoders[0].tokens < made.decoder.context
            plan = views.plan(made, 640, 480)
            assert plan.tokens < made.decoder.context
            assert "image" in made.capabilities


@EVERY
def test_sources_and_doubts_are_about_keys_that_are_there(template: Template) -> None:
    keys = templates.leaves(template) | {"match.names", "match.model_types", "match.multiple"}
    for said in (*template.sources, *template.unverified):
        assert any(key == said or key.startswith(f"{said}.") for key in keys), said
    assert all(text.strip() for text in template.sources.values())
    # A source for all, and a doubt about a part of it, would be read as certain.
    assert not set(template.sources) & set(template.unverified)


@EVERY
def test_a_value_without_a_source_is_refused(template: Template) -> None:
    tree = json.loads((ROOT / "etc" / "models.d" / f"{template.model}.json").read_bytes())
    tree["manifest"]["video_frames"] = 9
    with pytest.raises(ManifestError, match=r"video_frames: has no source, and is not listed"):
        templates.parse(json.dumps(tree).encode(), template.model)


@EVERY
def test_every_model_says_of_what_it_makes_embeddings(template: Template) -> None:
    how = template.manifest["embeddings"]
    assert "embeddings" in template.manifest["capabilities"]
    assert ("image" in how["inputs"]) == (template.match.tokens is not None)
    # Only CLIP was trained for it; nobody has seen hidden states of the others on a board.
    assert how.get("trained", False) == (template.family == "clip")
    assert ("npu.embeddings.inputs" in template.unverified) == ("rkllm" in template.engines())
    if template.family != "clip":
        # The last token of a causal decoder alone has seen the whole input.
        assert how["pool"] == "last"


@EVERY
def test_states_that_no_file_gives_are_not_promised(template: Template) -> None:
    if "onnx" not in template.engines() or template.family == "clip":
        return
    for outputs in ((), ("logits",)):
        silent = replace(parts(template, "onnx"), outputs=outputs)
        made = placing.check(building.build(template, "x", silent, digest)[0])
        assert made.embeddings is None
        assert "embeddings" not in made.capabilities
    made = placing.check(building.build(template, "x", parts(template, "onnx"), digest)[0])
    assert made.embeddings is not None


@EVERY
def test_doubts_reach_the_manifest(template: Template) -> None:
    engine = "npu" if "rkllm" in template.engines() else "onnx"
    tree, _ = building.build(template, "x", parts(template, engine), digest)
    for key in template.unverified:
        own = key.removeprefix(f"{engine}.").replace("encoder", "encoders[0]", 1)
        if not key.startswith(("match", "onnx")):
            assert own in tree["unverified"], key


def test_the_schema_of_the_catalogue_is_made_from_the_code() -> None:
    written = (PACKAGE / "data" / "models.d.schema.json").read_bytes()
    assert written == templates.json_schema(), (
        "python -m rkvlmd.models.templates > rkvlmd/data/models.d.schema.json"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"meant_for": []}, "meant_for: at least one engine"),
        ({"meant_for": [{"engine": "cuda"}]}, "Invalid enum value 'cuda'"),
        ({"match": {"embedding": 8, "tokens": {}, "sizes": [[8, 8]]}}, "either fixed or square"),
        ({"match": {"embedding": 8, "tokens": {"fixed": 1}}}, "match.sizes: at least one"),
        ({"sources": {}}, "match.embedding: has no source"),
    ],
)
def test_wrong_files_are_told(change: dict[str, Any], says: str) -> None:
    tree = json.loads((ROOT / "etc" / "models.d" / "qwen2-vl-2b.json").read_bytes()) | change
    with pytest.raises(ManifestError) as caught:
        templates.parse(json.dumps(tree).encode(), "x")
    assert any(says in problem for problem in caught.value.problems), caught.value.problems


def test_an_owners_file_adds_and_replaces(tmp_path: Path) -> None:
    tree = json.loads((ROOT / "etc" / "models.d" / "qwen2-vl-2b.json").read_bytes())
    (tmp_path / "mine.json").write_text(json.dumps(tree | {"title": "mine"}))
    (tmp_path / "new.json").write_text(json.dumps(tree | {"model": "new"}))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "note.txt").write_text("not one of them")
    found, errors = templates.load([ROOT / "etc" / "models.d", tmp_path, tmp_path / "none"])
    assert set(found) == WANTED | {"new"}
    assert found["qwen2-vl-2b"].title == "mine"
    assert [error.name for error in errors] == ["bad"]


def test_the_catalogue_is_found_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert templates.shipped() == ROOT / "etc" / "models.d"
    (tmp_path / "rkvlmd" / "etc" / "models.d").mkdir(parents=True)
    monkeypatch.setattr(templates, "_PACKAGE", tmp_path / "rkvlmd")
    assert templates.shipped() == tmp_path / "rkvlmd" / "etc" / "models.d"


# --- which model it is ----------------------------------------------------------------

NPU = [t for t in CATALOGUE.values() if "rkllm" in t.engines()]
SEEING = [t for t in NPU if t.match.tokens is not None and not t.variant_of]
VARIANTS = [t for t in NPU if t.variant_of]


@pytest.mark.parametrize("template", SEEING, ids=lambda t: t.model)
def test_what_the_encoder_says_is_enough_or_names_decide(template: Template) -> None:
    """Each model is found by its own files; where another looks the same, a name is needed."""
    files = Folder("download", (tower(template),), ("language.rkllm",))
    found = choose(NPU, files)
    alike = [t.model for t in SEEING if not judge(t, files).wrong]
    if len(alike) == 1:
        assert found.chosen is not None
        assert found.chosen.template is template
    else:
        assert found.chosen is None
        assert {c.template.model for c in found.others} == set(alike)
    name = template.match.names[0].replace("*", "") + "_w8a8_rk3588.rkllm"
    named = choose(NPU, Folder("download", (tower(template),), (name,)))
    assert named.chosen is not None
    assert named.chosen.template is template


@pytest.mark.parametrize(
    ("folder", "size", "model"),
    [
        ("InternVL3.5-2B-rk3588", 2048, "internvl3.5-2b"),
        ("InternVL3-2B-rk3588", 1536, "internvl3-2b"),
        ("Qwen2.5-VL-3B-Instruct-448", 2048, "qwen2.5-vl-3b"),
        ("InternVL2_5-2B", 2048, None),
    ],
)
def test_an_encoder_of_448_pixels_and_256_rows_is_not_qwens_alone(
    folder: str, size: int, model: str | None
) -> None:
    """Qwen's encoders of that size look like InternVL's: who is neither is not taken for one."""
    file = Tower("vision_rk3588.rknn", "rknn", 448, 448, 256, size, 1)
    found = choose(NPU, Folder(folder, (file,), ("language_w8a8_rk3588.rkllm",)))
    assert (found.chosen.template.model if found.chosen else None) == model
    if model is None:
        assert {c.template.model for c in found.others} == {"internvl3.5-2b", "qwen2.5-vl-3b"}


def test_which_models_look_alike_is_known() -> None:
    alike = set()
    for one in SEEING:
        files = Folder("x", (tower(one),), ("a.rkllm",))
        fit = [t.model for t in SEEING if not judge(t, files).wrong]
        if len(fit) > 1:
            alike.add(tuple(sorted(fit)))
    assert alike == {
        ("smolvlm-256m", "smolvlm2-256m"), ("smolvlm-500m", "smolvlm2-500m"),
        ("internvl3-2b", "qwen2-vl-2b"), ("internvl3.5-2b", "qwen2.5-vl-3b"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"outputs": 1}, "outputs"),
        ({"embedding": 2560}, "embedding"),
        ({"tokens": 195}, "tokens"),
        ({"width": 450}, "sizes"),
    ],
)
def test_each_thing_that_differs_is_told(change: dict[str, Any], about: str) -> None:
    template = CATALOGUE["qwen3-vl-2b"]
    judged = judge(template, Folder("x", (replace(tower(template), **change),)))
    assert judged.about == {about}
    (text,) = judged.wrong
    assert text.startswith("vision.rknn: ")
    assert str(next(iter(change.values()))) in text


def test_encoders_of_other_sizes_fit_if_they_are_multiples() -> None:
    template = CATALOGUE["qwen3-vl-2b"]
    towers = tuple(tower(template, size=size) for size in ((448, 448), (896, 640)))
    assert towers[1].tokens == 28 * 20
    assert choose(NPU, Folder("x", towers)).chosen is not None


def test_tokens_of_a_row_and_its_end() -> None:
    assert CATALOGUE["deepseek-ocr"].match.tokens is not None
    assert CATALOGUE["deepseek-ocr"].match.tokens.of(448, 448) == 57
    assert CATALOGUE["deepseek-ocr"].match.tokens.of(640, 640) == 111


def test_names_alone_decide_where_files_say_nothing() -> None:
    silent = Tower("v.rknn", "rknn")
    found = choose(NPU, Folder("x", (silent,), ("Qwen2-VL-2B-Instruct.rkllm",)))
    assert found.chosen is not None
    assert found.chosen.template.model == "qwen2-vl-2b"
    assert found.why == "by the names of files alone"
    unnamed = choose(NPU, Folder("x", (silent,), ("a.rkllm",)))
    assert unnamed.chosen is None
    assert len(unnamed.others) == len(SEEING)


@pytest.mark.parametrize(
    ("glob", "name", "about"),
    [
        ("*qwen3-4b*", "qwen3-4b_w8a8_rk3588.rkllm", True),
        ("*qwen3-4b*", "my-qwen3-4b", True),
        ("*qwen3-4b*", "qwen3-4bit-14b.rkllm", False),
        ("*qwen3-4b*", "qwen3-4b2.rkllm", False),
        ("*qwen3-vl*2b*", "qwen3-vl-2b-instruct.rkllm", True),
        ("*qwen3-vl*2b*", "qwen3-vl-instruct_2b.rkllm", True),
        ("*qwen3-vl*2b*", "qwen3-vl-32b.rkllm", False),
        ("*qwen3-vl*2b*", "qwen3-vlm-2b.rkllm", False),
        ("*gemma-3n*2b*", "gemma-3n-e2b-it.rkllm", True),
        ("x?[ab]*", "x1a-2", True),
        ("x?[ab]*", "x1c", False),
        ("plain", "plain", True),
        ("plain", "plainer", False),
    ],
)
def test_stars_of_names_do_not_cut_words(glob: str, name: str, about: bool) -> None:
    template = CATALOGUE["qwen3-vl-2b"]
    match = msgspec.structs.replace(template.match, names=(glob,))
    assert hints(msgspec.structs.replace(template, match=match), name) is about


def test_names_that_say_something_else_are_listed() -> None:
    """Qwen3-VL-2B without its other outputs looks like Qwen3.5-2B."""
    one = replace(tower(CATALOGUE["qwen3-vl-2b"]), outputs=1)
    for folder, file in (
        ("Qwen3-VL-2B-Instruct", "language.rkllm"),
        ("download", "Qwen3-VL-2B-Instruct_w8a8_rk3588.rkllm"),
        ("Qwen3.5-2B", "Qwen3-VL-2B-Instruct_w8a8_rk3588.rkllm"),
    ):
        files = Folder(folder, (one,), (file,))
        found = choose(NPU, files)
        assert found.chosen is None
        assert [c.template.model for c in found.others] == ["qwen3.5-2b", "qwen3-vl-2b"]
        assert [bool(c.wrong) for c in found.others] == [False, True]
        # The owner's word goes over that.
        for said in ({"family": "qwen3_5"}, {"model": "qwen3.5-2b"}):
            chosen = choose(NPU, files, **said).chosen
            assert chosen is not None
            assert chosen.template.model == "qwen3.5-2b"
    # A name of the same model, or of the text model inside, is no other one.
    for folder, file in (("x", "qwen3.5-2b.rkllm"), ("Qwen3.5-2B", "qwen3-1.7b.rkllm")):
        chosen = choose(NPU, Folder(folder, (one,), (file,))).chosen
        assert chosen is not None
        assert chosen.template.model == "qwen3.5-2b"


def test_text_models_that_are_called_alike_are_not_taken() -> None:
    assert choose(NPU, Folder("x", (), ("qwen3-4bit-14b.rkllm",))).chosen is None
    both = choose(NPU, Folder("Qwen3-4B", (), ("Qwen3-1.7B.rkllm",)))
    assert both.chosen is None
    assert {c.template.model for c in both.others} == {"qwen3-4b", "qwen3-1.7b"}


def test_text_models_go_by_their_names() -> None:
    found = choose(NPU, Folder("x", (), ("Qwen3-1.7B_W8A8_RK3588.rkllm",)))
    assert found.chosen is not None
    assert found.chosen.template.model == "qwen3-1.7b"
    assert choose(NPU, Folder("x", (), ("a.rkllm",))).chosen is None


def test_family_and_model_are_the_owners_word() -> None:
    template = CATALOGUE["qwen3-vl-4b"]
    other = replace(tower(template), embedding=4096)  # the 8B, which the catalogue has not
    folder = Folder("x", (other,), ("a.rkllm",))
    assert choose(NPU, folder).chosen is None
    found = choose(NPU, folder, family="qwen3_vl")
    assert found.chosen is not None
    assert found.chosen.pattern
    named = choose(NPU, folder, model="llava-1.5-7b").chosen
    assert named is not None
    assert named.template.model == "llava-1.5-7b"
    assert named.wrong
    alike = Folder("x", (tower(CATALOGUE["smolvlm-256m"]),), ("a.rkllm",))
    assert choose(NPU, alike, model="smolvlm2-256m").chosen is not None


@pytest.mark.parametrize("template", VARIANTS, ids=lambda t: t.model)
def test_a_variant_is_taken_only_by_name(template: Template) -> None:
    usual = CATALOGUE[template.variant_of]
    assert (usual.family, usual.checkpoint) == (template.family, template.checkpoint)
    assert usual.manifest == template.manifest  # what engines change apart
    files = Folder(template.model, (tower(template),), (f"{template.model}.rkllm",))
    for family in (None, template.family):
        found = choose(NPU, files, family=family).chosen
        assert found is not None
        assert found.template is usual
    named = choose(NPU, files, model=template.model).chosen
    assert named is not None
    assert named.template is template
    for kind in usual.match.model_types:
        known = msgspec.structs.replace(template, match=usual.match)
        alike = by_config([known, usual], Folder("x", config={"model_type": kind}))[1]
        assert alike == [usual]


def test_the_two_encoders_of_tiles_know_their_parts() -> None:
    template = CATALOGUE["deepseek-ocr-tiles"]
    given = replace(parts(template, "npu"), separators="separators.npy")
    for order in (given.towers, given.towers[::-1]):
        tree, _ = building.build(template, "x", replace(given, towers=order), digest)
        made = placing.check(tree)
        whole, tile = sorted(made.encoders, key=lambda e: e.tile)
        assert (whole.width, whole.tokens, whole.resize.rule) == (1024, 273, "base_tiles")
        assert (tile.width, tile.tokens, tile.resize.rule) == (640, 111, "stretch")
        assert made.assembly is not None
        assert manifest.files(made)["assembly.rows"].file == "separators.npy"
    # Encoders of other exports, without the rows between lines, need the file.
    bare = tuple(replace(t, tokens=(t.width or 0) ** 2 // 64**2) for t in given.towers)
    tree, _ = building.build(template, "x", replace(given, towers=bare), digest)
    placing.check(tree)
    tree, _ = building.build(template, "x", replace(given, towers=bare, separators=None), digest)
    with pytest.raises(placing.CannotPlaceError, match=r"assembly\.rows: missing"):
        placing.check(tree)
    tree, _ = building.build(template, "x", replace(given, towers=given.towers[:1]), digest)
    with pytest.raises(placing.CannotPlaceError, match="needs an encoder with tile = true"):
        placing.check(tree)


def test_slices_need_rows_in_place_of_text() -> None:
    """``<image>`` before the whole picture is a word of the model, and a place for the library."""
    template = CATALOGUE["minicpm-v-2.6-slices"]
    given = parts(template, "npu")
    tree, _ = building.build(template, "x", given, digest)
    assert placing.check(tree).decoder.input == "embeddings"
    text = replace(given, decoder={"model": "a.rkllm"})
    tree, _ = building.build(template, "x", text, digest)
    tree["image"] |= {"start": "", "end": ""}
    with pytest.raises(placing.CannotPlaceError, match="it writes <image> before") as caught:
        placing.check(tree)
    assert "embed.npy" in caught.value.message


def picked(config: dict[str, Any], hidden: int | None) -> tuple[Candidate | None, list[Template]]:
    return by_config(CATALOGUE.values(), Folder("x", config=config, hidden=hidden))


def test_config_json_names_the_model() -> None:
    for template in CATALOGUE.values():
        for kind in template.match.model_types:
            found, alike = picked({"model_type": kind}, template.match.embedding)
            assert found is not None
            assert kind in found.template.match.model_types
            assert template in alike
    assert picked({"model_type": "qwen2_vl"}, 3584)[0] is None
    assert picked({"model_type": "gpt2"}, 768) == (None, [])


# --- manifests ------------------------------------------------------------------------


def test_what_a_file_says_goes_over_what_is_usual() -> None:
    template = CATALOGUE["qwen2.5-vl-3b"]
    seen = (tower(template, size=(476, 476)), tower(template, size=(392, 392)))
    made, notes = building.build(
        template, "x", replace(parts(template, "npu"), towers=seen, context=8192), digest
    )
    assert [(e["width"], e["tokens"]) for e in made["encoders"]] == [(476, 289), (392, 196)]
    assert made["decoder"]["context"] == 8192
    assert not [n for n in notes if n.key == "decoder.context"]


def test_what_nobody_says_is_noted() -> None:
    template = CATALOGUE["qwen2-vl-2b"]
    bare = Parts(decoder={"model": "a.rkllm"}, towers=(Tower("v.rknn", "rknn"),))
    made, notes = building.build(template, "x", bare, digest)
    assert (made["encoders"][0]["width"], made["encoders"][0]["tokens"]) == (392, 196)
    keys = {note.key for note in notes}
    assert keys == {
        "encoders[0].width", "encoders[0].tokens", "decoder.context", "tokenizer", "template",
    }  # fmt: skip
    assert all(note.says and note.todo for note in notes)
    assert {"encoders[0].width", "decoder.context"} <= set(made["unverified"])
    assert "tokenizer" not in made


def test_a_tokenizer_of_another_model_is_noted() -> None:
    template = CATALOGUE["qwen2-vl-2b"]
    wrong = replace(parts(template, "npu"), text=Text("tokenizer.json", {"<s>": 1}))
    _, notes = building.build(template, "x", wrong, digest)
    assert any(n.key == "image.content" and "<|image_pad|>" in n.says for n in notes)


def test_weights_outside_are_in_the_manifest() -> None:
    template = CATALOGUE["smolvlm-256m"]
    made, _ = building.build(
        template, "x",
        replace(
            parts(template, "onnx"),
            external={"vision.onnx": ("v.data",), "d.onnx": ("d.data", "d.more")},
        ),
        digest,
    )  # fmt: skip
    named = {f.file for f in manifest.files(placing.check(made)).values()}
    assert {"v.data", "d.data", "d.more"} <= named


def test_a_decoder_alone_takes_text() -> None:
    template = CATALOGUE["qwen3-vl-2b"]
    made, _ = building.build(template, "x", replace(parts(template, "npu"), towers=()), digest)
    placed = placing.check(made)
    assert placed.encoders == ()
    assert placed.image is None
    assert placed.capabilities == ("embeddings",)
    assert placed.embeddings is not None
    assert placed.embeddings.inputs == ("text",)


# --- the values are those that are compared with the published processors ----------------

COMPARED = {
    "qwen2_vl": "qwen2-vl-2b", "qwen2_5_vl": "qwen2.5-vl-3b", "qwen3_vl": "qwen3-vl-2b",
    "qwen3_5": "qwen3.5-0.8b",
    "internvl": "internvl3-1b", "smolvlm": "smolvlm-256m", "llava": "llava-1.5-7b",
    "gemma3": "gemma3-4b", "janus": "janus-pro-1b",
}  # fmt: skip


@pytest.mark.parametrize("with_files", [False, True], ids=["catalogue", "files"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in COMPARED], ids=lambda c: c.name)
def test_pictures_are_made_as_in_the_comparison_with_the_processors(
    case: Case, with_files: bool
) -> None:
    """``tests/parity`` holds these values against the processors of transformers.

    A ``preprocessor_config.json`` with the same values changes nothing.
    """
    template = CATALOGUE[COMPARED[case.name]]
    made_of = replace(parts(template, "onnx"), picture=case.values if with_files else {})
    tree, _ = building.build(template, "x", made_of, digest)
    made = placing.check(tree)
    (ours,), (theirs,) = made.encoders, case.encoders
    # How large a picture may become is the owner's choice, not the processor's.
    free = {"min_pixels": 0, "max_pixels": 0}
    assert msgspec.structs.replace(ours.resize, **free) == (
        msgspec.structs.replace(theirs.resize, **free)
    )
    for key in ("mean", "std", "patches", "colour", "layout", "baked"):
        assert getattr(ours, key) == getattr(theirs, key), key
    if ours.patches is None:
        assert (ours.width, ours.height, ours.tokens) == (
            theirs.width,
            theirs.height,
            theirs.tokens,
        )
    assert made.image == case.tags
    assert made.marker == case.marker
    assert made.family == case.family
    assert set(case.specials) & set(made.special_strings) >= {made.image.content}


@pytest.mark.parametrize("name", ["minicpmv", "deepseek_ocr"])
def test_tags_of_models_that_run_on_the_npu_alone(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    template = next(t for t in CATALOGUE.values() if t.family == name)
    known = template.known("npu")
    assert known["marker"] == case.marker
    if name == "minicpmv":
        assert known["image"] == {"start": "<image>", "content": "<unk>", "end": "</image>"}
    else:
        # The library repeats a token of the tokenizer, which is not <image> there.
        assert known["image"]["content"] == "<\uff5c\u2581pad\u2581\uff5c>"


# --- configuration files of any content -------------------------------------------------

_KEYS = st.sampled_from(
    ["vision_config", "text_config", "size", "crop_size", "max_image_size", "image_size",
     "patch_size", "merge_size", "temporal_patch_size", "spatial_merge_size", "scale_factor",
     "longest_edge", "shortest_edge", "height", "min_pixels", "max_pixels", "min_patches",
     "max_patches", "image_mean", "image_std", "resample", "do_image_splitting",
     "background_color", "mm_tokens_per_image", "deepstack_visual_indexes", "image_seq_length"]
)  # fmt: skip
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=5),
    max_leaves=12,
)
_TREES = st.dictionaries(_KEYS, _VALUES, max_size=10)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(families.NAMES), _TREES, _TREES, st.integers(1, 1 << 20))
def test_configuration_files_of_any_content_are_read(
    family: str, config: dict[str, Any], picture: dict[str, Any], context: int
) -> None:
    for tree in (
        {**published.encoder(family, config, picture, context), "sha256": "0" * 64},
        published.decoder(config),
    ):
        for key, value in tree.items():
            if key in {"width", "height", "tokens", "outputs"}:
                assert value >= 1


def test_no_code_knows_a_model_by_its_name() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        words = set(re.findall(r"[A-Za-z0-9._-]+", _code(path)))
        assert not words & set(CATALOGUE), path


def _code(path: Path) -> str:
    """Return a module's strings; those that document it may give examples."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return "\n".join(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    )
