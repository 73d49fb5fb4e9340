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
    "D": "tests/parity_onnx/test_daemon.py::test_answers_with_pictures_equal_transformers",
    "K": "tests/process/test_npu_cut.py::{}",
    "F": "tests/parity_onnx/test_video.py"
    "::test_logits_and_greedy_tokens_of_videos_equal_transformers[{}]",
    "H": "tests/process/test_npu_thinking.py::test_a_model_thinks_when_asked_to[{}]",
    "E": "tests/e2e/test_imported_clip.py"
    "::test_published_towers_are_imported_and_give_the_vectors_of_transformers",
}
WHAT = {
    "N": "the whole daemon on the simulated board, files imported as published: pictures and turns",
    "V": "the same, a video: natively with the Qwen-VL models and RKLLM 1.3, else as pictures",
    "T": "the same, text in two turns (Gemma 3n also as rows of its embedding table)",
    "C": "the CPU engine on an exported checkpoint: logits and greedy tokens equal `transformers`",
    "P": "the token ids of the whole prompt equal those of the published processor",
    "G": "pixels, and the number of tiles, equal those of the published processor",
    "D": "the whole daemon with the CPU engine: answers to tiles and a thumbnail equal `transformers`",
    "K": "the whole daemon on the simulated board, parts of pictures in their order and with their"
    " tags: models of the catalogue whose name ends in `-tiles` or `-slices`, imported with `--model`",
    "F": "videos as patches of two frames on the CPU engine: logits and greedy tokens equal"
    " `transformers`",
    "H": "the whole daemon on the simulated board: thoughts when they are asked for, apart from the"
    " answer",
    "E": "no text, but `/v1/embeddings` of texts and pictures: published towers imported, vectors"
    " equal those of `transformers`",
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
    #: The test of its parts on the simulated board, and whether the CPU engine's was compared.
    cut: str = ""
    cut_cpu: bool = False
    #: The model of the catalogue that thinks; whether videos on the CPU engine were compared.
    thinks: str = ""
    thinker: str = ""
    films: bool = False
    #: It makes vectors alone.
    embeds: bool = False

    def cells(self) -> list[str]:
        """Return what the table says, one cell an ability."""
        if self.embeds:
            return [_yes(["E"]), *["-"] * 6, _yes(["E"]), "no", "not yet"]
        talk = ["N", *(["C"] if self.cpu else [])] if self.sees else []
        talk += ["P"] if self.prompt else []
        turns = talk or ["T", *(["C"] if self.cpu else [])]
        parts = ["G"] + ["P"] * bool(self.prompt) + ["D"] * self.cut_cpu + ["K"] * bool(self.cut)
        tiles = _yes(parts) if self.tiles else "-"
        return [
            _yes(talk),
            _yes(talk if self.several else []) if self.sees else "-",
            _yes(turns),
            _yes(["V", *["F"] * self.films] if self.several else []) if self.sees else "-",
            tiles,
            "no",
            self.thinker + _yes(["H"] if self.thinks else []),
            _yes(["C"] if self.cpu else []),
            _yes(["N" if self.sees else "T"]),
            "not yet",
        ]

    def tests(self) -> list[str]:
        """Return the tests that the row's cells name."""
        names = {"N": self.npu, "V": self.npu, "T": self.npu, "C": self.cpu,
                 "P": self.prompt, "G": self.tiles, "D": "", "K": self.cut,
                 "F": self.cpu, "H": self.thinks, "E": ""}  # fmt: skip
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
    Row("Qwen2-VL", "qwen2-vl-2b", "qwen2_vl", "qwen2_vl", films=True),
    Row("Qwen2.5-VL", "qwen2.5-vl-3b", "qwen2_5_vl", "qwen2_5_vl", films=True),
    Row("Qwen3-VL", "qwen3-vl-2b", "qwen3_vl", "qwen3_vl", films=True),
    Row("Qwen3.5", "qwen3.5-0.8b", "qwen3_5", "qwen3_5", films=True, thinks="qwen3.5-0.8b"),
    Row("InternVL3, 3.5", "internvl3-1b", "internvl", "internvl", tiles="internvl", cut_cpu=True,
        cut="test_tiles_reach_the_decoder_between_one_pair_of_tags", thinks="internvl3.5-1b",
        thinker="3.5: "),
    Row("SmolVLM, SmolVLM2", "smolvlm-256m", "smolvlm", "smolvlm", tiles="smolvlm"),
    Row("DeepSeek-OCR", "deepseek-ocr", tiles="deepseek_ocr", several=False,
        cut="test_tiles_and_page_are_one_block[size0-grid0-tiles]"),
    Row("MiniCPM-V 2.6", "minicpm-v-2.6", tiles="minicpmv",
        cut="test_slices_reach_the_decoder_between_their_tags"),
    Row("Janus-Pro", "janus-pro-1b", "janus", "janus"),
    Row("Gemma 3", "gemma3-4b", "gemma3", "gemma3"),
    Row("Gemma 3n (text)", "gemma3n-e2b", "gemma3n", sees=False),
    Row("Gemma 4 (text)", "gemma4-e2b", "gemma4", sees=False),
    Row("FastVLM", "fastvlm-0.5b", prompt="fastvlm", several=False),
    Row("LLaVA-1.5", "llava-1.5-7b", "llava", "llava"),
    Row("Qwen3 (text)", "qwen3-0.6b", "qwen3", sees=False, thinks="qwen3-0.6b"),
    Row("CLIP (vectors)", "clip-vit-base-patch32", embeds=True),
)  # fmt: skip


def table() -> str:
    """Return the table for the README, and what its letters mean."""
    head = ["family", *ABILITIES]
    lines = [head, ["---"] * len(head), *([row.title, *row.cells()] for row in ROWS)]
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    shown.append("")
    for letter, test in TESTS.items():
        file, _, name = test.partition("::")
        name = name.partition("[")[0]
        where = f"`{file}`" if name == "{}" else f"`{name}` in `{file}`"
        shown.append(f"- {letter}: {WHAT[letter]}; {where}")
    return "\n".join(shown) + "\n"


if __name__ == "__main__":
    print(table(), end="")
