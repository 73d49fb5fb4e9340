"""The families that are compared: a manifest each, and the image processor with real values.

The values are those of each checkpoint's ``preprocessor_config.json``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from rkvlmd.models.manifest import (
    Decoder,
    Encoder,
    File,
    Manifest,
    Patches,
    Resize,
    Tags,
)

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BICUBIC, BILINEAR, LANCZOS = 3, 2, 1
NOTHING = File(file="nothing", sha256="0" * 64)


@dataclass(frozen=True)
class Case:
    """A family: ``processor`` is the module and class of its image processor."""

    name: str
    family: str
    encoders: tuple[Encoder, ...]
    processor: tuple[str, str]
    values: dict[str, Any]
    tags: Tags
    marker: str
    specials: tuple[str, ...] = ()
    #: The whole processor: module, class, its arguments, and names of tokens of the tokenizer.
    whole: tuple[str, str, dict[str, Any], dict[str, str]] | None = None

    @property
    def manifest(self) -> Manifest:
        """The model's manifest; nothing in it but pictures and prompt means anything."""
        return Manifest(
            schema=1, name=self.name, family=self.family, encoders=self.encoders,
            decoder=Decoder(engine="onnx", files={"embed": NOTHING, "decoder": NOTHING},
                            context=1 << 20, embedding=8),
            tokenizer=File(file="tokenizer.json", sha256="0" * 64), image=self.tags,
            marker=self.marker,
        )  # fmt: skip

    def image_processor(self) -> Any:
        """Make the image processor, from its values alone."""
        if self.name not in _MADE:
            module, name = self.processor
            _MADE[self.name] = _load(module, name)(do_convert_rgb=True, **self.values)
        return _MADE[self.name]


_MADE: dict[str, Any] = {}


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def encoder(width: int, height: int, tokens: int, norm: Any, **more: Any) -> Encoder:
    """Return an encoder of the CPU engine, normalising by ``norm``."""
    return Encoder(
        engine="onnx", file="v.onnx", sha256="0" * 64, width=width, height=height, tokens=tokens,
        embedding=8, mean=norm[0], std=norm[1], **more,
    )  # fmt: skip


def _norm(norm: Any, resample: int) -> dict[str, Any]:
    return {"image_mean": list(norm[0]), "image_std": list(norm[1]), "resample": resample}


