"""What ``rkllm_init`` is told for a model, and what it printed held against the manifest."""

from __future__ import annotations

from pathlib import Path

from rkvlmd.board import soc as socs
from rkvlmd.engine import rkllm_sampling
from rkvlmd.engine.rkllm_library import Library
from rkvlmd.engine.rkllm_session import ImageTags, Setup
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import Manifest, Tags

#: How many CPUs the library takes where nobody says: its own default.
DEFAULT_CPUS = 4


def setup(manifest: Manifest, folder: Path, soc: socs.Soc | None) -> Setup:
    """Return the parameters of a model.

    Raises:
      RkvlmdError: ``invalid_model`` for what the library would refuse.

    """
    decoder = manifest.decoder
    model = folder / decoder.files["model"].file
    if not model.is_file():
        raise RkvlmdError("invalid_model", f"decoder.files.model.file: {model.name} is missing.")
    cpus = DEFAULT_CPUS if decoder.cpu_mask is None else decoder.cpu_mask.bit_count()
    if cpus < decoder.npu_cores:
        raise RkvlmdError(
            "invalid_model",
            f"decoder.cpu_mask: has {cpus} CPUs, but the model uses {decoder.npu_cores} NPU cores.",
        )
    domain = decoder.iommu_domain
    if domain is None:
        domain = soc.domain if soc is not None else 0
    return Setup(
        model=model,
        context=decoder.context,
        # Before 1.3.0 this is the only limit that the library has; ours is counted.
        max_new_tokens=decoder.context,
        sampling=rkllm_sampling.convert(manifest.defaults),
        tags=tags(manifest.image),
        n_keep=decoder.n_keep,
        domain=domain,
        cpu_mask=decoder.cpu_mask,
        embed_flash=decoder.embed_flash,
        cross_attention=decoder.cross_attention is not None,
    )


def tags(given: Tags | None) -> ImageTags:
    """Return what stands around a picture or a video, empty for a model that takes none."""
    if given is None:
        return ImageTags()
    return ImageTags(given.start.encode(), given.end.encode(), given.content.encode())


def compare(
    manifest: Manifest, library: Library, fields: dict[str, str | int], *, override: bool
) -> None:
    """Compare what the library has printed with the manifest and with its own file.

    Raises:
      RkvlmdError: they differ; ``override`` says that the owner chose the layout.

    """
    runtime = fields.get("runtime")
    if runtime is not None and runtime != library.version and not override:
        raise RkvlmdError(
            "model_failed",
            f"npu.library: {library.path.name} says that it is version {library.version}, but at"
            f" run time it is {runtime}; npu.layout can name the layout to assume.",
        )
    cores, declared = fields.get("npu_cores"), manifest.decoder.npu_cores
    if declared and cores is not None and cores != declared:
        raise RkvlmdError(
            "invalid_model",
            f"decoder.npu_cores: the manifest says {declared}, but the file was converted for"
            f" {cores}.",
        )
