"""SmolVLM: sub-pictures with their row and column, then the whole picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rkvlmd.models.families import Family

if TYPE_CHECKING:
    from rkvlmd.models.geometry import Cuts
    from rkvlmd.models.manifest import Tags

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
FAKE = "<fake_token_around_image>"
WHOLE = "<global-img>"


def layout(tags: Tags, cuts: Cuts) -> list[str | int]:
    """Return rows of sub-pictures, each row a line, and after an empty line the whole picture.

    A picture that is not split gets the tags of the manifest alone.
    """
    if not cuts.rows:
        return [tags.start, 0, tags.end]
    line: list[str | int] = []
    for row in range(cuts.rows):
        for column in range(cuts.columns):
            line += [f"{FAKE}<row_{row + 1}_col_{column + 1}>", cuts.cell(row, column)]
        line.append("\n")
    if cuts.whole is not None:
        line += [f"\n{FAKE}{WHOLE}", cuts.whole]
    return [*line, FAKE]


FAMILY = Family(name="smolvlm", template=_TEMPLATE, layout=layout)
