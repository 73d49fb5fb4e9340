"""SmolVLM (Idefics3): every picture is one run of image tokens between tags of the manifest."""

from __future__ import annotations

from rkvlmd.models.families import Family

# As published with SmolVLM-Instruct's processor; it wants content as a list of parts.
_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

FAMILY = Family(name="smolvlm", template=_TEMPLATE)
