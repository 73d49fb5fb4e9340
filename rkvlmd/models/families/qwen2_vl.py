"""Qwen2-VL: pictures of any size in patches of 14 pixels, one run of tokens each."""

from __future__ import annotations

from rkvlmd.models.families import Family
from rkvlmd.models.families.chatml import chatml

#: What the published templates write for a picture; the processor repeats the middle one.
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "You are a helpful assistant."

FAMILY = Family(name="qwen2_vl", template=chatml(PICTURE, system=SYSTEM), film="run")
