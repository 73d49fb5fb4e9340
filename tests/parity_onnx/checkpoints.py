"""Tiny random checkpoints of every family, written by transformers as its folders are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

#: Tokens that every folder's tokenizer has first, in this order.
SPECIALS = (
    "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>",
    "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<IMG_CONTEXT>",
    "<img>", "</img>", "<image_soft_token>", "<start_of_image>", "<end_of_image>",
    "<image_placeholder>", "<begin_of_image>", "<bos>", "<eos>", "<pad>",
)  # fmt: skip
IDS = {text: i for i, text in enumerate(SPECIALS)}
VOCABULARY = 320
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ marker }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
)
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": IDS["<bos>"],
    "eos_token_id": IDS["<|im_end|>"],
    "pad_token_id": IDS["<pad>"],
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 16}
LAYERED = LLAMA | {
    "head_dim": 16,
    "num_hidden_layers": 5,
    "sliding_window": 12,
    "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "full_attention",
    ],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PATCHES: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
}
QWEN_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}


@dataclass(frozen=True)
class Kind:
    """One family: its class in transformers, its configuration, its picture's tokens.

    ``grids``: pictures are flattened patches of these grids; else they are
    ``side`` pixels square and have ``tokens`` tokens. ``around`` stands before
    and after a picture.
    """

    name: str
    model: str
    config: dict[str, Any]
    image: str = ""
    around: tuple[str, str] = ("", "")
    side: int = 32
    tokens: int = 4
    grids: tuple[tuple[int, int, int], ...] = ()
    picture: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def marker(self) -> str:
        """What the published templates write for a picture."""
        if self.grids:
            return self.image.join(self.around)
        return "<start_of_image>" if self.name == "gemma3" else self.image


def _qwen(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, **QWEN_IDS, **more}


def _rope(sections: list[int], theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}


_GRIDS = ((1, 4, 6), (1, 8, 2))
_VISION = ("<|vision_start|>", "<|vision_end|>")
_QWEN_PICTURE = {
    "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 8 * 8 * 2,
    "max_pixels": 8 * 8 * 12,
}  # fmt: skip

KINDS = {
    kind.name: kind
    for kind in (
        Kind("qwen3", "Qwen3ForCausalLM", QWEN3 | {"tie_word_embeddings": True}),
        Kind(
            "gemma3n",
            "Gemma3nForCausalLM",
            LAYERED
            | {
                "laurel_rank": 8, "altup_num_inputs": 3, "final_logit_softcapping": 30.0,
                "activation_sparsity_pattern": [0.8, 0.0, 0.8, 0.0, 0.0],
            },
        ),
        Kind(
            "gemma4",
            "Gemma4ForCausalLM",
            LAYERED
            | {
                "global_head_dim": 24, "use_double_wide_mlp": True,
                "vocab_size_per_layer_input": VOCABULARY,
            },
        ),
        Kind(
            "llava",
            "LlavaForConditionalGeneration",
            {
                "text_config": LLAMA | {"model_type": "llama"},
                "vision_config": VIT | {"model_type": "clip_vision_model", "projection_dim": 16},
                "image_token_index": IDS["<image>"],
                "image_seq_length": 16,
            },
            image="<image>",
            tokens=16,
        ),
        Kind(
            "internvl",
            "InternVLForConditionalGeneration",
            {
                "text_config": LLAMA | {"model_type": "qwen2"},
                "vision_config": VIT
                | {"model_type": "internvl_vision", "attention_bias": True},
                "image_token_id": IDS["<IMG_CONTEXT>"],
                "image_seq_length": 4,
            },
            image="<IMG_CONTEXT>",
            around=("<img>", "</img>"),
            picture={
                "size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1,
                "max_patches": 4,
            },
        ),
        Kind(
            "smolvlm",
            "SmolVLMForConditionalGeneration",
            {
                "text_config": LLAMA | {"model_type": "llama"},
                "vision_config": VIT,
                "image_token_id": IDS["<image>"],
                "scale_factor": 2,
            },
            image="<image>",
            around=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
        ),
        Kind(
            "idefics3",
            "Idefics3ForConditionalGeneration",
            {
                "text_config": LLAMA | {"model_type": "llama"},
                "vision_config": VIT,
                "image_token_id": IDS["<image>"],
                "scale_factor": 2,
            },
            image="<image>",
            around=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
        ),
        Kind(
            "janus",
            "JanusForConditionalGeneration",
            {
                "text_config": LLAMA | {"model_type": "llama"},
                "vision_config": {
                    **{k: v for k, v in VIT.items() if k != "intermediate_size"},
                    "projection_dim": 64,
                    "mlp_ratio": 2.0,
                    "num_image_tokens": 16,
                },
                "vq_config": {
                    "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
                    "embed_dim": 4, "num_embeddings": 8, "latent_channels": 32,
                    "projection_dim": 8, "image_token_embed_dim": 8,
                },
                "image_token_id": IDS["<image_placeholder>"],
            },
            image="<image_placeholder>",
            around=("<begin_of_image>", "<end_of_image>"),
            tokens=16,
        ),
        Kind(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            {
                "text_config": LLAMA
                | {
                    "head_dim": 16,
                    "query_pre_attn_scalar": 24,
                    "sliding_window": 12,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                    "rope_parameters": {
                        "full_attention": {
                            "rope_type": "linear", "factor": 8.0, "rope_theta": 1e6,
                        },
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    },
                },
                "vision_config": VIT | {"model_type": "siglip_vision_model"},
                "mm_tokens_per_image": 4,
                "image_token_index": IDS["<image_soft_token>"],
                "boi_token_index": IDS["<start_of_image>"],
                "eoi_token_index": IDS["<end_of_image>"],
            },
            image="<image_soft_token>",
            around=("<start_of_image>", "<end_of_image>"),
            picture={"size": {"height": 32, "width": 32}, "resample": 2},
            seed=5,
        ),
        Kind(
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            _qwen(
                LLAMA | {"rope_parameters": _rope([2, 3, 3], 1e6)},
                {
                    "depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2,
                    "mlp_ratio": 2, "patch_size": 4, "temporal_patch_size": 2,
                    "spatial_merge_size": 2,
                },
            ),
            image="<|image_pad|>",
            around=_VISION,
            grids=_GRIDS,
            picture=_QWEN_PICTURE,
        ),
        Kind(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            _qwen(
                LLAMA | {"rope_parameters": _rope([2, 3, 3], 1e6)},
                PATCHES | {"window_size": 16, "fullatt_block_indexes": [1]},
            ),
            image="<|image_pad|>",
            around=_VISION,
            grids=_GRIDS,
            picture=_QWEN_PICTURE,
        ),
        Kind(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            _qwen(
                LLAMA
                | {
                    "head_dim": 16,
                    "rope_parameters": _rope([4, 2, 2], 5e6, mrope_interleaved=True),
                },
                PATCHES
                | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 36},
                tie_word_embeddings=True,
            ),
            image="<|image_pad|>",
            around=_VISION,
            grids=_GRIDS,
            picture=_QWEN_PICTURE,
        ),
        Kind(
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            _qwen(
                LLAMA
                | {
                    "head_dim": 32,
                    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                    "linear_key_head_dim": 8, "linear_value_head_dim": 12,
                    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                    "rope_parameters": _rope(
                        [2, 1, 1], 1e6, mrope_interleaved=True, partial_rotary_factor=0.25
                    ),
                },
                PATCHES | {"num_position_embeddings": 36},
            ),
            image="<|image_pad|>",
            around=_VISION,
            grids=_GRIDS,
            picture=_QWEN_PICTURE,
        ),
    )
}  # fmt: skip


def quiet(work: Callable[[], Any]) -> Any:
    """Call into transformers and torch, whose own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def make(kind: Kind, folder: Path) -> Any:
    """Write a checkpoint folder; return the model, ready to be compared with."""

    def build() -> Any:
        import torch
        import transformers

        cls = getattr(transformers, kind.model)
        torch.set_num_threads(1)  # The models are too small to share between threads.
        torch.manual_seed(kind.seed)
        model = cls(cls.config_class(**kind.config)).eval().float()
        model.set_attn_implementation("eager")
        _shake(model, kind.seed, IDS.get(kind.image))
        model.save_pretrained(folder)
        return model

    model = quiet(build)
    _files(kind, folder)
    return model


