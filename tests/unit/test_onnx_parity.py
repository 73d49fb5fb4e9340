"""The exported graphs against transformers: same picture, same logits, same tokens."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import onnx_inputs
from rkvlmd.engine.onnx_decoder import OnnxDecoder
from rkvlmd.engine.onnx_encoder import OnnxEncoder
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tests.fakes import tiny_model
from tools.exporter import smolvlm

pytestmark = pytest.mark.torch
NEW = 24
QUESTION = (
    f"{tiny_model.SPECIALS[tiny_model.START]}User:{{picture}}How many red circles are there?"
    "<end_of_utterance>\nAssistant:"
)


class Reference:
    """The checkpoint in transformers."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            from tokenizers import Tokenizer
            from transformers import SmolVLMForConditionalGeneration

            self.torch = torch
            self.model: Any = SmolVLMForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        picture = "<fake_token_around_image><global-img>{}<fake_token_around_image>".format(
            "<image>" * tiny_model.IMAGE_TOKENS
        )
        return list(self.tokenizer.encode(text.format(picture=picture)).ids)

    def logits(self, tokens: list[int], pixels: np.ndarray) -> np.ndarray:
        """Logits of every place, shape (places, vocabulary)."""
        torch = self.torch
        with torch.no_grad():
            out = self.model(
                input_ids=torch.tensor([tokens]),
                pixel_values=torch.from_numpy(pixels)[None],
                use_cache=False,
            )
        return out.logits[0].numpy()

    def best(self, tokens: list[int], answer: list[int], pixels: np.ndarray) -> list[int]:
        """The best token at each place of ``answer``, given all before it.

        Where these are the answer itself, it is the greedy one: each token is
        the best after the ones before.
        """
        logits = self.logits(tokens + answer, pixels)[len(tokens) - 1 : -1]
        return [int(token) for token in logits.argmax(axis=1)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(params=["plain", "gqa"])
def engines(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path
) -> tuple[OnnxEncoder, OnnxDecoder]:
    made = smolvlm.export(checkpoint, tmp_path / "tiny", name="tiny", attention=request.param)
    order = child.Load(
        folder=str(tmp_path / "tiny"),
        # No token ends the text: transformers is asked for a fixed number of them too.
        manifest=manifests.to_builtins(made) | {"stop_ids": []},
        options={"threads": 2},
    )
    encoder, decoder = OnnxEncoder(), OnnxDecoder()
    encoder.load(order, lambda *_: None)
    decoder.load(order, lambda *_: None)
    return encoder, decoder


class Ear:
    """Collects what a decoder says, with the tokens behind it."""

    def __init__(self, decoder: OnnxDecoder) -> None:
        self.decoder = decoder
        self.cached = -1

    def ask(self, tokens: list[int], rows: np.ndarray, count: int = NEW) -> list[int]:
        at = tokens.index(tiny_model.IMAGE)
        spans = [child.Span(start=at, count=tiny_model.IMAGE_TOKENS, key="picture")]
        order = child.Generate(id=1, tokens=tokens, spans=spans, max_tokens=count)
        said: list[Any] = []
        done = self.decoder.generate(order, [rows], said.append)
        assert done.completion == count
        self.cached = said[0].cached
        # The last token is not in the cache: nothing was computed after it.
        return [p for p in self.decoder._record[len(tokens) :] if isinstance(p, int)]


def picture() -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.uniform(-1, 1, (1, 3, tiny_model.SIDE, tiny_model.SIDE)).astype(np.float32)


def test_rows_of_a_picture_equal_transformers(
    reference: Reference, engines: tuple[OnnxEncoder, OnnxDecoder]
) -> None:
    torch = reference.torch
    with torch.no_grad():
        found = reference.model.model.get_image_features(torch.from_numpy(picture())[None])
    wanted = torch.cat(list(found.pooler_output)).reshape(tiny_model.IMAGE_TOKENS, -1).numpy()
    rows = engines[0].encode(picture())
    assert rows.shape == wanted.shape
    assert np.abs(rows - wanted).max() < 1e-4


def test_logits_equal_transformers(
    reference: Reference, engines: tuple[OnnxEncoder, OnnxDecoder]
) -> None:
    tokens = reference.encode(QUESTION)
    wanted = reference.logits(tokens, picture())
    rows, decoder = engines[0].encode(picture()), engines[1]
    order = child.Generate(
        id=1,
        tokens=tokens,
        spans=[
            child.Span(start=tokens.index(tiny_model.IMAGE), count=tiny_model.IMAGE_TOKENS, key="p")
        ],
        max_tokens=1,
    )
    embeds, _ = decoder._embed_tokens(tokens)
    onnx_inputs.Prompt(order, [rows], embeds.shape[-1], decoder._inputs).embed(embeds, 0)
    # Place by place, so that every one passes through the cache.
    found = [
        decoder._graph.step(embeds[:, i : i + 1], decoder._run, logits=True)
        for i in range(len(tokens))
    ]
    assert np.abs(np.stack(found) - wanted).max() < 1e-4
    # All at once.
    decoder._graph.truncate(0)
    last = decoder._graph.step(embeds, decoder._run, logits=True)
    assert np.abs(last - wanted[-1]).max() < 1e-4


def test_greedy_tokens_equal_transformers_with_and_without_prefix_reuse(
    reference: Reference, engines: tuple[OnnxEncoder, OnnxDecoder]
) -> None:
    encoder, decoder = engines
    rows, ear = encoder.encode(picture()), Ear(decoder)
    first = reference.encode(QUESTION)
    answer = ear.ask(first, rows)
    assert len(set(answer)) > NEW // 3, "the random model repeats itself; the test would be weak"
    assert answer == reference.best(first, answer, picture())
    assert ear.cached == 0

    second = [*first, *answer, tiny_model.END, *reference.encode("\nUser: And now?")]
    again = ear.ask(second, rows)
    assert ear.cached == len(first) + len(answer)
    assert again == reference.best(second, again, picture())

    # Back to the first question: the cache is cut short, and again one place is computed.
    assert ear.ask(first, rows) == answer
    assert ear.cached == len(first) - 1
