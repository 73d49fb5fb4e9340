"""DeepSeek-OCR: tiles first, then the whole picture, in one run of tokens; no turns at all."""

from __future__ import annotations

from rkvlmd.models.families import Family

FAMILY = Family(
    name="deepseek_ocr",
    # The published prompts are the plain text after the picture: "<image>\nFree OCR."
    template=(
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<image>' }}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    ),
)
