"""The training loop: one or more processes, checkpoints, tests in between."""

from __future__ import annotations

import json
import math
import multiprocessing as mp
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, distributed

from demoworld import model as models
from demoworld.export import write_folder
from demoworld.stream import Batch, Mix, curriculum, make_batch
from demoworld.text import Fonts
from demoworld.tokens import Encoder, train_tokenizer

WARM_UP = 0.01
DECAY_FROM = 0.3
SLOW_SEEING = 0.7  # the vision tower's share of the rate from then on
TEST_SEED = 20_011
CHECKPOINT_SECONDS = 240.0
AVERAGE = 0.998
EXTRAS = 2


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
    processes: int = 1


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
    return max(0.2, 1.0 - 1.4 * progress)


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

    def named(self, model: models.Trainee) -> dict[str, Tensor]:
        """The average by the parameters' names."""
        names = [name for name, _ in model.named_parameters()]
        return dict(zip(names, self.values, strict=True))

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


def resume(
    model: models.Trainee,
    average: Averaged,
    optimisers: list[torch.optim.Optimizer],
    state: dict[str, Any],
) -> None:
    """Takes over a checkpoint; heads that it lacks start afresh."""
    model.load_state_dict(state["model"], strict=False)
    saved = state["average"]
    named = [(n, p) for n, p in model.named_parameters()]
    average.values = [saved.get(n, p.detach()).clone() for n, p in named]
    for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
        try:
            optimiser.load_state_dict(kept)
        except ValueError:  # other parameters than before
            continue


class Ranks:
    """Several processes of one thread each that average their gradients once a step.

    On a busy machine that is steadier than several threads in one process, which wait for
    each other in every operation.
    """

    def __init__(self, plan: Plan, rank: int, meeting: str) -> None:
        self.rank, self.count = rank, plan.processes
        if self.count > 1:
            distributed.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=self.count
            )

    def same(self, values: Iterable[Tensor]) -> None:
        """Gives all processes the first one's values."""
        if self.count > 1:
            for value in values:
                distributed.broadcast(value, 0)

    def mean(self, value: Tensor) -> None:
        """Averages over the processes, in place."""
        if self.count > 1:
            distributed.all_reduce(value)
            value /= self.count


