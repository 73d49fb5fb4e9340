"""Decoding speed of the CPU engine on a random decoder of SmolLM2-135M's shape.

Measures through ``OnnxDecoder``'s own loop, beside transformers on the same
shapes in the same run, and onnxruntime-genai and llama.cpp where installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rkvlmd.engine.onnx_decoder import OnnxDecoder
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tools.exporter import llama
from tools.exporter.graph import Precision
from tools.exporter.llama import Attention, Llama

#: SmolLM2-135M, less context: 134.5 M parameters with one table for both ends.
SHAPE = Llama(
    hidden=576,
    inner=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head=64,
    vocabulary=49280,
    context=2048,
    theta=100000.0,
    epsilon=1e-5,
)
PREFILL = 256
STEPS = 48
ROUNDS = 4
GOAL = 1.8
BASE = "transformers float32"
#: Takes a prompt and a number of steps; returns the seconds of the prefill and of each step.
Measure = Callable[[list[int], int], list[float]]
#: Layouts and precisions that are measured.
VARIANTS: tuple[tuple[Attention, Precision], ...] = (
    ("plain", "int8"),
    ("gqa", "int8"),
    ("gqa", "int4"),
)


class RandomWeights:
    """Weights of any name and shape, the same each time."""

    def __init__(self) -> None:
        self._known: dict[str, npt.NDArray[np.float32]] = {}

    def __contains__(self, name: str) -> bool:
        return name != "lm_head.weight"

    def get(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return ones for a norm, else normal numbers that the name seeds."""
        if name.endswith("norm.weight"):
            return np.ones(shape, np.float32)
        seed = int.from_bytes(name.encode()[-8:], "little")
        rng = np.random.default_rng([seed, len(name)])
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def run(
    *, threads: int = 2, prefill: int = PREFILL, steps: int = STEPS, shape: Llama = SHAPE
) -> dict[str, Any]:
    """Measure all engines; speeds are tokens per second, decoding is the median step.

    The engines take turns, a few rounds, so that a machine that is busy for a
    while is so for all of them. The first round of each is not counted.
    """
    each = -(-steps // ROUNDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines: dict[str, Measure] = {
            f"rkvlmd {attention} {precision}": _ours(folder, attention, precision, threads, shape)
            for attention, precision in VARIANTS
        }
        beside = _checkpoint(folder / "hf", shape)
        engines |= {f"{BASE}, threads {n}": _transformers(beside, n) for n in sorted({1, threads})}
        missing = {}
        for label, modules, make in (
            ("onnxruntime-genai int4", ("onnxruntime_genai",), _genai),
            ("llama.cpp q4_0", ("llama_cpp", "gguf"), _llama_cpp),
        ):
            absent = [m for m in modules if importlib.util.find_spec(m) is None]
            if absent:
                missing[label] = f"{absent[0]} is not installed"
                continue
            try:
                engines[label] = make(beside, threads, shape)
            except subprocess.CalledProcessError as exc:
                missing[label] = f"ended with status {exc.returncode}"
        taken: dict[str, list[list[float]]] = {name: [] for name in engines}
        for turn in range(ROUNDS + 1):
            for name, measure in engines.items():
                prompt = [100 + turn, *(7 * i % 40_000 for i in range(1, prefill))]
                times = measure([t % shape.vocabulary for t in prompt], each)
                if turn:
                    taken[name].append(times)
    results: dict[str, dict[str, Any]] = {n: _speeds(runs, prefill) for n, runs in taken.items()}
    # On a busy machine torch may be faster with fewer threads; its better figure counts.
    base = max(r["decode"] for n, r in results.items() if n.startswith(BASE))
    for result in results.values():
        result["ratio"] = round(result["decode"] / base, 2)
    best = max(r["ratio"] for n, r in results.items() if n.startswith("rkvlmd"))
    return {
        "parameters": _parameters(shape),
        "threads": threads,
        "prefill_tokens": prefill,
        "engines": results,
        "missing": missing,
        "goal": f"at least {GOAL} x {BASE}",
        "best_ratio": best,
        "reached": best >= GOAL,
    }


def _speeds(runs: list[list[float]], prefill: int) -> dict[str, Any]:
    """``runs``: seconds of the prefill with the first token, then of each step."""
    steps = [seconds for run in runs for seconds in run[1:]]
    return {
        "prefill": round(prefill / statistics.median(run[0] for run in runs), 1),
        "decode": round(1 / statistics.median(steps), 1),
        "steps": len(steps),
    }


def _parameters(shape: Llama) -> int:
    kv = shape.kv_heads * shape.head
    layer = 2 * shape.hidden * (shape.heads * shape.head + kv) + 3 * shape.hidden * shape.inner
    return shape.vocabulary * shape.hidden + shape.layers * layer


def _ours(
    folder: Path, attention: Attention, precision: Precision, threads: int, shape: Llama
) -> Measure:
    """Return a measurement through ``OnnxDecoder.generate``."""
    out = folder / f"{attention}-{precision}"
    out.mkdir()
    weights: Any = RandomWeights()
    llama.build_embed(shape, weights, precision).save(out / "embed.onnx")
    metadata = llama.SHARED if attention == "gqa" else {}
    llama.build_decoder(shape, weights, precision, attention).save(out / "decoder.onnx", metadata)
    _tokenizer(out / "tokenizer.json")
    files = {"embed": "embed.onnx", "decoder": "decoder.onnx"}
    none = "0" * 64
    manifest = manifests.Manifest(
        schema=1,
        name="speed",
        family="smolvlm",
        decoder=manifests.Decoder(
            engine="onnx",
            files={k: manifests.File(file=v, sha256=none) for k, v in files.items()},
            context=shape.context,
            embedding=shape.hidden,
        ),
        tokenizer=manifests.File(file="tokenizer.json", sha256=none),
    )
    decoder = OnnxDecoder()
    decoder.load(
        child.Load(
            folder=str(out), manifest=manifests.to_builtins(manifest), options={"threads": threads}
        ),
        lambda *_: None,
    )

    def measure(prompt: list[int], steps: int) -> list[float]:
        at = [time.perf_counter()]

        def say(message: Any) -> None:
            if isinstance(message, child.Text):
                at.append(time.perf_counter())

        decoder.generate(child.Generate(id=1, tokens=prompt, max_tokens=steps + 1), [], say)
        return [b - a for a, b in pairwise(at)]

    return measure


