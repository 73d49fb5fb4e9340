"""Janus-Pro: one run of tokens a picture; its turns are words, not tokens."""

from __future__ import annotations

from rkvlmd.models.families import Family

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual"
    " content that the user provides, and assist the user with a variety of tasks using natural"
    " language."
)

FAMILY = Family(
    name="janus",
    template=(
        "{% if messages[0]['role'] != 'system' %}{{ '" + SYSTEM + "\\n\\n' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '<|User|>: ' }}"
        "{% elif message['role'] == 'assistant' %}{{ '<|Assistant|>: ' }}{% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<image_placeholder>' }}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{{ '<\uff5cend\u2581of\u2581sentence\uff5c>' if message['role'] == 'assistant' else '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"
    ),
)
