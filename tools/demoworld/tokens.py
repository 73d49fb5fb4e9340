"""The demo model's tokenizer and chat template.

The tokenizer is a byte-level BPE whose pre-tokenizer never lets a capital or a digit merge
with its neighbours inside a string such as "AB12": a string read from a picture costs one
token for each character. Any UTF-8 text can be encoded and decodes to itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demoworld import pairs, questions
from demoworld.shapes import object_scene
from demoworld.wording import SYSTEMS, word

VOCABULARY = 640
START, END, FAKE, IMAGE, GLOBAL, PAD = SPECIALS = (
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<pad>",
)
START_ID, END_ID, FAKE_ID, IMAGE_ID, GLOBAL_ID, PAD_ID = range(6)
# A word with its leading space, punctuation, then single letters, digits and spaces.
PIECES = r" ?\p{Lu}?\p{Ll}+| ?[^\s\p{L}\p{N}]+|[\p{L}\p{N}]|\s"
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}"
    "{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def corpus(seed: int = 0, count: int = 3000) -> Iterator[str]:
    """Questions and answers without any strings read from pictures."""
    rng = random.Random(seed)
    for _ in range(count):
        scene = object_scene(rng, rng.randint(1, 4))
        skill = rng.choices(*zip(*questions.SINGLE_SKILLS.items(), strict=True))[0]
        turn = questions.ask(rng, scene, skill)
        yield from ("User:", turn.question, " " + turn.question, " " + turn.answer)
        yield "Assistant:"
        if turn.topic is not None:
            more = questions.follow_up(rng, scene, turn.topic, turn.answer)
            yield from ("User: " + more.question, " " + more.answer)
        pair = pairs.random_pair(rng)
        asked = pairs.ask_pair(rng, pair)
        if asked is not None:
            yield from (asked.question, " " + asked.answer)
        if rng.random() < 0.2:
            yield "System: " + rng.choice(SYSTEMS)
            yield from (" It says.", " The text and the text.", " " + questions.NOTHING)
            yield from (" Yes, there is text.", " No, there is no text.")
            yield from (word(rng, "read"), " " + word(rng, "any_text"))
        if rng.random() < 0.1:
            turn = questions.no_picture(rng)
            yield from (" " + turn.question, " " + turn.answer)


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """A fresh tokenizer; the same seed gives the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    return tokenizer


class Encoder:
    """Token ids of the pieces of a conversation, remembered because they repeat."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids = self._known.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[text] = ids
        return ids
