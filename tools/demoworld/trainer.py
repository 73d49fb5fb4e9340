"""The training loop: batches from a worker process, checkpoints, tests in between."""

from __future__ import annotations

import json
import math
import multiprocessing as mp
import os
import queue
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demoworld import model as models
from demoworld.export import write_folder
from demoworld.stream import Batch, Mix, curriculum, make_batch
from demoworld.text import Fonts
from demoworld.tokens import Encoder, train_tokenizer

WARM_UP = 0.01
DECAY_FROM = 0.6
TEST_SEED = 20_011
CHECKPOINT_SECONDS = 240.0
AVERAGE = 0.998


@dataclass
class Plan:
    """How to train; exactly one of ``minutes`` and ``steps`` sets the length."""

    out: Path
    work: Path
    minutes: float | None
    steps: int | None
    batch: int
    rate: float
    seed: int
    resume: bool
    threads: int
    fonts: Path | None
    eval_every: float
    half: bool = False  # bfloat16 matrix products
    compiled: bool = False


def rate_at(progress: float) -> float:
    """The learning rate's factor: warm-up, constant, then down to (almost) nothing."""
    if progress < WARM_UP:
        return max(0.02, progress / WARM_UP)
    if progress < DECAY_FROM:
        return 1.0
    left = max(0.0, (1 - progress) / (1 - DECAY_FROM))
    return 0.01 + 0.99 * left


def auxiliary_at(progress: float) -> float:
    """The weight of the auxiliary losses."""
    return max(0.15, 1.0 - 1.7 * progress)


def _work(
    seed: int, tokenizer: str, fonts: Path | None, pictures: int, progress: Any, out: Any
) -> None:
    """The worker process: draws and packs batches for ever."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    encode, found = Encoder(Tokenizer.from_str(tokenizer)), Fonts(fonts)
    parent = os.getppid()
    out.cancel_join_thread()
    while os.getppid() == parent:
        batch = make_batch(rng, encode, found, curriculum(progress.value), pictures)
        while os.getppid() == parent:
            try:
                out.put(batch, timeout=5)
                break
            except queue.Full:
                continue


def exact_by_skill(model: models.Trainee, batches: list[Batch]) -> dict[str, tuple[int, float]]:
    """Per skill, how many answers and the share that is right in every token.

    The true answer's tokens are given while the model predicts them, so an answer counts
    just when greedy decoding would have produced it.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    model.eval()
    with torch.no_grad():
        for batch in batches:
            data = models.tensors(batch)
            _, _, logits = model(data)
            wanted = data["targets"] >= 0
            hit = logits.argmax(-1) == data["targets"][wanted]
            turns = torch.from_numpy(batch.rows.turn)[wanted]
            ok = torch.ones(len(batch.rows.skills), dtype=torch.bool)
            ok[turns[~hit]] = False
            for skill, good in zip(batch.rows.skills, ok.tolist(), strict=True):
                right[skill].append(good)
    model.train()
    return {k: (len(v), sum(v) / len(v)) for k, v in sorted(right.items())}


class Averaged:
    """A running average of the weights, which tests and exports use."""

    def __init__(self, model: models.Trainee) -> None:
        self.values = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: models.Trainee, step: int) -> None:
        """Moves the average towards the weights."""
        keep = min(AVERAGE, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, list(model.parameters()), 1 - keep)

    @torch.no_grad()
    def swap(self, model: models.Trainee) -> None:
        """Exchanges the average and the weights; twice is as before."""
        for value, p in zip(self.values, model.parameters(), strict=True):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)


