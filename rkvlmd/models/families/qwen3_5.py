"""Qwen3.5: as Qwen3-VL; without a template of the model it thinks aloud only when asked to."""

from __future__ import annotations

from rkvlmd.models.families import Family
from rkvlmd.models.families.chatml import chatml, thinking
from rkvlmd.models.families.qwen2_vl import PICTURE

FAMILY = Family(
    name="qwen3_5", template=chatml(PICTURE, answer=thinking("<think>\\n")), film="timed"
)
