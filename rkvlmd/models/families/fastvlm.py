"""FastVLM: one run of tokens a picture, on a line of its own before the text; turns of Qwen2."""

from __future__ import annotations

from rkvlmd.models.families import Family
from rkvlmd.models.families.chatml import chatml

FAMILY = Family(
    name="fastvlm",
    template=chatml("<image>", system="You are a helpful assistant.", between="\\n"),
)
