"""Qwen2.5-VL: as Qwen2-VL."""

from __future__ import annotations

from rkvlmd.models.families import Family, qwen2_vl

FAMILY = Family(name="qwen2_5_vl", template=qwen2_vl.FAMILY.template, film="run")
