"""The token ids of whole prompts against ``transformers``' own processors.

Both sides get the family's template, the same pictures and a tokenizer that is
made here and has the family's special tokens; every other byte is a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rkvlmd.engine import render
from rkvlmd.models import families, views
from rkvlmd.wire.child import Laid
from tests.parity import pictures as files
from tests.parity.cases import CASES, FASTVLM, LATER, Case

pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

WITH_PROCESSOR = [*(case for case in CASES if case.whole is not None), FASTVLM, *LATER]
#: Conversations: messages of texts, and pictures by number of ``files``.
TALKS: tuple[tuple[tuple[str, tuple[str | int, ...]], ...], ...] = (
    (("user", (0, "What is this?")),),
    (("user", (7, "and", 8, "are different. Why?")),),
    (("user", (21, "One.")), ("assistant", ("Yes, one.",)), ("user", (4, "And this?"))),
)


def tokenizer(specials: tuple[str, ...]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return made


@pytest.fixture(scope="module")
def processor_mixin() -> Iterator[Any]:
    """Let processors be made without a video processor, which needs torchvision."""
    mixin = importlib.import_module("transformers.processing_utils").ProcessorMixin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixin, "check_argument_for_proper_class", lambda *_: None)
        yield mixin


def whole_processor(case: Case, made: Tokenizer) -> Any:
    fast = importlib.import_module("transformers").PreTrainedTokenizerFast
    assert case.whole is not None
    module, name, values, tokens = case.whole
    words = fast(tokenizer_object=made, extra_special_tokens=tokens)
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    processor = cls(image_processor=case.image_processor(), tokenizer=words, **values)
    if case.family == "janus":
        # It says so only in the checkpoint's file: 24 x 24 patches.
        processor.num_image_tokens = 576
    return processor


def ours(case: Case, folder: Path, talk: Any) -> list[int]:
    pictures: list[Laid] = []
    turns = []
    for role, parts in talk:
        found: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                found.append({"text": part})
                continue
            plan = views.plan(case.manifest, *files.opened(part).size)
            found.append({"picture": len(pictures)})
            tokens = [view.tokens for view in plan.views]
            pictures.append(Laid(layout=list(plan.layout), tokens=tokens))
        turns.append({"role": role, "parts": found})
    made = render.render(str(folder), case.manifest, turns, pictures)
    assert sum(count for _, count, _, _ in made.spans) == sum(sum(p.tokens) for p in pictures)
    return made.tokens


def messages_of(talk: Any) -> list[dict[str, Any]]:
    """Return a talk as the processors of transformers take it."""
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in parts
            ],
        }
        for role, parts in talk
    ]


def theirs(case: Case, made: Tokenizer, talk: Any) -> list[int]:
    messages = messages_of(talk)
    pictures = [files.opened(part) for _, parts in talk for part in parts if isinstance(part, int)]
    processor = whole_processor(case, made)
    template = families.get(case.family).template
    if case.family == "minicpmv":
        # Version 2.6 has a marker of several tokens; that of 4.6 is the content itself.
        template = template.replace(case.marker, case.tags.content)
    text = processor.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True
    )
    found = processor(
        images=pictures, text=[text], add_special_tokens=False, padding=False, return_tensors="np"
    )["input_ids"][0]
    return [int(token) for token in found]


@pytest.mark.usefixtures("processor_mixin")
@pytest.mark.parametrize("talk", TALKS, ids=["one", "two", "turns"])
@pytest.mark.parametrize("case", WITH_PROCESSOR, ids=lambda case: case.name)
def test_the_prompt_is_the_processors(case: Case, talk: Any, tmp_path: Path) -> None:
    made = tokenizer(case.specials)
    made.save(str(tmp_path / "tokenizer.json"))
    assert ours(case, tmp_path, talk) == theirs(case, made, talk)
