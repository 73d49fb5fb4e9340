"""Models as somebody publishes them, imported and served by the whole daemon on a simulated board."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from rkvlmd.engine.detok import _table
from rkvlmd.models.templates import Template
from tests.e2e.daemon import Daemon, running
from tests.fakes import published
from tests.npusim import compiler, models
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

#: What ends an answer in each model's words.
ENDS = (
    "<|im_end|>",
    "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<end_of_turn>",
    "<turn|>",
    "</s>",
)


@dataclass
class Board:
    """A daemon and what its libraries were called with; ``folder`` has the models."""

    folder: Path
    daemon: Daemon
    sim: Sim

    def ask(self, model: str, messages: Any) -> tuple[dict[str, str], Any]:
        """Return what the simulated model says that it was given, and the whole answer."""
        with openai.OpenAI(
            base_url=self.daemon.url + "/v1", api_key="x", max_retries=0, timeout=120
        ) as api:
            done = api.chat.completions.create(model=model, messages=messages, max_tokens=400)
        assert done.choices[0].finish_reason == "stop", done
        return models.answer(done.choices[0].message.content or ""), done


def decoder(folder: Path, template: Template, **keys: Any) -> None:
    """Write an ``.rkllm`` file, and the tokenizer of the checkpoint, which says the same."""
    match, special = template.match, list(template.manifest["special_strings"])
    folder.mkdir(parents=True)
    published.tokenizer(folder / "tokenizer.json", special)
    ids = {c: i for i, c in enumerate(sorted(_table()))}
    numbers = {text: 256 + i for i, text in enumerate(special)}
    models.rkllm(
        folder / f"{match.names[0].strip('*')}_w8a8_rk3588.rkllm", specials=numbers,
        byte_ids=[ids[c] for c, _ in sorted(_table().items(), key=lambda item: item[1])],
        embed=match.embedding, outputs=match.outputs,
        eos=next(numbers[s] for s in special if s in ENDS), **keys,
    )  # fmt: skip


def encoder(folder: Path, template: Template, width: int, height: int, tokens: int) -> None:
    """Write an ``.rknn`` file that says what it takes and gives."""
    match = template.match
    about = {"width": width, "height": height, "tokens": tokens, "embed": match.embedding,
             "outputs": match.outputs, "batched": False}  # fmt: skip
    takes = [("pixel", [1, 3, height, width])]
    gives = [(f"out{i}", [tokens, match.embedding]) for i in range(match.outputs)]
    tree = published.trailer(takes, gives) | {"npusim": about}
    published.rknn(folder / f"vision_{width}.rknn", tree=tree)


def arrays(folder: Path, **given: Any) -> None:
    """Write ``.npy`` files."""
    for name, array in given.items():
        np.save(folder / f"{name}.npy", array)


@contextmanager
def serving(
    folder: Path, install: Callable[[Path], None], *, config: Sequence[str] = ()
) -> Iterator[Board]:
    """Let ``install`` fill the folder of models, and start a daemon for them.

    At the end it must leave well, and nothing may have used the library wrongly.
    """
    with pytest.MonkeyPatch.context() as patch:
        sim = plug_in(folder, patch)
        (folder / "models").mkdir()
        install(folder / "models")
        library = compiler.library("1.3.0")
        lines = [f'[npu]\nlibrary = "{library}"\nsoc = "rk3588"', "[models]\ndemo = false", *config]
        with running(folder, folder / "models", config="\n".join([*lines, ""])) as daemon:
            yield Board(folder, daemon, sim)
            assert daemon.stop() == 0
            assert not sim.trace("misuse")
