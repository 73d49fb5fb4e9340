"""Writes a trained model as a folder in the layout of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from demoworld.draw import SIDE
from demoworld.tokens import (
    END,
    END_ID,
    FAKE,
    GLOBAL,
    IMAGE,
    PAD,
    PAD_ID,
    START,
    START_ID,
    TEMPLATE,
)

PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "SmolVLMImageProcessor",
    "processor_class": "SmolVLMProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_image_splitting": False,
    "max_image_size": {"longest_edge": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": False,
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": START,
    "eos_token": END,
    "pad_token": PAD,
    "fake_image_token": FAKE,
    "image_token": IMAGE,
    "global_image_token": GLOBAL,
    "end_of_utterance_token": END,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
}


def write_folder(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Writes weights, configuration, tokenizer, chat template and picture rules."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    generation = {
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "do_sample": False,
        "max_new_tokens": 128,
    }
    for name, value in (
        ("preprocessor_config.json", PREPROCESSOR),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", generation),
        ("processor_config.json", {"processor_class": "SmolVLMProcessor", "image_seq_len": 64}),
    ):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
