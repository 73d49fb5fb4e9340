"""CLIP: towers without a conversation, for embeddings of pictures and texts."""

from __future__ import annotations

from rkvlmd.models.families import Family

# What the published tokenizer's post-processor puts around every text.
_TEMPLATE = (
    "<|startoftext|>{% for message in messages %}{{ message['content'] }}{% endfor %}<|endoftext|>"
)

FAMILY = Family(name="clip", template=_TEMPLATE)
