"""Says in the project's words what ``librkllmrt.so`` prints when it cannot load a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rkvlmd.board import driver as drivers
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests

_FILE = "decoder.files.model.file"


def load_error(
    manifest: manifests.Manifest, version: str, printed: Sequence[str], driver: str = ""
) -> RkvlmdError:
    """Return the error for a load that failed.

    ``printed`` are the library's own error lines, ``driver`` the version of
    the kernel's NPU driver where that is known.
    """
    text = "\n".join(printed)
    if (old := drivers.too_old(driver)) and not re.search(_NOT_THE_DRIVER, text):
        # Fact sheet 7: failed allocations and failed submits are what an old one looks like.
        return RkvlmdError("model_failed", old)
    name = manifest.decoder.files["model"].file
    if match := re.search(r"max_context_limit\[(\d+)\]", text):
        return _invalid(
            f"decoder.context: the manifest says {manifest.decoder.context}, but {name} was"
            f" converted for at most {match[1]}."
        )
    if "malloc npu memory" in text:
        return RkvlmdError(
            "insufficient_memory",
            "The NPU has not enough memory for the model; decoder.context can be made smaller.",
        )
    for sign, says in _SIGNS:
        if re.search(sign, text):
            return _invalid(says.format(name=name, version=version))
    return _invalid(
        f"{_FILE}: version {version} of the RKLLM runtime cannot load {name}; its log says why."
    )


#: Lines that say what is wrong whatever the driver's age.
_NOT_THE_DRIVER = (
    r"max_context_limit|enabled CPUs|model magic|truncated|for the platform|n_batch must be"
)

#: What a line looks like, and what it means.
_SIGNS = (
    (
        r"number of enabled CPUs|enabled CPUs mask",
        "decoder.cpu_mask: the RKLLM runtime wants at least as many CPUs as the model uses NPU"
        " cores, and all of them in this machine.",
    ),
    (
        r"invalid rknn llm model magic",
        f"{_FILE}: {{name}} is no .rkllm file, or one made before version 1.1.",
    ),
    (r"truncated", f"{_FILE}: {{name}} is cut short."),
    (
        r"platform is unknown|Query platform error",
        "The RKLLM runtime {version} does not know this machine; see rkvlmctl doctor.",
    ),
    (r"for the platform", f"{_FILE}: {{name}} is converted for another SoC."),
    (r"n_batch must be", "The RKLLM runtime {version} reads the parameters in another layout."),
)


def _invalid(text: str) -> RkvlmdError:
    return RkvlmdError("invalid_model", text)
