"""Language decoders on Rockchip's RKLLM runtime: text and embeddings to text."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rkvlmd.board import soc as socs
from rkvlmd.board.root import Root
from rkvlmd.engine import (
    kv,
    rkllm_defects,
    rkllm_errors,
    rkllm_log,
    rkllm_probe,
    rkllm_prompts,
    rkllm_sampling,
)
from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine.backend import Progress, Rows, Say
from rkvlmd.engine.rkllm_answer import Answer
from rkvlmd.engine.rkllm_embed import Table
from rkvlmd.engine.rkllm_library import Library, open_library
from rkvlmd.engine.rkllm_record import Parts, Record, parts
from rkvlmd.engine.rkllm_session import (
    ImageTags,
    InitError,
    Sampling,
    Session,
    Setup,
    infer_param,
)
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.models import rkllm
from rkvlmd.wire import child

#: How many CPUs the library takes where nobody says: its own default.
DEFAULT_CPUS = 4


class RkllmDecoder:
    """``DecoderBackend`` over ``librkllmrt.so``.

    Every run carries the whole conversation (``keep_history`` 0) as raw text;
    the library keeps its cache and reuses the longest common prefix.
    """

    def __init__(self) -> None:
        self._abort = threading.Event()
        self._record = Record()
        self._places: list[kv.Place] = []
        self._runs = 0
        self._told_apart = False
        self._stop_ids: frozenset[int] = frozenset()
        self._reject = False
        self._session: Session
        self._manifest: manifests.Manifest
        self._tags = ImageTags()
        self._table: Table | None = None
        self._adapter = ""

    # --- load -------------------------------------------------------------------------

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the library and the model; compare what it prints with the manifest.

        Raises:
          RkvlmdError: ``model_failed`` for the library, ``invalid_model`` for
            the model, ``insufficient_memory``.

        """
        manifest = manifests.from_builtins(order.manifest)
        options = order.options
        self._manifest = manifest
        self._stop_ids = frozenset(manifest.stop_ids)
        self._reject = options.get("sampling") == "reject"
        progress(0.0, "opening librkllmrt.so")
        library = open_library(
            options.get("library", ""),
            override=options.get("layout", ""),
            wanted=manifest.decoder.runtime_versions,
        )
        soc = socs.read(Root(), options.get("soc", "")).soc
        setup = self._setup(manifest, Path(order.folder), soc)
        progress(0.05, f"loading {setup.model.name}")
        session = Session(library)
        with rkllm_log.copied() as said, contextlib.suppress(InitError):
            session.open(setup)
        if not session.is_open:
            raise rkllm_errors.load_error(manifest, library.version, said.errors)
        self._session = session
        try:
            _compare(manifest, library, said.fields, override=bool(options.get("layout")))
            session.raw_template()
            self._load_adapters(Path(order.folder))
            if manifest.decoder.input == "embeddings":
                self._table = Table(Path(order.folder), manifest)
            elif manifest.encoders:
                progress(0.9, "probing the cache")
                self._told_apart = self._probe(options, library)
            cached = self._load_prompt(options, library)
        except BaseException:
            self.close()
            raise
        return {
            "libraries": {"librkllmrt": library.version},
            "layout": library.layout.name,
            "context": manifest.decoder.context,
            "embedding": manifest.decoder.embedding,
            "iommu_domain": setup.domain,
            "adapters": [adapter.name for adapter in manifest.decoder.adapters],
            "prompt_cache": cached,
            "pictures_told_apart": self._told_apart,
            "sampling_per_request": library.layout.per_run,
            "defects": rkllm_defects.met(library.version, manifest.family),
            **{k: v for k, v in said.fields.items() if k != "runtime"},
        }

    def _setup(self, manifest: manifests.Manifest, folder: Path, soc: socs.Soc | None) -> Setup:
        decoder = manifest.decoder
        model = folder / decoder.files["model"].file
        if not model.is_file():
            raise RkvlmdError(
                "invalid_model", f"decoder.files.model.file: {model.name} is missing."
            )
        cpus = DEFAULT_CPUS if decoder.cpu_mask is None else decoder.cpu_mask.bit_count()
        if cpus < decoder.npu_cores:
            raise RkvlmdError(
                "invalid_model",
                f"decoder.cpu_mask: has {cpus} CPUs, but the model uses {decoder.npu_cores} NPU"
                " cores.",
            )
        domain = decoder.iommu_domain
        if domain is None:
            domain = soc.domain if soc is not None else 0
        if manifest.image is not None:
            tags = manifest.image
            self._tags = ImageTags(tags.start.encode(), tags.end.encode(), tags.content.encode())
        return Setup(
            model=model,
            context=decoder.context,
            # Before 1.3.0 this is the only limit that the library has; ours is counted.
            max_new_tokens=decoder.context,
            sampling=rkllm_sampling.convert(manifest.defaults),
            tags=self._tags,
            n_keep=decoder.n_keep,
            domain=domain,
            cpu_mask=decoder.cpu_mask,
            embed_flash=decoder.embed_flash,
        )

    def _probe(self, options: dict[str, Any], library: Library) -> bool:
        encoder = self._manifest.encoders[0]
        key = rkllm_probe.key(library, self._manifest.decoder.files["model"].sha256)
        told = rkllm_probe.remembered(options.get("state", ""), key)
        if told is None:
            told = rkllm_probe.pictures_told_apart(
                self._session,
                tokens=encoder.tokens,
                row=self._manifest.decoder.embedding * encoder.outputs,
                width=encoder.width,
                height=encoder.height,
                tags=self._tags,
            )
            rkllm_probe.remember(options.get("state", ""), key, told=told)
        return told

    def _load_adapters(self, folder: Path) -> None:
        for i, adapter in enumerate(self._manifest.decoder.adapters):
            rc = self._session.load_lora(
                adapter.name.encode(), folder / adapter.file, adapter.scale
            )
            if rc != 0:
                raise RkvlmdError(
                    "invalid_model",
                    f"decoder.adapters[{i}].file: the RKLLM runtime cannot load"
                    f" {Path(adapter.file).name}.",
                )

    def _load_prompt(self, options: dict[str, Any], library: Library) -> bool:
        text = self._manifest.decoder.prompt_cache
        if not text or self._has("no_prompt_cache"):
            return False
        key = rkllm_probe.key(library, self._manifest.decoder.files["model"].sha256)
        return rkllm_prompts.load(self._session, text, options.get("state", ""), key)

    def _has(self, defect: str) -> bool:
        """Whether this library and model meet a known defect."""
        version, family = self._session.library.version, self._manifest.family
        return rkllm_defects.has(defect, version, family)

    # --- generate ---------------------------------------------------------------------

    def generate(self, order: child.Generate, rows: Sequence[Rows], say: Say) -> child.GenerateDone:
        """Run the conversation; the library computes what its cache lacks.

        Raises:
          RkvlmdError: ``context_length_exceeded``, ``unsupported_parameter``,
            ``too_many_images``, or ``engine_error`` when the order is not
            consistent or the library fails.

        """
        self._abort.clear()
        wanted = self._check(order, rows)
        sampling, ignored = self._sampling(order)
        session = self._session
        value, block = self._input(order, rows)
        infer = infer_param(
            session.library,
            sampling=sampling,
            max_new_tokens=order.max_tokens,
            lora=order.adapter.encode() if order.adapter else None,
        )
        # What one adapter has computed is of no use to another.
        if order.adapter != self._adapter or (self._table is not None and self._has("embed_cache")):
            self._record.unknown()
        self._adapter = order.adapter
        if self._record.must_clear(wanted, told_apart=self._told_apart):
            session.clear()
            self._record.cleared()
            self._places = []
        places = kv.places(order.tokens, order.spans) if order.tokens else []
        answer = Answer(
            order,
            say,
            stop_ids=self._stop_ids,
            prompt=len(order.tokens) or order.count,
            cached=0 if self._has("no_prefix_reuse") else kv.reusable(self._places, places),
            aborted=self._abort.is_set,
            abort=session.abort_inside,
            limits_itself=session.library.layout.per_run,
        )
        self._record.unknown()
        self._runs += 1
        rc = session.run(value, infer, answer)
        del block
        if rc != 0 or answer.failed:
            self._raise(answer, rc)
        reason = answer.finish()
        if not (answer.cut or self._abort.is_set() or rc or answer.failed):
            self._record.holds(wanted, answer.text)
            self._places = [*places, *answer.tokens] if places else []
        prompt = self._prompt_tokens(order, answer)
        return child.GenerateDone(
            id=order.id,
            reason=reason,
            completion=answer.completion,
            seconds=answer.seconds,
            prompt=prompt,
            cached=self._cached(prompt, answer),
            ignored=ignored,
            recycle=self._leaks(),
            perf=answer.perf,
        )

    def abort(self) -> None:
        """End the running ``generate`` after its next token; a prefill runs to its end."""
        self._abort.set()
        self._session.abort()

    def close(self) -> None:
        """Give the model back; nothing may be running."""
        self._session.close()

    def _check(self, order: child.Generate, rows: Sequence[Rows]) -> Parts:
        """Return the prompt as texts and pictures, checked against everything that came with it."""
        if not order.prompt:
            raise RkvlmdError("engine_error", "The prompt is empty.")
        context, known = self._manifest.decoder.context, len(order.tokens)
        if known > context:
            raise RkvlmdError(
                "context_length_exceeded",
                f"This model's context is {context} tokens, but the prompt has {known}.",
                param="messages",
            )
        if len(rows) != len(order.spans):
            raise RkvlmdError("engine_error", "Pictures and their places differ in number.")
        mixes = self._has("mixes_pictures") or self._has("one_picture")
        if len(rows) > 1 and mixes and self._table is None:
            raise RkvlmdError(
                "too_many_images",
                f"Version {self._session.library.version} of the RKLLM runtime mixes up several"
                " pictures of this model; send one.",
                param="messages",
            )
        adapters = {adapter.name for adapter in self._manifest.decoder.adapters}
        if order.adapter and order.adapter not in adapters:
            raise RkvlmdError("model_not_found", "The model has no such adapter.", param="model")
        inputs.check_places(order.prompt.encode(), len(rows))
        return parts(order.prompt, [span.key for span in order.spans])

    def _input(self, order: child.Generate, rows: Sequence[Rows]) -> tuple[Any, Any]:
        """Return the input, and the rows that must outlive the run."""
        layout, prompt = self._session.library.layout, order.prompt.encode()
        if self._table is not None:
            embeds = self._table(order.tokens, order.spans, rows)
            return inputs.embed_input(layout, embeds), embeds
        if not rows:
            return inputs.prompt_input(layout, prompt), None
        encoder = self._manifest.encoders[0]
        block = inputs.stack(
            rows,
            tokens=encoder.tokens,
            row=self._manifest.decoder.embedding * encoder.outputs,
            width=encoder.width,
            height=encoder.height,
            tags=self._tags,
        )
        return inputs.multimodal_input(layout, prompt, block), block

    def _sampling(self, order: child.Generate) -> tuple[Sampling | None, list[str]]:
        """Return what the run gets, and our names of what it cannot have."""
        if self._session.library.layout.per_run:
            return rkllm_sampling.convert(order), []
        found = rkllm.differences(order, self._manifest.defaults)
        if found and self._reject:
            raise RkvlmdError(
                "unsupported_parameter",
                f"Version {self._session.library.version} of the RKLLM runtime samples in one way"
                f" alone, and {', '.join(found)} would change it.",
                param=found[0],
            )
        if found:
            print(f"without effect on this RKLLM runtime: {', '.join(found)}", flush=True)
        return None, found

    def _raise(self, answer: Answer, rc: int) -> None:
        """Raise the error of a run that failed, unless an abort explains it."""
        if self._abort.is_set():
            answer.ended = "aborted"
            return
        print(f"rkllm_run returned {rc} after {answer.events} events", flush=True)
        if answer.events == 0:
            # That is how the library refuses a prompt that is longer than its window.
            raise RkvlmdError(
                "context_length_exceeded",
                f"The prompt does not fit this model's context of"
                f" {self._manifest.decoder.context} tokens.",
                param="messages",
            )
        raise RkvlmdError("engine_error", "The RKLLM runtime failed on this request.")

    # --- counts -----------------------------------------------------------------------

    def _prompt_tokens(self, order: child.Generate, answer: Answer) -> int:
        """Return the exact count, or an estimate from the size of the cache after the run."""
        if order.tokens:
            return len(order.tokens)
        size = self._session.cache_sizes()[0]
        return size - answer.completion if size > answer.completion else order.count

    def _cached(self, prompt: int, answer: Answer) -> int | None:
        """Return how much of the prompt was not computed, where the library has said that."""
        if answer.perf is None or answer.perf.prefill_tokens < 0:
            return None
        return max(0, prompt - answer.perf.prefill_tokens)

    def _leaks(self) -> bool:
        return self._has("leaks") and self._runs >= rkllm_defects.RECYCLE_RUNS


def _compare(
    manifest: manifests.Manifest, library: Library, fields: dict[str, str | int], *, override: bool
) -> None:
    """Compare what the library has printed with the manifest and with its own file."""
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
