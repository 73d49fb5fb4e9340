"""Asks a model the held-out questions and counts the answers that are right word for word."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from demoworld.draw import stretch
from demoworld.heldout import MUST, SKILLS, Case
from demoworld.tokens import END_ID, FAKE, GLOBAL, IMAGE, IMAGE_ID

IMAGE_TOKENS = 64
LONGEST_ANSWER = 140
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Backend(Protocol):
    """What runs the network: three functions over arrays."""

    folder: Path

    def vision(self, pixels: Floats) -> Floats:
        """(n, 3, side, side) to (n, IMAGE_TOKENS, width)."""
        ...

    def embed(self, ids: Ints) -> Floats:
        """(rows, length) to (rows, length, width)."""
        ...

    def decode(
        self, embedded: Floats, mask: Ints, positions: Ints, past: Any
    ) -> tuple[Floats, Any]:
        """The last position's logits (rows, vocabulary) and the new past."""
        ...


class TorchBackend:
    """A folder in the layout of transformers."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import SmolVLMForConditionalGeneration

        self.folder, self.torch = folder, torch
        made: Any = SmolVLMForConditionalGeneration.from_pretrained(folder)
        self.model: Any = made.eval()

    def vision(self, pixels: Floats) -> Floats:
        with self.torch.no_grad():
            core = self.model.model
            hidden = core.vision_model(
                self.torch.from_numpy(pixels), patch_attention_mask=None
            ).last_hidden_state
            features: Floats = core.connector(hidden).numpy()
        return features

    def embed(self, ids: Ints) -> Floats:
        with self.torch.no_grad():
            out: Floats = self.model.get_input_embeddings()(self.torch.from_numpy(ids)).numpy()
        return out

    def decode(
        self, embedded: Floats, mask: Ints, positions: Ints, past: Any
    ) -> tuple[Floats, Any]:
        with self.torch.no_grad():
            out = self.model.model.text_model(
                inputs_embeds=self.torch.from_numpy(embedded),
                attention_mask=self.torch.from_numpy(mask),
                position_ids=self.torch.from_numpy(positions),
                past_key_values=past,
                use_cache=True,
            )
            logits: Floats = self.model.lm_head(out.last_hidden_state[:, -1]).numpy()
        return logits, out.past_key_values


class Asker:
    """Renders conversations as the engine does and decodes greedily, many at a time."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.tokenizer = Tokenizer.from_file(str(backend.folder / "tokenizer.json"))
        source = (backend.folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.template = jinja2.Environment().from_string(source)

    def ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt's tokens with the pictures' places spread out."""
        text = self.template.render(messages=messages, add_generation_prompt=True)
        shown = FAKE + GLOBAL + IMAGE * IMAGE_TOKENS + FAKE
        return list(self.tokenizer.encode(text.replace(IMAGE, shown), add_special_tokens=False).ids)

    def answers(self, cases: list[Case]) -> list[str]:
        """The model's answers, without the space in front."""
        prompts = [self.ids(c.messages) for c in cases]
        pictures = [np.asarray(stretch(p), np.float32) for c in cases for p in c.pictures]
        longest = max(map(len, prompts))
        ids = np.zeros((len(cases), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        embedded = np.array(self.backend.embed(ids))
        if pictures:
            pixels = np.stack(pictures).transpose(0, 3, 1, 2) / 127.5 - 1
            features = self.backend.vision(np.ascontiguousarray(pixels, np.float32))
            embedded[(ids == IMAGE_ID) & (mask == 1)] = features.reshape(-1, features.shape[-1])
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        past: Any = None
        done = np.zeros(len(cases), bool)
        out: list[list[int]] = [[] for _ in cases]
        for _ in range(LONGEST_ANSWER):
            logits, past = self.backend.decode(embedded, mask, positions, past)
            best = logits.argmax(-1)
            done |= best == END_ID
            if done.all():
                break
            for i in np.flatnonzero(~done):
                out[i].append(int(best[i]))
            embedded = self.backend.embed(best[:, None].astype(np.int64))
            mask = np.concatenate([mask, np.ones((len(cases), 1), np.int64)], 1)
            positions = positions[:, -1:] + 1
        return [self.tokenizer.decode(o, skip_special_tokens=False).strip() for o in out]


def batches(cases: Iterator[Case], size: int) -> Iterator[list[Case]]:
    """The cases, some at a time."""
    batch: list[Case] = []
    for case in cases:
        batch.append(case)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def measure(
    ask: Callable[[list[Case]], list[str]],
    cases: Iterator[Case],
    size: int = 32,
    wrong: list[dict[str, str]] | None = None,
) -> tuple[int, int]:
    """How many answers of how many are exact; ``wrong`` collects the others."""
    right = total = 0
    for batch in batches(cases, size):
        for case, answer in zip(batch, ask(batch), strict=True):
            total += 1
            right += answer == case.expected
            if answer != case.expected and wrong is not None:
                question = case.messages[-1]["content"]
                if not isinstance(question, str):
                    question = " ".join(p["text"] for p in question if p["type"] == "text")
                wrong.append(
                    {
                        "skill": case.skill,
                        "question": question,
                        "answer": answer,
                        "expected": case.expected,
                        "scene": case.scene,
                    }
                )
    return right, total


def table(results: dict[str, dict[str, tuple[int, int]]], markdown: bool) -> str:
    """The results, drawing -> skill -> (right, total), as a table."""
    drawings = list(results)
    skills = [s for s in SKILLS if any(s in results[d] for d in drawings)]
    head = ["skill", *[f"{d}: exact" for d in drawings], "questions"]
    lines = []
    for skill in skills:
        cells = []
        most = 0
        for drawing in drawings:
            right, total = results[drawing].get(skill, (0, 0))
            most = max(most, total)
            cells.append(f"{100 * right / total:.1f} %" if total else "-")
        name = SKILLS[skill] + (" *" if skill in MUST else "")
        lines.append([name, *cells, str(most)])
    if markdown:
        rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        return "\n".join("| " + " | ".join(r) + " |" for r in rows)
    widths = [max(len(r[i]) for r in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in [head, *lines]
    )


def as_json(results: dict[str, dict[str, tuple[int, int]]]) -> str:
    """The results for other programs."""
    return json.dumps(
        {
            drawing: {
                skill: {
                    "questions": total,
                    "exact": right,
                    "percent": round(100 * right / total, 2),
                }
                for skill, (right, total) in of.items()
            }
            for drawing, of in results.items()
        },
        indent=2,
    )
