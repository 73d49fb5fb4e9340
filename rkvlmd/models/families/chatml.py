"""The chat template that most families share: ChatML, each with its own picture and system text."""

from __future__ import annotations


def chatml(picture: str, *, system: str = "", between: str = "", answer: str = "") -> str:
    """Return a Jinja template.

    ``picture`` stands for each picture, ``between`` after each part of a
    message but the last, ``system`` for a conversation without a system
    message. ``answer`` is Jinja at the beginning of an answer.
    """
    default = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
        + system
        + "<|im_end|>\\n' }}{% endif %}"
        if system
        else ""
    )
    return (
        default + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% elif part['type'] == 'image' %}{{ '"
        + picture
        + "' }}{% endif %}"
        + ("{% if not loop.last %}{{ '" + between + "' }}{% endif %}" if between else "")
        + "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + answer + "{% endif %}"
    )


def thinking(begun: str = "") -> str:
    """Return an ``answer`` that begins with ``begun`` to think aloud, else with no thoughts.

    ``enable_thinking`` is the variable of the published templates. Not to
    think is the default here, whatever it is there: thoughts take minutes on a
    board.
    """
    return (
        "{% if enable_thinking is defined and enable_thinking %}{{ '"
        + begun
        + "' }}{% else %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    )
