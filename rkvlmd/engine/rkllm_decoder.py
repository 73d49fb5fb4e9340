"""Language decoders on Rockchip's RKLLM runtime: text and embeddings to text."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rkvlmd.board import driver as drivers
from rkvlmd.board import soc as socs
from rkvlmd.board.root import Root
from rkvlmd.engine import (
    kv,
    rkllm_defects,
    rkllm_errors,
    rkllm_hidden,
    rkllm_log,
    rkllm_probe,
    rkllm_prompts,
    rkllm_sampling,
    rkllm_setup,
)
from rkvlmd.engine.backend import Progress, Rows, Say
from rkvlmd.engine.rkllm_answer import Answer
from rkvlmd.engine.rkllm_conversations import Conversations
from rkvlmd.engine.rkllm_library import Library, open_library
from rkvlmd.engine.rkllm_record import Record
from rkvlmd.engine.rkllm_request import Request, Requests
from rkvlmd.engine.rkllm_session import (
    ImageTags,
    InitError,
    Sampling,
    Session,
    infer_param,
)
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.models import rkllm
from rkvlmd.wire import child, prefix


class RkllmDecoder:
    """``DecoderBackend`` over ``librkllmrt.so``.

    Every run carries the whole conversation (``keep_history`` 0) as raw text;
    the library keeps its cache and reuses the longest common prefix.
    """

    in_callback = True

    def __init__(self) -> None:
        self._abort = threading.Event()
        self._record = Record()
        self._places: list[kv.Place] = []
        self._runs = 0
        self._kept = 0
        self._told_apart = False
        self._stop_ids: frozenset[int] = frozenset()
        self._reject = False
        self._session: Session
        self._manifest: manifests.Manifest
        self._tags = ImageTags()
        self._requests: Requests
        self._conversations: Conversations | None = None
        #: Loads the saved beginning of all prompts, where the model has one.
        self._prompt_again: Callable[[], bool] = bool
        #: The names of what the library's cache holds, none where that is not known.
        self._names: prefix.Chain = ()
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
        setup = rkllm_setup.setup(manifest, Path(order.folder), soc)
        self._tags = setup.tags
        progress(0.05, f"loading {setup.model.name}")
        session = Session(library)
        with rkllm_log.copied() as said, contextlib.suppress(InitError):
            session.open(setup)
        if not session.is_open:
            known = str(said.fields.get("driver", "")) or drivers.read(Root()).version
            raise rkllm_errors.load_error(manifest, library.version, said.errors, known)
        self._session = session
        probed: rkllm_probe.Found | None = None
        try:
            rkllm_setup.compare(
                manifest, library, said.fields, override=bool(options.get("layout"))
            )
            session.raw_template()
            self._load_adapters(Path(order.folder))
            self._requests = Requests(manifest, library, Path(order.folder), self._has)
            beside = manifest.decoder.cross_attention is not None
            if self._requests.table is None and manifest.encoders and not beside:
                progress(0.9, "probing the cache")
                probed = self._probe(options, library)
                self._told_apart = probed.pictures_told_apart
            cached = self._load_prompt(options, library)
            able = manifest.decoder.input == "text" and not beside
            self._conversations = Conversations(
                session,
                int(options.get("conversations_bytes", 0)) if able else 0,
                pictures=not self._has("prompt_cache_cut_at_picture"),
                why="this model cannot save any" if self._has("no_prompt_cache") else "",
                released=self._prompt_again,
            )
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
            "conversations": self._conversations.on,
            "pictures_told_apart": self._told_apart,
            "probe": None if probed is None else asdict(probed),
            "sampling_per_request": library.layout.per_run,
            "defects": rkllm_defects.met(library.version, manifest.family),
            **{k: v for k, v in said.fields.items() if k != "runtime"},
        }

    def _probe(self, options: dict[str, Any], library: Library) -> rkllm_probe.Found:
        encoder = self._manifest.encoders[0]
        key = rkllm_probe.key(library, self._manifest.decoder.files["model"].sha256)
        state = options.get("state", "")
        found = rkllm_probe.remembered(state, key)
        if found is not None and found.unfinished:
            print(
                "an earlier load died in its probe, so pictures count as not told apart; remove"
                f" {rkllm_probe.FILE} from the state folder to probe again",
                flush=True,
            )
        if found is None:
            # A library that dies in it must not do so at every load.
            rkllm_probe.remember(state, key, rkllm_probe.Found(unfinished=True))
            found = rkllm_probe.look(
                self._session,
                tokens=encoder.tokens,
                row=self._manifest.decoder.embedding * encoder.outputs,
                width=encoder.width,
                height=encoder.height,
                tags=self._tags,
                special=next(iter(self._manifest.special_strings), ""),
            )
            rkllm_probe.remember(state, key, found)
        return found

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
        state = options.get("state", "")
        load = partial(rkllm_prompts.load, self._session, text, state, key)
        if loaded := load():
            self._prompt_again = partial(load, proven=True)
        return loaded

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
        request = self._requests.build(order, rows)
        sampling, ignored = self._sampling(order)
        session, conversations = self._session, self._conversations
        assert conversations is not None, "load comes first"
        names = prefix.of_text(order.prompt, order.spans, order.adapter)
        self._restore(conversations, names, request)
        self._make_room(order, request)
        places = kv.places(order.tokens, order.spans) if order.tokens else []
        saved = conversations.begin(names, request.parts, places)
        infer = infer_param(
            session.library,
            sampling=sampling,
            # The field has 32 bits, and 0 or less would mean that of the init.
            max_new_tokens=max(1, min(order.max_tokens, self._manifest.decoder.context)),
            lora=order.adapter.encode() if order.adapter else None,
            save_prompt_cache=None if saved is None else saved.path,
        )
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
        self._names = ()
        self._runs += 1
        rc = session.run(request.value, infer, answer)
        well = rc == 0 and not answer.failed
        prompt = self._prompt_tokens(order, answer) if well else 0
        forgot = conversations.finish(
            saved, well=well, prompt=prompt, first=answer.waited, perf=answer.perf
        )
        if not well:
            self._raise(answer, rc)
            prompt = self._prompt_tokens(order, answer)
        reason = answer.finish()
        if not (answer.cut or self._abort.is_set() or not well):
            self._record.holds(request.parts, answer.text)
            self._places = [*places, *answer.tokens] if places else []
            if not self._has("no_prefix_reuse"):
                whole = order.prompt + answer.text
                self._names = prefix.of_text(whole, order.spans, order.adapter)
        number = conversations.number(saved)
        if number:
            forgot.append(0)  # what the library held besides
        return child.GenerateDone(
            id=order.id,
            reason=reason,
            completion=answer.completion,
            seconds=answer.seconds,
            prompt=prompt,
            cached=self._cached(prompt, answer),
            ignored=ignored,
            recycle=self.recycle,
            perf=answer.perf,
            conversation=number,
            held=list(self._names or (names if number else ())),
            forgot=forgot,
        )

    def _restore(self, conversations: Conversations, names: prefix.Chain, request: Request) -> None:
        """Take up the conversation that a prompt continues, if another one was at work since."""
        saved = conversations.restore(
            names, request.parts, self._names, told_apart=self._told_apart
        )
        if saved is not None:
            self._record.holds(saved.parts, "")
            self._places = list(saved.places)

    def embed(self, order: child.Embed, rows: Sequence[Rows]) -> Rows:
        """Return the hidden states of the last layer, float32 of shape (tokens, embedding).

        Raises:
          RkvlmdError: see ``generate``; ``engine_error`` when the library gives
            fewer rows than what is pooled needs.

        """
        self._abort.clear()
        request = self._requests.build(order, rows)
        # Nothing says that states are given again for what the cache holds (#446).
        self._record.unknown()
        self._names = ()
        self._make_room(order, request)
        self._record.unknown()
        self._runs += 1
        found = rkllm_hidden.states(
            self._session,
            request.value,
            embedding=self._manifest.decoder.embedding,
            lora=order.adapter,
        )
        self._kept += found.nbytes
        pooled = self._manifest.embeddings
        if pooled is not None and pooled.pool != "last" and len(found) < len(order.tokens):
            raise RkvlmdError(
                "engine_error",
                f"The RKLLM runtime gave the hidden states of {len(found)} of {len(order.tokens)}"
                " tokens.",
            )
        return found

    def _make_room(self, order: child.Generate | child.Embed, request: Request) -> None:
        """Clear the cache where what it holds would be taken for something else."""
        # What one adapter has computed is of no use to another.
        embeds = self._requests.table is not None
        if order.adapter != self._adapter or (embeds and self._has("embed_cache")):
            self._record.unknown()
        self._adapter = order.adapter
        beside = request.caches is not None
        if self._record.must_clear(request.parts, told_apart=self._told_apart, beside=beside):
            self._session.clear()
            self._record.cleared()
            self._places = []
        if request.caches is not None and self._session.set_cross_attention(request.caches.param):
            raise RkvlmdError("engine_error", "The RKLLM runtime took no cross attention.")

    def abort(self) -> None:
        """End the running ``generate`` after its next token; a prefill runs to its end."""
        self._abort.set()
        self._session.abort()

    def close(self) -> None:
        """Give the model back; nothing may be running."""
        if self._conversations is not None:
            self._conversations.close()
        self._session.close()

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
        try:
            size = self._session.cache_sizes()[0]
        except RuntimeError:
            return order.count  # it does not say
        return size - answer.completion if size > answer.completion else order.count

    def _cached(self, prompt: int, answer: Answer) -> int | None:
        """Return how much of the prompt was not computed, where the library has said that."""
        if answer.perf is None or answer.perf.prefill_tokens < 0:
            return None
        return max(0, prompt - answer.perf.prefill_tokens)

    @property
    def recycle(self) -> bool:
        """Whether the library has leaked so much that this child should be replaced."""
        runs = self._has("leaks") and self._runs >= rkllm_defects.RECYCLE_RUNS
        return runs or (self._has("keeps_floats") and self._kept >= rkllm_defects.KEPT_BYTES)