def _checkpoint(folder: Path, shape: Llama) -> Path:
    """Write a Llama checkpoint of the same shape with random weights, for the others."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.epsilon,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048})
    )
    return folder


def _tokenizer(path: Path) -> None:
    """Write a byte-level tokenizer; nothing here depends on its words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def _transformers(folder: Path, threads: int) -> Measure:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def measure(prompt: list[int], steps: int) -> list[float]:
        torch.set_num_threads(threads)
        times, cache, ids = [], None, prompt
        for _ in range(steps + 1):
            started = time.perf_counter()
            with torch.inference_mode():
                out = model(
                    input_ids=torch.tensor([ids]),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            ids, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
            times.append(time.perf_counter() - started)
        return times

    return measure


def _genai(folder: Path, threads: int, _: Llama) -> Measure:
    """Build the model with the package's own builder at 4 bits, and run its own loop."""
    import onnxruntime_genai as genai

    out = folder.with_name("genai")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    paths = ["-i", str(folder), "-o", str(out), "-c", str(folder.with_name("cache"))]
    extra = ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
    subprocess.run([*builder, *paths, *extra], check=True, capture_output=True)
    path = out / "genai_config.json"
    tree = json.loads(path.read_text())
    tree["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
    path.write_text(json.dumps(tree))
    model = genai.Model(str(out))

    def measure(prompt: list[int], steps: int) -> list[float]:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + steps + 2, do_sample=False)
        generator = genai.Generator(model, params)
        times, started = [], time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(steps + 1):
            generator.generate_next_token()
            times.append(time.perf_counter() - started)
            started = time.perf_counter()
        return times

    return measure


def _llama_cpp(folder: Path, threads: int, shape: Llama) -> Measure:
    """Write the model as GGUF; measure in a process of its own, because a build may crash."""
    path = folder.with_name("model.gguf")
    _write_gguf(path, shape)

    def measure(prompt: list[int], steps: int) -> list[float]:
        me = [sys.executable, "-m", "tools.benchlib.decode_speed", "--threads", str(threads)]
        order = json.dumps({"path": str(path), "prompt": prompt, "steps": steps})
        done = subprocess.run(
            [*me, "--llama-cpp"], input=order, check=True, capture_output=True, text=True
        )
        times: list[float] = json.loads(done.stdout.splitlines()[-1])
        return times

    measure([1, 2, 3], 1)
    return measure


def _write_gguf(path: Path, shape: Llama) -> None:
    """Write random weights of the same shape, all matrices in blocks of 32 at 4 bits."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(shape.context)
    out.add_embedding_length(shape.hidden)
    out.add_block_count(shape.layers)
    out.add_feed_forward_length(shape.inner)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.kv_heads)
    out.add_layer_norm_rms_eps(shape.epsilon)
    out.add_rope_dimension_count(shape.head)
    out.add_rope_freq_base(shape.theta)
    out.add_vocab_size(shape.vocabulary)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    out.add_tokenizer_model("no_vocab")
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    sizes = {"token_embd": (shape.vocabulary, shape.hidden), "output_norm": (shape.hidden,)}
    for i in range(shape.layers):
        sizes |= {
            f"blk.{i}.attn_norm": (shape.hidden,),
            f"blk.{i}.attn_q": (queries, shape.hidden),
            f"blk.{i}.attn_k": (keys, shape.hidden),
            f"blk.{i}.attn_v": (keys, shape.hidden),
            f"blk.{i}.attn_output": (shape.hidden, queries),
            f"blk.{i}.ffn_norm": (shape.hidden,),
            f"blk.{i}.ffn_gate": (shape.inner, shape.hidden),
            f"blk.{i}.ffn_up": (shape.inner, shape.hidden),
            f"blk.{i}.ffn_down": (shape.hidden, shape.inner),
        }
    weights = RandomWeights()
    for name, size in sizes.items():
        values = weights.get(f"{name}.weight", size)
        if len(size) == 1:
            out.add_tensor(f"{name}.weight", values)
        else:
            out.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _run_llama_cpp(threads: int) -> None:
    """Measure the order on standard input; print the seconds as JSON."""
    from llama_cpp import Llama as Engine

    order = json.loads(sys.stdin.read())
    prompt, steps = order["prompt"], order["steps"]
    engine = Engine(
        order["path"], n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    times = []
    # The first pass warms up, as the other engines' first round does.
    for count in (1, steps):
        engine.reset()
        times, ids = [], prompt
        for _ in range(count + 1):
            started = time.perf_counter()
            engine.eval(ids)
            ids = [int(np.argmax(engine.scores[engine.n_tokens - 1]))]
            times.append(time.perf_counter() - started)
    print(json.dumps(times))


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description="Decoding speed of the CPU engine.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.llama_cpp:
        _run_llama_cpp(args.threads)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(json.dumps(run(threads=args.threads), indent=2))


if __name__ == "__main__":
    main()
