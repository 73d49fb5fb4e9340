"""Qwen3: text alone; without a template of the model it thinks aloud only when asked to."""

from __future__ import annotations

from rkvlmd.models.families import Family
from rkvlmd.models.families.chatml import chatml, thinking

FAMILY = Family(name="qwen3", template=chatml("", answer=thinking()))