def _rank(plan: Plan, rank: int, meeting: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first process stops all
    _train(plan, Ranks(plan, rank, meeting), lambda line: None)


def train(plan: Plan, print_line: Callable[[str], None]) -> None:
    """Trains as planned and writes the model's folder."""
    plan.work.mkdir(parents=True, exist_ok=True)
    meeting = str(plan.work.resolve() / f"meeting.{os.getpid()}")
    context = mp.get_context("spawn")
    helpers = [
        context.Process(target=_rank, args=(plan, rank, meeting), daemon=True)
        for rank in range(1, plan.processes)
    ]
    for helper in helpers:
        helper.start()
    try:
        _train(plan, Ranks(plan, 0, meeting), print_line)
    finally:
        for helper in helpers:
            helper.join(20)
            helper.kill()
        Path(meeting).unlink(missing_ok=True)


def _train(plan: Plan, ranks: Ranks, print_line: Callable[[str], None]) -> None:
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    first = ranks.rank == 0
    checkpoint = plan.work / "checkpoint.pt"
    state = None
    if plan.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
    tokenizer = train_tokenizer(plan.seed)
    if state:
        tokenizer = Tokenizer.from_str(state["tokenizer"])
    model = models.Trainee(tokenizer.get_vocab_size(), plan.half)
    if plan.compiled:
        model.compile_layers()
    fonts, encode = Fonts(plan.fonts), Encoder(tokenizer)
    many = 600 if plan.batch >= 16 else 30
    looks = make_batch(random.Random(plan.seed), encode, fonts, Mix(), many)
    model.whiten(torch.from_numpy(looks.pixels))
    optimisers = models.optimisers(model, plan.rate)
    average = Averaged(model)
    step, trained = 0, 0.0
    if state:
        resume(model, average, optimisers, state)
        step, trained = state["step"], state["trained"]
        print_line(f"going on at step {step}, {trained / 60:.1f} minutes")
    parameters = list(model.parameters())
    ranks.same(p.data for p in parameters)

    tests: list[Batch] = []
    if first:
        rng = random.Random(TEST_SEED)
        size, times = (32, 5) if plan.batch >= 16 else (4, 1)
        tests = [make_batch(rng, encode, fonts, Mix(), size, True) for _ in range(times)]
        count = sum(p.numel() for p in model.vlm.parameters())
        print_line(f"{count / 1e6:.2f} M parameters, {len(fonts.paths)} fonts, batch {plan.batch}")

    def test() -> None:
        average.swap(model)
        table = exact_by_skill(model, tests)
        average.swap(model)
        cells = " ".join(f"{k} {100 * v:.0f}" for k, (_, v) in table.items())
        print_line(f"step {step} held-out exact %: {cells}")
        with (plan.work / "tests.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "trained": trained, "exact": table}) + "\n")

    def save() -> None:
        _save(
            checkpoint,
            {
                "tokenizer": tokenizer.to_str(),
                "model": model.state_dict(),
                "average": average.named(model),
                "optimisers": [o.state_dict() for o in optimisers],
                "step": step,
                "trained": trained,
            },
        )

    # All gradients and a few numbers lie in one tensor, so that one exchange is enough.
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes) + EXTRAS)
    gradients, extras = flat[:-EXTRAS], flat[-EXTRAS:]
    for p, part in zip(parameters, torch.split(gradients, sizes), strict=True):
        p.grad = part.view_as(p)
    stopped: list[int] = []
    if first:
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    rng = random.Random(f"{plan.seed} {ranks.rank} {step}")
    begun = last_save = last_test = last_print = at = time.monotonic()
    now = progress(plan, step, trained)
    seen, bad = 0, 0
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    while now < 1.0:
        share = max(1, plan.batch // plan.processes)
        data = models.tensors(make_batch(rng, encode, fonts, curriculum(now), share))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate_at(now)
            if isinstance(optimiser, models.Muon):
                optimiser.slowness = SLOW_SEEING if now > DECAY_FROM else 1.0
        flat.zero_()
        loss, aux, _ = model(data)
        total = loss + auxiliary_at(now) * sum(aux.values(), torch.zeros(()))
        total.backward()
        if first:
            # The others follow the first one's clock and its wish to stop.
            trained += time.monotonic() - at
            at = time.monotonic()
            extras[0] = progress(plan, step + 1, trained) * ranks.count
            extras[1] = float(bool(stopped)) * ranks.count
        ranks.mean(flat)
        now, stop = extras[0].item(), extras[1].item() > 0.5
        norm = gradients.norm().item()
        if math.isfinite(norm):
            gradients.mul_(min(1.0, 1.0 / (norm + 1e-6)))
            for optimiser in optimisers:
                optimiser.step()
            average.update(model, step)
            bad = 0
        else:
            bad += 1
            print_line(f"step {step}: loss or gradient is not finite, step left out")
            if bad > 20:
                raise RuntimeError("training has diverged; resume from the last checkpoint")
        step += 1
        seen += len(data["pixels"]) * ranks.count
        for name, value in (("answer", loss), *aux.items()):
            if name != "answer" or len(data["ids"]):
                sums[name] += value.item()
                counts[name] += 1
        if not first:
            if stop:
                return
            continue
        clock = time.monotonic()
        if clock - last_print > 30:
            means = " ".join(f"{k} {v / counts[k]:.3f}" for k, v in sums.items())
            print_line(
                f"step {step} {trained / 60:.1f} min {100 * now:.1f} % "
                f"{seen / (clock - last_print):.0f} pictures/s {means}"
            )
            seen, last_print = 0, clock
            sums.clear()
            counts.clear()
        if stop:
            save()
            print_line(f"stopped at step {step}; --resume goes on")
            return
        if clock - last_test > 60 * plan.eval_every:
            test()
            last_test = time.monotonic()
        if clock - last_save > CHECKPOINT_SECONDS:
            save()
            last_save = time.monotonic()
    if not first:
        return
    save()
    test()
    average.swap(model)
    write_folder(model.vlm, tokenizer, plan.out)
    minutes = (time.monotonic() - begun) / 60
    print_line(
        f"wrote {plan.out} after {step} steps, {trained / 60:.1f} minutes of training, "
        f"{minutes:.1f} minutes in this run"
    )


def progress(plan: Plan, step: int, trained: float) -> float:
    """How much of the plan is done, 0 to 1."""
    done = step / plan.steps if plan.steps else trained / (60 * (plan.minutes or 1))
    return min(1.0, done)


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """Writes the model's folder from a checkpoint's averaged weights."""
    state = torch.load(checkpoint, weights_only=False)
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    model = models.Trainee(tokenizer.get_vocab_size())
    averaged: dict[str, Tensor] = state["average"]
    model.load_state_dict(averaged, strict=False)
    write_folder(model.vlm, tokenizer, out)
