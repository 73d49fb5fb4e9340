"""Qwen3-VL: patches of 16 pixels; its template has no system text of its own."""

from __future__ import annotations

from rkvlmd.models.families import Family
from rkvlmd.models.families.chatml import chatml
from rkvlmd.models.families.qwen2_vl import PICTURE

FAMILY = Family(name="qwen3_vl", template=chatml(PICTURE), film="timed")
