"""A tiny CLIP with random weights: as transformers computes it, and as it is published."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as words

SIDE, SIZE, PLACES = 32, 24, 16
START, END = 97, 98
WORDS = ("a", "red", "green", "blue", "picture", "of", "nothing")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """The model; ``publish`` writes the folder that somebody downloads.

    ``end`` is what its configuration says of the id that ends a text.
    """

    def __init__(self, end: int = END) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            from transformers import CLIPConfig, CLIPModel

            self.torch = torch
            torch.manual_seed(3)
            both = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
                    "num_attention_heads": 4}  # fmt: skip
            text = {**both, "vocab_size": 99, "max_position_embeddings": PLACES,
                    "bos_token_id": START, "eos_token_id": end, "pad_token_id": END}  # fmt: skip
            eyes = {**both, "image_size": SIDE, "patch_size": 8}
            config = CLIPConfig(text_config=text, vision_config=eyes, projection_dim=SIZE)
            self.model: Any = CLIPModel._from_config(config, attn_implementation="eager").eval()
            self.model.requires_grad_(False)  # so that its weights become constants

    def checkpoint(self, folder: Path) -> Path:
        """Write what the trainer publishes: weights and configuration."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(folder)
        self._beside(folder)
        return folder

    def publish(self, folder: Path, *, whole: bool = False) -> Path:
        """Write what converters publish: graphs in ``onnx``, configuration beside it.

        A graph for each tower, or with ``whole`` one for both.
        """
        (folder / "onnx").mkdir(parents=True)
        self.model.config.save_pretrained(folder)
        self._beside(folder)
        torch, model = self.torch, self.model

        class Text(torch.nn.Module):  # type: ignore[misc, name-defined]
            def forward(self, input_ids: Any) -> Any:
                found = model.text_model(input_ids=input_ids)
                return model.text_projection(found.pooler_output), found.last_hidden_state

        class Eyes(torch.nn.Module):  # type: ignore[misc, name-defined]
            def forward(self, pixel_values: Any) -> Any:
                found = model.vision_model(pixel_values=pixel_values)
                # In this order in some exports; the vector is known by its name.
                return found.last_hidden_state, model.visual_projection(found.pooler_output)

        class Both(torch.nn.Module):  # type: ignore[misc, name-defined]
            def forward(self, input_ids: Any, pixel_values: Any) -> Any:
                found = model(input_ids=input_ids, pixel_values=pixel_values)
                return found.logits_per_image, found.text_embeds, found.image_embeds

        ids, pixels = torch.tensor([[START, 5, END]]), torch.zeros(1, 3, SIDE, SIDE)
        if whole:
            outs = ["logits_per_image", "text_embeds", "image_embeds"]
            self._graph(folder, "model", Both(), {"input_ids": ids, "pixel_values": pixels}, outs)
            return folder
        outs = ["text_embeds", "last_hidden_state"]
        self._graph(folder, "text_model", Text(), {"input_ids": ids}, outs)
        outs = ["last_hidden_state", "image_embeds"]
        self._graph(folder, "vision_model", Eyes(), {"pixel_values": pixels}, outs)
        return folder

    def _graph(
        self, folder: Path, name: str, module: Any, takes: dict[str, Any], outs: list[str]
    ) -> None:
        axes = {key: {0: "batch"} for key in (*takes, *outs)}
        if "input_ids" in takes:
            axes["input_ids"] = {0: "texts", 1: "places"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.torch.onnx.export(
                module, tuple(takes.values()), str(folder / "onnx" / f"{name}.onnx"),
                input_names=list(takes), output_names=outs, dynamo=False, opset_version=17,
                dynamic_axes=axes,
            )  # fmt: skip

    def _beside(self, folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES))
        _tokenizer().save(str(folder / "tokenizer.json"))

    def of_text(self, said: str) -> npt.NDArray[np.float32]:
        """Return the vector of a text, of length one."""
        ids = [START, *_tokenizer().encode(said).ids, END]
        with self.torch.no_grad():
            found = self.model.get_text_features(input_ids=self.torch.tensor([ids]))
        return _unit(found)

    def vectors(
        self, tokens: list[int], pixels: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return the vectors, of length one, of a text's tokens and of a picture's pixels."""
        torch = self.torch
        with torch.no_grad():
            said = self.model.get_text_features(input_ids=torch.tensor([tokens]))
            seen = self.model.get_image_features(pixel_values=torch.from_numpy(pixels))
        return _unit(said), _unit(seen)

    def of_picture(self, picture: Any) -> npt.NDArray[np.float32]:
        """Return the vector of a Pillow image, of length one."""
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        pixels = CLIPImageProcessorPil(**PICTURES)(picture, return_tensors="pt")["pixel_values"]
        with self.torch.no_grad():
            found = self.model.get_image_features(pixel_values=pixels)
        return _unit(found)


#: As openai/clip-vit-base-patch32 has it, for a smaller picture; sizes are plain numbers there.
PICTURES = {
    "crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "image_mean": MEAN, "image_std": STD, "resample": 3, "size": SIDE,
}  # fmt: skip


def _tokenizer() -> Tokenizer:
    vocabulary = {word: 3 + i for i, word in enumerate(WORDS)}
    vocabulary |= {"<|startoftext|>": START, "<|endoftext|>": END}
    made = Tokenizer(words.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(t, special=True) for t in list(vocabulary)[-2:]])
    return made


def _unit(found: Any) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = getattr(found, "pooler_output", found)[0].numpy()
    return values / np.linalg.norm(values)
