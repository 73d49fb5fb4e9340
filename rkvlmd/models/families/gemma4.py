"""Gemma 4: turns as Gemma 3, between tokens of its own."""

from __future__ import annotations

from rkvlmd.models.families import Family, gemma3

FAMILY = Family(name="gemma4", template=gemma3.turns("<|image|>", "<|turn>", "<turn|>"))
