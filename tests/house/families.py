"""Which abilities of which families are tested, and by which tests; ``python -m`` prints the table.

A "yes" without a test cannot be written down here.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The tests by the letter that the table has for them; ``{}`` is the parameter.
TESTS = {
    "N": "tests/process/test_npu_import.py::test_pictures_reach_the_decoder_in_every_turn[{}]",
    "V": "tests/process/test_npu_import.py::test_frames_of_a_video_reach_the_decoder[{}]",
    "T": "tests/process/test_npu_import.py::test_models_for_text_answer_in_turns[{}]",
    "C": "tests/parity_onnx/test_families.py::test_logits_and_greedy_tokens_equal_transformers"
    "[{}-plain]",
    "P": "tests/parity/test_prompts.py::test_the_prompt_is_the_processors[{}-{}]",
    "G": "tests/parity/test_pixels.py::test_the_exact_path_is_the_processors[{}-1024x768-RGB-JPEG]",
}
WHAT = {
    "N": "the whole daemon on the simulated board, files imported as published: pictures and turns",
    "V": "the same, a video: natively with the Qwen-VL models and RKLLM 1.3, else as pictures",
    "T": "the same, text in two turns (Gemma 3n also as rows of its embedding table)",
    "C": "the CPU engine on an exported checkpoint: logits and greedy tokens equal `transformers`",
    "P": "the token ids of the whole prompt equal those of the published processor",
    "G": "pixels, and the number of tiles, equal those of the published processor",
}
ABILITIES = (
    "one picture", "several", "multi-turn", "video", "tiles", "tools", "thinking",
    "CPU = transformers", "Rockchip, simulated", "on a board",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A family: its model of the catalogue, and its names in the tests of the CPU engine.

    ``tiles`` is the name in the comparison of pixels where the family cuts
    pictures, ``several`` whether it takes more than one.
    """

    title: str
    npu: str
    cpu: str = ""
    prompt: str = ""
    tiles: str = ""
    sees: bool = True
    several: bool = True
    #: Tiles that only the geometry knows: no encoder of the catalogue uses them.
    unserved: bool = False

    def cells(self) -> list[str]:
        """Return what the table says, one cell an ability."""
        talk = ["N", *(["C"] if self.cpu else [])] if self.sees else []
        talk += ["P"] if self.prompt else []
        turns = talk or ["T", *(["C"] if self.cpu else [])]
        tiles = "-"
        if self.tiles:
            tiles = "cut, not served (G)" if self.unserved else "yes (G)"
        return [
            _yes(talk),
            _yes(talk if self.several else []) if self.sees else "-",
            _yes(turns),
            _yes(["V"] if self.several else []) if self.sees else "-",
            tiles,
            "no",
            "no",
            _yes(["C"] if self.cpu else []),
            _yes(["N" if self.sees else "T"]),
            "not yet",
        ]

    def tests(self) -> list[str]:
        """Return the tests that the row's cells name."""
        names = {"N": self.npu, "V": self.npu, "T": self.npu, "C": self.cpu,
                 "P": self.prompt, "G": self.tiles}  # fmt: skip
        used = {letter for letter in TESTS for cell in self.cells() if f"({letter}" in cell}
        used |= {letter for letter in TESTS for cell in self.cells() if f", {letter}" in cell}
        return [
            TESTS[letter].format(names[letter], talk)
            for letter in sorted(used)
            for talk in (("one", "two", "turns") if letter == "P" else ("",))
        ]


def _yes(letters: list[str]) -> str:
    return f"yes ({', '.join(letters)})" if letters else "no"


ROWS = (
    Row("Qwen2-VL", "qwen2-vl-2b", "qwen2_vl", "qwen2_vl"),
    Row("Qwen2.5-VL", "qwen2.5-vl-3b", "qwen2_5_vl", "qwen2_5_vl"),
    Row("Qwen3-VL", "qwen3-vl-2b", "qwen3_vl", "qwen3_vl"),
    Row("Qwen3.5", "qwen3.5-0.8b", "qwen3_5"),
    Row("InternVL3, 3.5", "internvl3-1b", "internvl", "internvl", tiles="internvl"),
    Row("SmolVLM, SmolVLM2", "smolvlm-256m", "smolvlm", "smolvlm", tiles="smolvlm"),
    Row("DeepSeek-OCR", "deepseek-ocr", tiles="deepseek_ocr", several=False, unserved=True),
    Row("MiniCPM-V 2.6", "minicpm-v-2.6", tiles="minicpmv", unserved=True),
    Row("Janus-Pro", "janus-pro-1b", "janus", "janus"),
    Row("Gemma 3", "gemma3-4b", "gemma3", "gemma3"),
    Row("Gemma 3n (text)", "gemma3n-e2b", "gemma3n", sees=False),
    Row("Gemma 4 (text)", "gemma4-e2b", "gemma4", sees=False),
    Row("FastVLM", "fastvlm-0.5b", several=False),
    Row("LLaVA-1.5", "llava-1.5-7b", "llava", "llava"),
    Row("Qwen3 (text)", "qwen3-0.6b", "qwen3", sees=False),
)  # fmt: skip


def table() -> str:
    """Return the table for the README, and what its letters mean."""
    head = ["family", *ABILITIES]
    lines = [head, ["---"] * len(head), *([row.title, *row.cells()] for row in ROWS)]
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    shown.append("")
    for letter, test in TESTS.items():
        file, _, name = test.partition("::")
        shown.append(f"- {letter}: {WHAT[letter]}; `{name.partition('[')[0]}` in `{file}`")
    return "\n".join(shown) + "\n"


if __name__ == "__main__":
    print(table(), end="")
