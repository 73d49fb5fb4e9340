"""The OpenAI chat API: request bytes to ``ChatRequest``, and answers to bytes."""

from __future__ import annotations

from rkvlmd.wire.openai_answer import Answer, error_body, model_card, model_list
from rkvlmd.wire.openai_parse import parse_chat

__all__ = ["Answer", "error_body", "model_card", "model_list", "parse_chat"]
