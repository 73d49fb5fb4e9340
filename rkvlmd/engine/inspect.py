"""Reads what model files say of themselves: shapes of ONNX files, prompts of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd.engine import graph_header
from rkvlmd.errors import RkvlmdError

if TYPE_CHECKING:
    from rkvlmd.models.manifest import Manifest

#: A picture for which prompts are tried, pixels.
_WIDTH, _HEIGHT = 640, 480


def inspect(path: str) -> dict[str, Any]:
    """Return the inputs, outputs and metadata of the ONNX file at ``path``.

    Inputs and outputs are lists of ``{"name", "shape", "type"}`` in the file's
    order; a symbolic size is its name, an unknown one ``None``. ``external``
    are the files that hold its weights, as it names them. No weights are read
    and nothing is run.

    Raises:
      RkvlmdError: ``invalid_model`` when the file is no ONNX model.

    """
    name = Path(path).name
    try:
        header = graph_header.read(Path(path))
    except OSError:
        raise RkvlmdError("invalid_model", f"{name} cannot be read.") from None
    except graph_header.NotOnnxError as exc:
        raise RkvlmdError("invalid_model", f"{name} is no ONNX model: {exc}.") from exc
    return {
        "file": name,
        "inputs": [value._asdict() for value in header.inputs],
        "outputs": [value._asdict() for value in header.outputs],
        "producer": header.producer,
        "metadata": header.metadata,
        "external": sorted(header.external),
    }


def prompts(folder: str) -> dict[str, Any]:
    """Return what prompts of the model in ``folder`` become: its template and tokenizer, tried.

    ``tokens`` of a question, ``picture`` the tokens that one picture of 640 x
    480 pixels adds, ``counted`` whether a tokenizer counts. A model that takes
    several pictures is tried with two. The rows of an ``assembly`` are read.

    Raises:
      RkvlmdError: ``invalid_model`` when manifest, template and tokenizer do not go together.

    """
    from rkvlmd.errors import ManifestError
    from rkvlmd.models import manifest

    path = Path(folder) / manifest.FILE
    try:
        with path.open("rb") as file:
            model = manifest.parse(file.read(manifest.MAX_BYTES + 1), Path(folder).name)
    except OSError:
        raise RkvlmdError("invalid_model", f"{manifest.FILE} cannot be read.") from None
    except ManifestError as exc:
        raise RkvlmdError("invalid_model", f"{'; '.join(exc.problems)}.") from exc
    if model.assembly is not None:
        from rkvlmd.engine.assemble import Assembler

        Assembler(Path(folder), model)
    plain = _tokens(folder, model, 0)
    found: dict[str, Any] = {"tokens": plain, "counted": model.tokenizer is not None}
    if model.encoders and model.decoder.engine != "tower":  # a tower reads no pictures
        found["picture"] = _tokens(folder, model, 1) - plain
        if "multi_image" in model.capabilities:
            _tokens(folder, model, 2)
    return found


def _tokens(folder: str, model: Manifest, pictures: int) -> int:
    from rkvlmd.engine import render
    from rkvlmd.models import views
    from rkvlmd.wire.child import Laid

    laid = []
    for _ in range(pictures):
        plan = views.plan(model, _WIDTH, _HEIGHT)
        laid.append(Laid(layout=list(plan.layout), tokens=list(plan.places)))
    places: list[dict[str, Any]] = [{"picture": index} for index in range(pictures)]
    turns = [{"role": "user", "parts": [*places, {"text": "What is this?"}]}]
    if model.decoder.engine == "rkllm":
        return render.render_text(folder, model, turns, laid).most
    return render.render(folder, model, turns, laid).most
