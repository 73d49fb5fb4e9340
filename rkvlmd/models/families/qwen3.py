"""Qwen3: text alone; without a template of the model it answers without thinking aloud."""

from __future__ import annotations

from rkvlmd.models.families import Family
from rkvlmd.models.families.chatml import chatml

FAMILY = Family(name="qwen3", template=chatml("", answer="<think>\\n\\n</think>\\n\\n"))