def _qwen(name: str, size: int, norm: Any, least: int, most: int, more: dict[str, Any]) -> Case:
    unit = 2 * size
    side = int(most**0.5) // unit * unit
    resize = Resize(rule="aspect", multiple=unit, min_pixels=least, max_pixels=most)
    patches = Patches(size=size, temporal=2, merge=2)
    large = encoder(side, side, most // unit**2, norm, resize=resize, patches=patches)
    return Case(
        name, name, (large,), ("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
        {"size": {"shortest_edge": least, "longest_edge": most}, "patch_size": size,
         "temporal_patch_size": 2, "merge_size": 2, **_norm(norm, BICUBIC)},
        Tags(start="<|vision_start|>", content="<|image_pad|>", end="<|vision_end|>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
        ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>",
         "<|video_pad|>"),
        **more,
    )  # fmt: skip


def _processor(module: str, name: str, tokens: dict[str, str] | None = None, **more: Any) -> Any:
    return {"whole": (module, name, more, tokens or {})}


FAKE = "<fake_token_around_image>"
SMOLVLM = Resize(rule="split", resample="lanczos", longest=2048)

CASES = (
    _qwen("qwen2_vl", 14, CLIP, 3136, 12845056,
          _processor("qwen2_vl.processing_qwen2_vl", "Qwen2VLProcessor", video_processor=None)),
    _qwen("qwen2_5_vl", 14, CLIP, 3136, 200704,
          _processor("qwen2_5_vl.processing_qwen2_5_vl", "Qwen2_5_VLProcessor",
                     video_processor=None)),
    _qwen("qwen3_vl", 16, HALF, 65536, 16777216,
          _processor("qwen3_vl.processing_qwen3_vl", "Qwen3VLProcessor", video_processor=None)),
    _qwen("qwen3_5", 16, HALF, 65536, 16777216,
          _processor("qwen3_vl.processing_qwen3_vl", "Qwen3VLProcessor", video_processor=None)),
    Case(
        "internvl", "internvl",
        (encoder(448, 448, 256, IMAGENET,
                 resize=Resize(rule="tiles", max_tiles=12, thumbnail=True)),),
        ("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil"),
        {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "min_patches": 1,
         "max_patches": 12, **_norm(IMAGENET, BICUBIC)},
        Tags(start="<img>", content="<IMG_CONTEXT>", end="</img>"), "<IMG_CONTEXT>",
        ("<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>", "<video>"),
        **_processor("internvl.processing_internvl", "InternVLProcessor",
                     {"start_image_token": "<img>", "end_image_token": "</img>",
                      "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
                     image_seq_length=256, video_processor=None),
    ),
    Case(
        "smolvlm", "smolvlm", (encoder(512, 512, 64, HALF, resize=SMOLVLM),),
        ("smolvlm.image_processing_pil_smolvlm", "SmolVLMImageProcessorPil"),
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512},
         "return_row_col_info": True, **_norm(HALF, LANCZOS)},
        Tags(start=f"{FAKE}<global-img>", content="<image>", end=FAKE), "<image>",
        ("<|im_start|>", "<end_of_utterance>", FAKE, "<global-img>", "<image>",
         *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))),
        # SmolVLM's own processor needs a package for its words about videos alone.
        **_processor("idefics3.processing_idefics3", "Idefics3Processor", image_seq_len=64),
    ),
    Case(
        "idefics3", "idefics3",
        (encoder(364, 364, 169, HALF,
                 resize=Resize(rule="split", resample="lanczos", longest=4 * 364)),),
        ("idefics3.image_processing_pil_idefics3", "Idefics3ImageProcessorPil"),
        {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364},
         "return_row_col_info": True, **_norm(HALF, LANCZOS)},
        Tags(start=f"{FAKE}<global-img>", content="<image>", end=FAKE), "<image>",
        ("<|begin_of_text|>", "<end_of_utterance>", FAKE, "<image>"),
        **_processor("idefics3.processing_idefics3", "Idefics3Processor", image_seq_len=169),
    ),
    Case(
        "llava", "llava",
        (encoder(336, 336, 576, CLIP, resize=Resize(rule="crop", short=336, fill=(0, 0, 0))),),
        ("clip.image_processing_pil_clip", "CLIPImageProcessorPil"),
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
         "do_center_crop": True, **_norm(CLIP, BICUBIC)},
        Tags(content="<image>"), "<image>", ("<image>",),
        **_processor("llava.processing_llava", "LlavaProcessor", patch_size=14,
                     vision_feature_select_strategy="default", num_additional_image_tokens=1),
    ),
    Case(
        "gemma3", "gemma3",
        (encoder(896, 896, 256, HALF, resize=Resize(rule="stretch", resample="bilinear")),),
        ("gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil"),
        {"size": {"height": 896, "width": 896}, "do_pan_and_scan": False,
         **_norm(HALF, BILINEAR)},
        Tags(start="\n\n<start_of_image>", content="<image_soft_token>", end="<end_of_image>\n\n"),
        "<start_of_image>",
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
         "<image_soft_token>"),
        **_processor("gemma3.processing_gemma3", "Gemma3Processor",
                     {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                      "image_token": "<image_soft_token>"}, image_seq_length=256),
    ),
    Case(
        "janus", "janus",
        (encoder(384, 384, 576, HALF,
                 resize=Resize(rule="pad", short=14, fill=(127, 127, 127))),),
        ("janus.image_processing_pil_janus", "JanusImageProcessorPil"),
        {"size": {"height": 384, "width": 384}, "min_size": 14, **_norm(HALF, BICUBIC)},
        Tags(start="<begin_of_image>", content="<image_placeholder>", end="<end_of_image>"),
        "<image_placeholder>",
        ("<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<|User|>", "<|Assistant|>"),
        **_processor("janus.processing_janus", "JanusProcessor",
                     {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>",
                      "eoi_token": "<end_of_image>"}),
    ),
    Case(
        "minicpmv", "minicpmv",
        (encoder(448, 448, 64, HALF,
                 resize=Resize(rule="slices", multiple=56, max_tiles=9)),),
        # The processor of MiniCPM-V 4.6; that of 2.6, which transformers has not, differs in the
        # multiple alone (14).
        ("minicpmv4_6.image_processing_pil_minicpmv4_6", "MiniCPMV4_6ImageProcessorPil"),
        {"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14, "slice_mode": True,
         "downsample_mode": "16x", **_norm(HALF, BICUBIC)},
        Tags(start="<image>", content="<unk>", end="</image>"), "(<image>./</image>)",
        ("<|im_start|>", "<|im_end|>", "<image>", "</image>", "<slice>", "</slice>", "<unk>",
         "<image_id>", "</image_id>"),
    ),
    Case(
        "deepseek_ocr", "deepseek_ocr",
        (encoder(1024, 1024, 273, HALF,
                 resize=Resize(rule="base_tiles", min_tiles=2, max_tiles=9, fill=(127, 127, 127))),
         encoder(640, 640, 100, HALF, tile=True)),
        # The processor of DeepSeek-OCR 2: the same cuts with other numbers.
        ("deepseek_ocr2.image_processing_pil_deepseek_ocr2", "DeepseekOcr2ImageProcessorPil"),
        {"size": {"height": 1024, "width": 1024}, "tile_size": 640, "min_patches": 2,
         "max_patches": 9, "background_color": [127, 127, 127], **_norm(HALF, BICUBIC)},
        Tags(content="<image>"), "<image>", ("<image>",),
    ),
)  # fmt: skip

