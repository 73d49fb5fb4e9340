"""LLaVA-1.5: a CLIP tower, one run of tokens; pictures come before the text of their message."""

from __future__ import annotations

from rkvlmd.models.families import Family

FAMILY = Family(
    name="llava",
    # As published with llava-1.5-7b-hf.
    template=(
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}"
        "{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
        "{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
)
