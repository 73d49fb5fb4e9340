"""The demo world: answers, drawing, packing, tokenizer and held-out combinations."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("numpy")
pytest.importorskip("PIL")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

TOOLS = Path(__file__).resolve().parents[2] / "tools"
if str(TOOLS) not in sys.path:
    sys.path.insert(0, str(TOOLS))

import jinja2  # noqa: E402
import numpy as np  # noqa: E402
from demoworld import pack, pairs, questions, stream, tokens  # noqa: E402
from demoworld.draw import draw, stretch  # noqa: E402
from demoworld.questions import Turn  # noqa: E402
from demoworld.scene import (  # noqa: E402
    CHARS,
    COLOURS,
    SHAPES,
    Obj,
    Scene,
    object_held_out,
    scene_held_out,
)
from demoworld.shapes import box, object_scene  # noqa: E402
from demoworld.text import Fonts  # noqa: E402
from PIL import Image  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> tokens.Tokenizer:
    return tokens.train_tokenizer()


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Fonts:
    return Fonts(tmp_path_factory.mktemp("no-fonts"))  # Pillow's own font only


def _scene() -> Scene:
    return Scene().with_objects(
        [
            Obj("star", "blue", "small", 4),
            Obj("circle", "red", "large", 0),
            Obj("star", "red", "small", 8),
        ]
    )


def test_caption_is_in_reading_order() -> None:
    assert questions.caption(_scene()) == (
        "A large red circle in the top left corner, a small blue star in the middle and "
        "a small red star in the bottom right corner."
    )
    assert questions.caption(Scene(text="AB12")) == "The text AB12."
    assert questions.caption(Scene()) == questions.NOTHING
    orange = Scene().with_objects([Obj("cross", "orange", "small", 1)])
    assert questions.caption(orange) == "A small orange cross at the top."


def _answers(skill: str, scene: Scene, tries: int = 400) -> dict[str, str]:
    rng = random.Random(1)
    found = {}
    for _ in range(tries):
        turn = questions.ask(rng, scene, skill)
        found[turn.question] = turn.answer
    return found


@pytest.mark.parametrize(
    ("skill", "question", "answer"),
    [
        ("count", "How many shapes are there?", "There are three shapes."),
        ("count", "How many stars are there?", "There are two stars."),
        ("count", "How many circles are there?", "There is one circle."),
        ("count", "How many red shapes are there?", "There are two red shapes."),
        ("exists", "Is there a red star?", "Yes, there is a red star."),
        ("exists", "Is there a blue circle?", "No, there is no blue circle."),
        ("exists", "Is there anything blue?", "Yes, there is something blue."),
        ("colour", "What color is the star?", "The stars are blue and red."),
        ("colour", "What colour is the circle?", "The circle is red."),
        ("shape", "Which shape is blue?", "The star is blue."),
        ("shape", "Which shape is red?", "The circle and the star are red."),
        ("where", "Where is the blue star?", "The blue star is in the middle."),
        ("size", "How big is the circle?", "The circle is large."),
        (
            "at",
            "Which shape is in the middle?",
            "A small blue star is in the middle.",
        ),
        ("read", "What does it say?", "There is no text."),
    ],
)
def test_answers(skill: str, question: str, answer: str) -> None:
    assert _answers(skill, _scene(), 3000)[question] == answer


def test_every_skill_answers_every_kind_of_scene() -> None:
    rng = random.Random(5)
    for scene in (Scene(), Scene(text="A1"), _scene(), object_scene(rng, 5)):
        for skill in questions.SINGLE_SKILLS:
            for _ in range(30):
                turn = questions.ask(rng, scene, skill)
                assert turn.question
                assert turn.answer.endswith(".")
                assert "{" not in turn.question + turn.answer


def test_follow_up_speaks_of_the_topic() -> None:
    rng = random.Random(2)
    topic = _scene().objects[1]
    answers = {questions.follow_up(rng, _scene(), topic, "").answer for _ in range(100)}
    assert answers == {
        "It is blue.",
        "It is in the middle.",
        "It is small.",
        "It is a star.",
        "Yes, there are two other shapes.",
    }


def test_pairs_tell_the_difference() -> None:
    rng = random.Random(3)
    kinds = set()
    for _ in range(200):
        pair = pairs.random_pair(rng)
        same = questions.caption(pair.first) == questions.caption(pair.second)
        if pair.difference:
            assert pair.same == same
            kinds.add(pair.difference.split()[0])
        for skill in ("which_picture", "different", "same", "both", "one"):
            turn = pairs.ask_pair(rng, pair, skill)
            assert turn is None or "{" not in turn.question + turn.answer
    assert kinds == {"The", "Only"}


def test_training_never_sees_held_out_combinations() -> None:
    rng = random.Random(4)
    for _ in range(150):
        assert not scene_held_out(object_scene(rng, rng.randint(1, 5)))
        assert not scene_held_out(stream.text_scene(rng, 6))
        assert not scene_held_out(stream.both_scene(rng, 6))
        pair = pairs.random_pair(rng)
        assert not scene_held_out(pair.first)
        assert not scene_held_out(pair.second)
    for _ in range(30):
        assert scene_held_out(object_scene(rng, 3, want_held_out=True))
    share = np.mean(
        [
            object_held_out(Obj(s, c, "small", cell), b)
            for s in SHAPES
            for c in COLOURS
            for cell in range(9)
            for b in ("white", "dark")
        ]
    )
    assert 0.05 < share < 0.15


def test_drawing_is_repeatable_and_labelled(fonts: Fonts) -> None:
    rng = random.Random(6)
    for _ in range(10):
        scene = object_scene(rng, 3)
        one, two = draw(scene, fonts), draw(scene, fonts)
        assert one.image.size == (128, 128)
        assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
        for i, obj in enumerate(scene.objects, 1):
            assert obj.cell == int(obj.y * 3) * 3 + int(obj.x * 3)
            x0, y0, x1, y1 = box(obj)
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            assert (one.objects == i).any()
    written = draw(replace(stream.text_scene(rng, 6), text="AB1"), fonts)
    assert set(np.unique(written.chars)) == {0, 1, 2, 3}


def test_pictures_are_stretched() -> None:
    assert stretch(Image.new("RGBA", (30, 400))).size == (128, 128)


def test_tokenizer(tokenizer: tokens.Tokenizer) -> None:
    before = len(tokenizer.encode(" It says ", add_special_tokens=False).ids)
    read = tokenizer.encode(f" It says {CHARS}.", add_special_tokens=False).ids
    assert len(read) == before + len(CHARS) + 1
    for text in (" The circle is red.", "naïve 東京 🙂\n\ttabs", "HELLO wOrLd 42"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    ids = [tokenizer.token_to_id(name) for name in tokens.SPECIALS]
    assert ids == list(range(6))


def _conversation() -> tuple[list[list[Turn]], str]:
    one = [Turn("How many stars are there?", "There are two stars.", "count")]
    two = [
        Turn("Where is the circle?", "The circle is on the left.", "where"),
        Turn("And what colour is it?", "It is red.", "follow_up"),
    ]
    return [one, two], "first"


@pytest.mark.parametrize("layout", ["first", "last", "around", "none"])
def test_packing_gives_the_template_tokens(tokenizer: tokens.Tokenizer, layout: str) -> None:
    """A segment together with its beginning is what the chat template and tokenizer yield."""
    encode = tokens.Encoder(tokenizer)
    conversations, _ = _conversation()
    template = jinja2.Environment().from_string(tokens.TEMPLATE)
    picture = tokens.FAKE + tokens.GLOBAL + tokens.IMAGE * pack.IMAGE_TOKENS + tokens.FAKE
    for seed in range(12):
        rng = random.Random(seed)
        group = pack.build_group(
            rng, encode, [] if layout == "none" else [0], conversations, layout
        )
        rng = random.Random(seed)  # the same choices again
        system = rng.choice(pack.SYSTEMS) if rng.random() < 0.25 else ""
        for segment, turns in zip(group.segments, conversations, strict=True):
            shown = [{"type": "image"}]
            asked = [{"type": "text", "text": turns[0].question}]
            content = {
                "first": shown + asked,
                "last": asked + shown,
                "none": asked,
                "around": shown + asked,
            }[layout]
            if layout == "around":
                lead = {"type": "text", "text": rng.choice(pack.LEADS)}
                content = [lead, *content]
            messages: list[dict[str, object]] = []
            if system:
                messages.append({"role": "system", "content": system})
            messages.append({"role": "user", "content": content})
            for i, turn in enumerate(turns):
                if i:
                    messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": turn.answer})
            text = template.render(messages=messages).removesuffix("\n")
            whole = tokenizer.encode(
                text.replace(tokens.IMAGE, picture), add_special_tokens=False
            ).ids
            packed = [i for piece in (*group.start, *segment) for i in piece.ids]
            assert packed == whole


def test_training_labels() -> None:
    batch_rng = random.Random(9)
    encode = tokens.Encoder(tokens.train_tokenizer())
    fonts = Fonts(Path("/nonexistent"))
    batch = stream.make_batch(batch_rng, encode, fonts, stream.Mix(), 6)
    assert batch.pixels.shape[1:] == (128, 128, 3)
    assert batch.rows.ids.shape[1] == stream.LENGTH
    assert {len(v) for v in batch.labels.values()} == {len(batch.pixels)}
    images = batch.rows.ids == tokens.IMAGE_ID
    assert np.array_equal(images, batch.rows.picture >= 0)
    ends = batch.rows.targets == tokens.END_ID
    assert ends.sum() == len(batch.rows.skills)


def test_packed_segments_are_as_if_alone(tokenizer: tokens.Tokenizer) -> None:
    """Logits of a packed segment equal those of transformers for the conversation alone."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from demoworld import model as models

    torch.manual_seed(0)
    encode = tokens.Encoder(tokenizer)
    conversations, _ = _conversation()
    rng = random.Random(1)
    groups = [
        pack.build_group(rng, encode, [0], conversations, "first"),
        pack.build_group(rng, encode, [1, 0], conversations, "last"),
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    rows, _ = pack.lay_out(groups, 800)
    batch = stream.Batch(pixels, rows, {}, 0)
    model = models.Trainee(tokenizer.get_vocab_size()).eval()
    data = models.tensors(batch)
    with torch.no_grad():
        _, _, image = model.see(data["pixels"])
        _, hidden = model.hidden(data, image)
        logits = model.vlm.lm_head(hidden)
        order = sorted(groups, key=len, reverse=True)
        for g, group in enumerate(order):
            for s, segment in enumerate(group.segments, 1):
                pieces = [*group.start, *segment]
                ids = [i for p in pieces for i in p.ids]
                shown = [p.picture for p in pieces if p.picture >= 0]
                values = torch.tensor(pixels[shown] / 127.5 - 1, dtype=torch.float32)
                alone = model.vlm(
                    input_ids=torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    pixel_values=values.permute(0, 3, 1, 2)[None],
                ).logits[0]
                where = (rows.group[0] == g) & np.isin(rows.segment[0], (0, s))
                packed = logits[0][torch.from_numpy(where)]
                assert torch.allclose(packed, alone, atol=1e-4)