#: One whose processor cuts pictures out where the model's own code pads them: the same prompt.
FASTVLM = Case(
    "fastvlm", "fastvlm",
    (encoder(1024, 1024, 256, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
             resize=Resize(rule="pad", fill=(0, 0, 0))),),
    ("clip.image_processing_pil_clip", "CLIPImageProcessorPil"),
    {"size": {"shortest_edge": 1024}, "crop_size": {"height": 1024, "width": 1024},
     "do_center_crop": True, "image_mean": [0.0] * 3, "image_std": [1.0] * 3},
    Tags(content="<image>"), "<image>", ("<|im_start|>", "<|im_end|>", "<image>"),
    **_processor("llava.processing_llava", "LlavaProcessor", patch_size=64,
                 vision_feature_select_strategy="full", num_additional_image_tokens=0),
)  # fmt: skip

#: Two whose processors are those of a later version: other numbers of tokens, the same layout.
LATER = (
    replace(
        next(case for case in CASES if case.name == "minicpmv"),
        encoders=(
            encoder(448, 448, 64, HALF, resize=Resize(rule="slices", multiple=56, max_tiles=9),
                    patches=Patches(size=14, merge=4)),
        ),
        specials=("<|im_start|>", "<|im_end|>", "<image>", "</image>", "<slice>", "</slice>",
                  "<unk>", "<image_id>", "</image_id>", "<video>"),
        **_processor("minicpmv4_6.processing_minicpmv4_6", "MiniCPMV4_6Processor",
                     {"image_token": "<unk>", "video_token": "<video>",
                      "image_start_token": "<image>", "image_end_token": "</image>",
                      "slice_start_token": "<slice>", "slice_end_token": "</slice>",
                      "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"},
                     video_processor=SimpleNamespace(slice_mode=False, downsample_mode="16x")),
    ),
    replace(
        next(case for case in CASES if case.name == "deepseek_ocr"),
        encoders=(
            encoder(1024, 1024, 257, HALF,
                    resize=Resize(rule="base_tiles", min_tiles=2, max_tiles=9)),
            encoder(640, 640, 100, HALF, tile=True),
        ),
        **_processor("deepseek_ocr2.processing_deepseek_ocr2", "DeepseekOcr2Processor"),
    ),
)  # fmt: skip
