"""A tiny SmolVLM with random weights: as a checkpoint folder, and exported.

Needs numpy, tokenizers and onnx; transformers can open the checkpoint. Its
answers mean nothing, but depend on every token and pixel before them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from rkvlmd.models.manifest import Manifest
from tools.exporter import smolvlm
from tools.exporter.graph import Precision
from tools.exporter.llama import Attention

SPECIALS = (
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)
START, END, IMAGE, FAKE, GLOBAL = range(5)
SIDE, PATCH, SCALE = 32, 8, 2
IMAGE_TOKENS = (SIDE // PATCH // SCALE) ** 2
VOCABULARY = 320
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CORPUS = (
    "User: What is in this picture? Assistant: A small red circle on the left.",
    "How many shapes are there? Which colour is the large star in the middle?",
    "The quick brown fox jumps over the lazy dog; größer, naïve, 你好, 🙂.",
)


def make_hf(folder: Path, *, seed: int = 0, context: int = 512, layers: int = 3) -> Path:
    """Write a checkpoint folder in the layout of transformers; the same seed, the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(context, layers)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": START, "eos_token_id": END})
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "SmolVLMImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"longest_edge": SIDE},
            "resample": 3,
            "do_image_splitting": False,
            "max_image_size": {"longest_edge": SIDE},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_pad": False,
        },
    )
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    save_tensors(folder / "model.safetensors", _weights(config, np.random.default_rng(seed)))
    return folder


def make_model(
    folder: Path,
    name: str = "tiny",
    *,
    attention: Attention = "gqa",
    precision: Precision = "none",
    seed: int = 0,
    context: int = 512,
    layers: int = 3,
    hidden: bool = False,
) -> Manifest:
    """Write the model folder ``folder`` (``rkvlm.json`` and ONNX files); return its manifest."""
    checkpoint = folder.parent / f".{folder.name}.checkpoint"
    make_hf(checkpoint, seed=seed, context=context, layers=layers)
    return smolvlm.export(
        checkpoint, folder, name=name, attention=attention, precision=precision, hidden=hidden
    )


def save_tensors(path: Path, tensors: dict[str, npt.NDArray[np.float32]]) -> None:
    """Write float32 tensors as a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, value in tensors.items():
        header[key] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value, np.float32).tobytes())


def _config(context: int, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "dtype": "float32",
        "scale_factor": SCALE,
        "image_token_id": IMAGE,
        "pad_token_id": END,
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": START,
            "eos_token_id": END,
            "pad_token_id": END,
        },
    }


def _weights(
    config: dict[str, Any], rng: np.random.Generator
) -> dict[str, npt.NDArray[np.float32]]:
    """Return weights that are large enough for the greedy tokens to vary."""
    eyes, text = config["vision_config"], config["text_config"]
    found: dict[str, npt.NDArray[np.float32]] = {}

    def matrix(name: str, rows: int, *columns: int, gain: float = 1.0) -> None:
        spread = gain / np.sqrt(np.prod(columns))
        found[name] = rng.normal(0, spread, (rows, *columns)).astype(np.float32)

    def vector(name: str, size: int, around: float) -> None:
        found[name] = rng.normal(around, 0.1, size).astype(np.float32)

    v, n = "model.vision_model", eyes["hidden_size"]
    matrix(f"{v}.embeddings.patch_embedding.weight", n, 3, PATCH, PATCH, gain=2.0)
    vector(f"{v}.embeddings.patch_embedding.bias", n, 0.0)
    matrix(f"{v}.embeddings.position_embedding.weight", (SIDE // PATCH) ** 2, n, gain=3.0)
    for i in range(eyes["num_hidden_layers"]):
        layer = f"{v}.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            matrix(f"{layer}.self_attn.{part}.weight", n, n, gain=1.5)
            vector(f"{layer}.self_attn.{part}.bias", n, 0.0)
        for part, rows, columns in (
            ("fc1", eyes["intermediate_size"], n),
            ("fc2", n, eyes["intermediate_size"]),
        ):
            matrix(f"{layer}.mlp.{part}.weight", rows, columns, gain=1.5)
            vector(f"{layer}.mlp.{part}.bias", rows, 0.0)
        for part in ("layer_norm1", "layer_norm2"):
            vector(f"{layer}.{part}.weight", n, 1.0)
            vector(f"{layer}.{part}.bias", n, 0.0)
    vector(f"{v}.post_layernorm.weight", n, 1.0)
    vector(f"{v}.post_layernorm.bias", n, 0.0)

    t, size, inner = "model.text_model", text["hidden_size"], text["intermediate_size"]
    head = size // text["num_attention_heads"]
    matrix("model.connector.modality_projection.proj.weight", size, n * SCALE**2)
    found[f"{t}.embed_tokens.weight"] = rng.normal(0, 0.5, (text["vocab_size"], size)).astype(
        np.float32
    )
    for i in range(text["num_hidden_layers"]):
        layer = f"{t}.layers.{i}"
        keys = text["num_key_value_heads"] * head
        for part, rows in (("q", size), ("k", keys), ("v", keys), ("o", size)):
            matrix(f"{layer}.self_attn.{part}_proj.weight", rows, size, gain=2.0)
        for part in ("gate", "up"):
            matrix(f"{layer}.mlp.{part}_proj.weight", inner, size, gain=2.0)
        matrix(f"{layer}.mlp.down_proj.weight", size, inner, gain=2.0)
        vector(f"{layer}.input_layernorm.weight", size, 1.0)
        vector(f"{layer}.post_attention_layernorm.weight", size, 1.0)
    vector(f"{t}.norm.weight", size, 1.0)
    return found


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        ),
    )
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    return tokenizer


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