def _shake(model: Any, seed: int, image: int | None) -> None:
    """Give weights that are large enough for the greedy tokens to vary, each the same bytes."""
    import torch

    rng = np.random.default_rng(seed)
    gemma = "gemma" in type(model).__name__.lower()
    done: set[int] = set()
    for name, values in model.named_parameters():
        if values.data_ptr() in done:
            continue
        done.add(values.data_ptr())
        shape = tuple(values.shape)
        if "embed_tokens" in name:
            new = rng.normal(0, 0.03 if gemma else 0.1, shape)
        elif len(shape) > 1 and not name.endswith(("position_embeddings", "cls_token")):
            new = rng.normal(0, 2.0 / np.sqrt(np.prod(shape[1:])), shape)
        elif name.endswith(("norm.weight", "_norm.weight", "weight", "lambda_1", "lambda_2")):
            centre = 0.0 if gemma and "norm" in name else 1.0
            new = rng.normal(centre, 0.1, shape)
        else:
            new = rng.normal(0, 0.1, shape)
        if image is not None and ("embed_tokens" in name or "lm_head" in name):
            new[image] = 0.0  # No answer holds it: transformers would look for a picture.
        with torch.no_grad():
            values.copy_(torch.from_numpy(new))

    for name, values in model.named_buffers():
        if name.endswith("layer_scalar"):
            values.fill_(0.9)


def _files(kind: Kind, folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["What is in this picture? A small red circle on the left of the large star."] * 2,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    template = TEMPLATE.replace("{{ marker }}", "{{ '" + kind.marker + "' }}")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    picture = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3} | kind.picture
    (folder / "preprocessor_config.json").write_text(json.dumps(picture), encoding="utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": IDS["<|im_end|>"]}), encoding="utf-8"
    )