def _save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train(plan: Plan, print_line: Callable[[str], None]) -> None:
    """Trains as planned and writes the model's folder."""
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    plan.work.mkdir(parents=True, exist_ok=True)
    checkpoint = plan.work / "checkpoint.pt"
    tokenizer = train_tokenizer(plan.seed)
    model = models.Trainee(tokenizer.get_vocab_size(), plan.half)
    if plan.compiled:
        model.compile_layers()
    fonts = Fonts(plan.fonts)
    rng, encode = random.Random(plan.seed), Encoder(tokenizer)
    looks = make_batch(rng, encode, fonts, Mix(), 600 if plan.batch >= 16 else 30)
    model.whiten(torch.from_numpy(looks.pixels))
    optimisers = models.optimisers(model, plan.rate)
    average = Averaged(model)
    step, trained = 0, 0.0
    if plan.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        model.load_state_dict(state["model"])
        average.values = state["average"]
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, trained = state["step"], state["trained"]
        print_line(f"going on at step {step}, {trained / 60:.1f} minutes")

    def progress() -> float:
        if plan.steps:
            return min(1.0, step / plan.steps)
        return min(1.0, trained / (60 * (plan.minutes or 1)))

    context = mp.get_context("spawn")
    shared = context.Value("d", progress())
    batches: Any = context.Queue(4)
    worker = context.Process(
        target=_work,
        args=(plan.seed + step, tokenizer.to_str(), plan.fonts, plan.batch, shared, batches),
        daemon=True,
    )
    worker.start()
    rng, encode = random.Random(TEST_SEED), Encoder(tokenizer)
    test_size = 32 if plan.batch >= 16 else 4
    tests = [
        make_batch(rng, encode, fonts, Mix(), test_size, held_out=True)
        for _ in range(5 if plan.batch >= 16 else 1)
    ]
    size = sum(p.numel() for p in model.vlm.parameters())
    print_line(f"{size / 1e6:.2f} M parameters, {len(fonts.paths)} fonts, batch {plan.batch}")

    def test() -> None:
        average.swap(model)
        table = exact_by_skill(model, tests)
        average.swap(model)
        cells = " ".join(f"{k} {100 * v:.0f}" for k, (_, v) in table.items())
        print_line(f"step {step} held-out exact %: {cells}")
        with (plan.work / "tests.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "trained": trained, "exact": table}) + "\n")

    def save() -> None:
        _save(checkpoint, {
            "tokenizer": tokenizer.to_str(), "model": model.state_dict(),
            "average": average.values, "optimisers": [o.state_dict() for o in optimisers],
            "step": step, "trained": trained,
        })

    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    begun = last_save = last_test = last_print = time.monotonic()
    seen, bad, sums = 0, 0, defaultdict(float)
    count = 0
    while progress() < 1.0:
        if stopped:
            save()
            worker.terminate()
            print_line(f"stopped at step {step}; --resume goes on")
            return
        at = time.monotonic()
        now = progress()
        shared.value = now
        data = models.tensors(batches.get())
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate_at(now)
        loss, aux, _ = model(data)
        total = loss + auxiliary_at(now) * sum(aux.values(), torch.zeros(()))
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if math.isfinite(norm.item()) and math.isfinite(loss.item()):
            for optimiser in optimisers:
                optimiser.step()
            average.update(model, step)
            bad = 0
        else:
            bad += 1
            print_line(f"step {step}: loss or gradient is not finite, step left out")
            if bad > 20:
                raise RuntimeError("training has diverged; resume from the last checkpoint")
        for optimiser in optimisers:
            optimiser.zero_grad()
        step += 1
        count += 1
        seen += len(data["pixels"])
        sums["answer"] += loss.item()
        for name, value in aux.items():
            sums[name] += value.item()
        trained += time.monotonic() - at
        clock = time.monotonic()
        if clock - last_print > 30:
            means = " ".join(f"{k} {v / count:.3f}" for k, v in sums.items())
            print_line(
                f"step {step} {trained / 60:.1f} min {100 * progress():.1f} % "
                f"{seen / max(clock - last_print, 1e-9):.0f} pictures/s {means}"
            )
            seen, count, last_print = 0, 0, clock
            sums = defaultdict(float)
        if clock - last_test > 60 * plan.eval_every:
            test()
            last_test = time.monotonic()
        if clock - last_save > CHECKPOINT_SECONDS:
            save()
            last_save = time.monotonic()
    worker.terminate()
    save()
    test()
    average.swap(model)
    write_folder(model.vlm, tokenizer, plan.out)
    minutes = (time.monotonic() - begun) / 60
    print_line(f"wrote {plan.out} after {step} steps, {trained / 60:.1f} minutes of training, "
               f"{minutes:.1f} minutes in this run")


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """Writes the model's folder from a checkpoint's averaged weights."""
    state = torch.load(checkpoint, weights_only=False)
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    model = models.Trainee(tokenizer.get_vocab_size())
    averaged: list[Tensor] = state["average"]
    with torch.no_grad():
        for value, p in zip(averaged, model.parameters(), strict=True):
            p.copy_(value)
    write_folder(model.vlm, tokenizer, out)
