"""Known defects of versions of ``librkllmrt.so``, each with its source: the one place for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Defect:
    """Something that a version does wrong, and what is done about it.

    ``versions`` empty means all; ``families`` empty means every model.
    ``source`` is an issue of airockchip/rknn-llm unless it says otherwise.
    """

    name: str
    text: str
    source: str
    versions: tuple[str, ...] = ()
    families: tuple[str, ...] = ()


OLD = ("1.2.1", "1.2.2", "1.2.3")

#: ``name`` is what the code asks for; entries that only describe have no caller.
DEFECTS = (
    Defect(
        "no_prefix_reuse",
        "The cache is cleared by the library before every run.",
        "#517, #519",
        families=("qwen3_5",),
    ),
    Defect(
        "leaks",
        "Each run keeps about 2 MB: the child is recycled after RECYCLE_RUNS runs.",
        "#529",
        versions=("1.3.0",),
        families=("qwen3_5",),
    ),
    Defect(
        "no_prompt_cache",
        "A prompt cache cannot be saved.",
        "#517",
        families=("qwen3_5",),
    ),
    Defect(
        "prompt_cache_cut_at_picture",
        "A saved prompt cache ends at the first picture: only text before it is saved.",
        "#492",
        versions=OLD,
    ),
    Defect(
        "mixes_pictures",
        "Several pictures in one prompt are mixed up: a request with more than one is refused.",
        "#418, #468, #493",
        versions=OLD,
        families=("qwen3_vl",),
    ),
    Defect(
        "one_picture",
        "Several pictures in one prompt do not work before 1.2.2.",
        "#345, #418, #420",
        versions=("1.2.1",),
    ),
    Defect(
        "pictures_blend",
        "A different picture with the same text can get the first one's answer: the cache is"
        " cleared unless the probe at load has shown that pictures are told apart.",
        "#257; rkllama#175",
    ),
    Defect(
        "no_hidden_reuse",
        "Hidden states are not computed again for what the cache holds: clear before.",
        "#446",
        versions=OLD,
    ),
    Defect(
        "embed_cache",
        "Embedding input leaves a wrong cache behind: clear before.",
        "#278",
        versions=("1.2.1", "1.2.2"),
    ),
    Defect(
        "keeps_floats",
        "Hidden states and logits are not released: from 1.3.0 the callback returns 2.",
        "#504",
        versions=OLD,
    ),
    Defect(
        "async",
        "rkllm_run_async hangs or gives empty text; it is never used.",
        "#190, #206, #208, #320, #321, #396",
    ),
    Defect(
        "one_model",
        "One process can hold one model; each model has a child of its own.",
        "#367",
        versions=("1.2.1",),
    ),
    Defect(
        "crash_without_memory",
        "rkllm_init may crash instead of failing when NPU memory runs out.",
        "#522",
        versions=("1.3.0",),
    ),
)

#: Runs after which a child is recycled whose library leaks: some 200 MB.
RECYCLE_RUNS = 100
#: Bytes of hidden states that a library has kept, after which its child is recycled.
KEPT_BYTES = 200 << 20


def has(name: str, version: str, family: str) -> bool:
    """Return whether a model of ``family`` meets the defect on this version."""
    return any(
        d.name == name
        and (not d.versions or version in d.versions)
        and (not d.families or family in d.families)
        for d in DEFECTS
    )


def met(version: str, family: str) -> list[str]:
    """Return the names of all defects that this version and family meet."""
    return [d.name for d in DEFECTS if has(d.name, version, family)]
