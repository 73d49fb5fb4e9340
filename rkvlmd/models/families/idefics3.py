"""Idefics3: as SmolVLM, with a template that begins with its own first token."""

from __future__ import annotations

from rkvlmd.models.families import Family, smolvlm

FAMILY = Family(
    name="idefics3",
    template=smolvlm.FAMILY.template.replace("<|im_start|>", "<|begin_of_text|>"),
    layout=smolvlm.layout,
)
