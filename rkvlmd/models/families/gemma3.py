"""Gemma 3: a SigLIP tower of one size; the system message is the beginning of the first turn."""

from __future__ import annotations

from rkvlmd.models.families import Family


def turns(picture: str, start: str, end: str) -> str:
    """Return the template of the Gemma models, whose turns stand between ``start`` and ``end``."""
    content = (
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + picture + "' }}"
        "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
        "{% endif %}"
    )
    return (
        "{{ '<bos>' }}{% set first = '' %}{% set rest = messages %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% if messages[0]['content'] is string %}"
        "{% set first = messages[0]['content'] + '\\n\\n' %}{% else %}"
        "{% set first = messages[0]['content'][0]['text'] + '\\n\\n' %}{% endif %}"
        "{% set rest = messages[1:] %}{% endif %}"
        "{% for message in rest %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '" + start + "' + role + '\\n' + (first if loop.first else '') }}" + content + "{{ '"
        + end + "\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + start + "model\\n' }}{% endif %}"
    )  # fmt: skip


FAMILY = Family(
    name="gemma3", template=turns("<start_of_image>", "<start_of_turn>", "<end_of_turn>")
)
