"""Gemma 3n: turns as Gemma 3."""

from __future__ import annotations

from rkvlmd.models.families import Family, gemma3

FAMILY = Family(
    name="gemma3n",
    template=gemma3.turns("<image_soft_token>", "<start_of_turn>", "<end_of_turn>"),
)
