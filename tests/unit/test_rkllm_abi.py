"""The ctypes structures against the tables, and the tables against a compiler."""

from __future__ import annotations

import ctypes as c
import json
import subprocess
from typing import Any

import pytest

from rkvlmd.engine import rkllm_abi as abi
from rkvlmd.engine import rkllm_types as types
from tests.npusim import compiler
from tests.npusim.tables import TABLES

#: The structures that are the same in all versions, by their C name.
COMMON = {
    "RKLLMExtendParam": types.ExtendParam,
    "RKLLMLoraAdapter": types.LoraAdapter,
    "RKLLMEmbedInput": types.EmbedInput,
    "RKLLMTokenInput": types.TokenInput,
    "RKLLMLoraParam": types.LoraParam,
    "RKLLMPromptCacheParam": types.PromptCacheParam,
    "RKLLMCrossAttnParam": types.CrossAttnParam,
    "RKLLMResultLastHiddenLayer": types.LastHiddenLayer,
    "RKLLMResultLogits": types.Logits,
    "RKLLMPerfStat": types.PerfStat,
    "RKLLMResult": types.Result,
}
LAYOUTS = {"1.2": abi.V12, "1.3.0": abi.V130, "1.3.1": abi.V131}
#: A version of each layout.
VERSION = {"1.2": "1.2.3", "1.3.0": "1.3.0", "1.3.1": "1.3.1"}


def structures(layout: str) -> dict[str, type[c.Structure]]:
    found = LAYOUTS[layout]
    built = COMMON | {
        "RKLLMParam": found.param,
        "RKLLMMultiModalInput": found.multimodal,
        "RKLLMInput": found.input,
        "RKLLMInferParam": found.infer,
    }
    if found.per_run:
        built |= {"RKLLMSamplingParam": types.SamplingParam, "RKLLMCallback": types.Callback}
    return built


def place(structure: Any, path: str) -> tuple[int, int]:
    """Return offset and size of a field, followed through its dots."""
    offset = 0
    for name in path.split("."):
        field = getattr(structure, name)
        offset += field.offset
        size = field.size
        structure = next((f[1] for f in structure._fields_ if f[0] == name), None)
    return offset, size


def leaves(structure: Any) -> set[str]:
    """Return every field that ctypes knows, members of members included."""
    found = set()
    for name, kind, *_ in structure._fields_:
        if name in getattr(structure, "_anonymous_", ()):
            found |= {field[0] for field in kind._fields_}
            continue
        found.add(name)
        if structure.__name__.startswith("MultiModal") and issubclass(kind, c.Structure):
            found |= {f"{name}.{inner[0]}" for inner in kind._fields_}
    return found


@pytest.mark.parametrize("layout", TABLES)
def test_the_structures_are_those_of_the_tables(layout: str) -> None:
    built = structures(layout)
    assert set(built) == set(TABLES[layout])
    for name, (size, alignment, fields) in TABLES[layout].items():
        structure = built[name]
        assert (c.sizeof(structure), c.alignment(structure)) == (size, alignment), name
        assert leaves(structure) == set(fields), name
        for path, expected in fields.items():
            assert place(structure, path) == expected, f"{name}.{path}"


@pytest.mark.process
@pytest.mark.parametrize("layout", TABLES)
def test_a_compiler_agrees_with_the_tables(layout: str) -> None:
    lines = []
    for name, (_, _, fields) in TABLES[layout].items():
        lines.append(f'printf("\\"{name}\\":[%zu,%zu,{{", sizeof({name}), alignof({name}));')
        for i, path in enumerate(fields):
            comma = "" if i == 0 else ","
            lines.append(
                f'printf("{comma}\\"{path}\\":[%zu,%zu]", offsetof({name}, {path}),'
                f" sizeof((({name} *)nullptr)->{path}));"
            )
        lines.append('printf("}],");')
    source = (
        "#include <cstdio>\n#include <rkllm.h>\nint main() {\n"
        'printf("{");\n' + "\n".join(lines) + '\nprintf("\\"end\\":0}");\n}\n'
    )
    number = compiler.ABIS[VERSION[layout]]
    binary = compiler.program(
        f"probe-{layout}", source, [f"-DNPUSIM_ABI={number}", "-Wno-invalid-offsetof"]
    )
    said = json.loads(subprocess.run([binary], check=True, capture_output=True).stdout)
    del said["end"]
    expected = {
        name: [size, alignment, {path: list(at) for path, at in fields.items()}]
        for name, (size, alignment, fields) in TABLES[layout].items()
    }
    assert said == expected


def test_what_the_bugs_of_others_teach() -> None:
    param = dict(abi.Param13._fields_)
    assert param["top_k"] is c.c_int32
    assert dict(types.SamplingParam._fields_)["top_k"] is c.c_int32
    assert param["skip_special_token"] is c.c_bool
    assert c.sizeof(c.c_bool) == 1
    assert abi.VERSIONS["1.2.1"] is abi.VERSIONS["1.2.3"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_input_has_zeroed_room_behind_it(layout: abi.Layout) -> None:
    value = abi.new_input(layout)
    at = c.addressof(value)
    assert c.string_at(at, abi.INPUT_ROOM) == bytes(abi.INPUT_ROOM)
    assert c.sizeof(layout.input) <= 208 < abi.INPUT_ROOM
    value.multimodal_input.prompt = b"x"
    assert value.prompt_input == b"x"  # one union
