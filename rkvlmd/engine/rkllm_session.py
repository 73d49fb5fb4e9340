"""One handle of ``librkllmrt.so``: its parameters, its runs, and what must stay alive for them."""

from __future__ import annotations

import contextlib
import ctypes as c
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkvlmd.engine import rkllm_types as types
from rkvlmd.engine.rkllm_library import Library
from rkvlmd.engine.rkllm_types import Mode, State

_STATES = {int(state): state for state in State}
#: Called for every result event, on the thread that runs; must read what it wants at once, for
#: all pointers end with the call. The returned number goes to the library: 0 goes on.
Sink = Callable[[State, Any], int]


class InitError(Exception):
    """``rkllm_init`` failed; what it printed says why."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, in the library's terms; every field is always given."""

    top_k: int
    top_p: float
    temperature: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float


@dataclass(frozen=True, slots=True)
class ImageTags:
    """What stands around a picture, and the token that is repeated inside; empty is allowed."""

    start: bytes = b""
    end: bytes = b""
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Setup:
    """What ``rkllm_init`` is told; ``None`` keeps the library's own default.

    ``context`` and ``max_new_tokens`` count tokens, ``domain`` is an IOMMU
    domain (0 to 15), ``cpu_mask`` has one bit a CPU.
    """

    model: Path
    context: int
    max_new_tokens: int
    sampling: Sampling | None = None
    tags: ImageTags = ImageTags()
    n_keep: int | None = None
    domain: int = 0
    cpu_mask: int | None = None
    embed_flash: bool | None = None
    cross_attention: bool = False
    ignore_eos: bool = False
    batch: int = 1


class Session:
    """One model in the library.

    ``run`` blocks and is for one thread; ``abort`` may be called from any
    other. Everything that the library holds a pointer to lives as long as this
    object: the callback, its structure, the parameters and their strings.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._handle = c.c_void_p()
        self._sink: Sink | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._running = False
        self._kept: list[Any] = []
        self._thunk = types.ResultCallback(self._on_result)

    # --- life -------------------------------------------------------------------------

    def open(
        self,
        setup: Setup,
        *,
        tokenizer: Callable[[bytes], Sequence[int]] | None = None,
        embeddings: Callable[[Sequence[int], c.Array[Any]], None] | None = None,
    ) -> None:
        """Load the model.

        ``tokenizer`` and ``embeddings`` are for files that lack theirs (from
        1.3.0): token ids of a text; float32 rows, written into the array.

        Raises:
          InitError: the library refused.

        """
        library = self.library
        param = library.default_param()
        self._fill(param, setup)
        argument: Any = self._thunk
        if library.layout.per_run:
            argument = types.Callback(result_callback=self._thunk)
            if tokenizer is not None:
                argument.tokenizer_callback = _tokenizer_thunk(tokenizer)
            if embeddings is not None:
                argument.embed_callback = _embed_thunk(embeddings)
            self._kept.append(argument)
            argument = c.byref(argument)
        self._kept.append(param)
        rc = library.rkllm_init(c.byref(self._handle), c.byref(param), argument)
        # Old libraries returned 0 with a handle of NULL.
        if rc != 0 or not self.is_open:
            self._handle = c.c_void_p()
            raise InitError(f"rkllm_init returned {rc}")

    def _fill(self, param: Any, setup: Setup) -> None:
        path, tags = str(setup.model).encode(), setup.tags
        self._kept += [path, tags]
        param.model_path = path
        param.max_context_len = setup.context
        param.max_new_tokens = setup.max_new_tokens
        param.skip_special_token = True
        param.is_async = False
        if setup.n_keep is not None:
            param.n_keep = setup.n_keep
        if setup.sampling is not None:
            _set_sampling(param, setup.sampling)
        extend = param.extend_param
        extend.base_domain_id = setup.domain
        extend.n_batch = setup.batch
        if setup.cpu_mask is not None:
            extend.enabled_cpus_mask = setup.cpu_mask
            extend.enabled_cpus_num = setup.cpu_mask.bit_count()
        if setup.embed_flash is not None:
            extend.embed_flash = int(setup.embed_flash)
        extend.use_cross_attn = int(setup.cross_attention)
        if self.library.layout.per_run:
            param.ignore_eos_token = setup.ignore_eos
        else:
            # NULL there crashes 1.2.x.
            param.img_start, param.img_end = tags.start, tags.end
            param.img_content = tags.content

    @property
    def is_open(self) -> bool:
        """Whether there is a handle."""
        return self._handle.value is not None

    def close(self) -> None:
        """Destroy the handle; no run may be going on."""
        if self.is_open:
            self.library.rkllm_destroy(self._handle)
            self._handle = c.c_void_p()

    # --- runs -------------------------------------------------------------------------

    def run(self, value: Any, infer: Any, sink: Sink) -> int:
        """Run to the end; return the library's code, 0 for success.

        ``value`` is an ``RKLLMInput`` (or an array of ``batch``), ``infer`` an
        ``RKLLMInferParam``; the caller keeps what they point to until this
        returns. What ``sink`` raises ends the run and is raised here.
        """
        self._sink, self._error = sink, None
        with self._lock:
            self._running = True
        try:
            rc = int(self.library.rkllm_run(self._handle, c.byref(value), c.byref(infer), None))
        finally:
            # Nothing is aborted that has ended: the next run must not inherit it.
            with self._lock:
                self._running = False
            self._sink = None
        self._raise()
        return rc

    def _raise(self) -> None:
        """Raise what the callback has kept."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def run_async(self, value: Any, infer: Any, sink: Sink) -> int:
        """Start a run on a thread of the library; not used: see the known defects.

        The caller waits for its end through ``sink`` before anything else.
        """
        self._sink, self._error = sink, None
        return int(self.library.rkllm_run_async(self._handle, c.byref(value), c.byref(infer), None))

    def abort(self) -> None:
        """End the running run after its next token; harmless when nothing runs. Thread-safe."""
        with self._lock:
            if self._running:
                self.library.rkllm_abort(self._handle)

    def abort_inside(self) -> None:
        """End the run whose callback this is called from."""
        self.library.rkllm_abort(self._handle)

    def _on_result(self, result: Any, _userdata: int | None, state: int) -> int:
        # No exception may cross the library's frame.
        try:
            sink = self._sink
            if sink is None or self._error is not None:
                return 0
            return sink(_STATES[state], result.contents if result else None)
        except BaseException as exc:  # noqa: BLE001 - kept, and raised when the run has returned
            self._error = exc
            with contextlib.suppress(BaseException):  # the first error is the one to tell
                self.abort_inside()
            return 0

    # --- between runs -----------------------------------------------------------------

    def raw_template(self) -> None:
        """Have prompts taken as they are, special tokens included."""
        self.set_template(b"", b"", b"")

    def set_template(self, system: bytes, prefix: bytes, postfix: bytes) -> None:
        """Replace the template of the file."""
        self._must(self.library.rkllm_set_chat_template(self._handle, system, prefix, postfix))

    def set_tools(self, system: bytes, tools: bytes, response: bytes) -> int:
        """Give the functions that the model may call (a JSON array); not used in raw mode."""
        return int(self.library.rkllm_set_function_tools(self._handle, system, tools, response))

    def clear(self, *, keep_system: bool = False) -> None:
        """Forget the whole key/value cache."""
        self._must(self.library.rkllm_clear_kv_cache(self._handle, int(keep_system), None, None))

    def clear_range(self, starts: Sequence[int], ends: Sequence[int]) -> int:
        """Forget positions from start to end, one pair a lane; legal in a pause alone."""
        kind = c.c_int * len(starts)
        return int(self.library.rkllm_clear_kv_cache(self._handle, 0, kind(*starts), kind(*ends)))

    def cache_sizes(self, batch: int = 1) -> list[int]:
        """Return how many positions the cache holds, one number a lane."""
        sizes = (c.c_int * batch)()
        self._must(self.library.rkllm_get_kv_cache_size(self._handle, sizes))
        return list(sizes)

    def load_lora(self, name: bytes, path: Path, scale: float) -> int:
        """Load an adapter; a run chooses it by its name."""
        adapter = types.LoraAdapter(str(path).encode(), name, scale)
        self._kept.append(adapter)
        return int(self.library.rkllm_load_lora(self._handle, c.byref(adapter)))

    def load_prompt_cache(self, path: Path) -> int:
        """Load a saved prompt; it counts as the beginning of the cache."""
        return int(self.library.rkllm_load_prompt_cache(self._handle, str(path).encode()))

    def release_prompt_cache(self) -> int:
        """Let go of the saved prompt."""
        return int(self.library.rkllm_release_prompt_cache(self._handle))

    def set_cross_attention(self, param: types.CrossAttnParam) -> int:
        """Give the caches of an encoder, before each run; the caller keeps what it points to."""
        return int(self.library.rkllm_set_cross_attn_params(self._handle, c.byref(param)))

    def is_running(self) -> int:
        """Return the library's own word; its meaning changed with 1.3.0, so it is not used."""
        return int(self.library.rkllm_is_running(self._handle))

    def _must(self, rc: int) -> None:
        if rc != 0:
            raise RuntimeError(f"the library returned {rc}")


def _set_sampling(target: Any, sampling: Sampling) -> None:
    for name in Sampling.__dataclass_fields__:
        setattr(target, name, getattr(sampling, name))


def _tokenizer_thunk(tokenizer: Callable[[bytes], Sequence[int]]) -> Any:
    def call(_data: Any, text: int, size: int, tokens: Any, most: int) -> int:
        try:
            ids = tokenizer(c.string_at(text, size))
            if len(ids) > most:
                return -1
            for i, token in enumerate(ids):
                tokens[i] = token
            return len(ids)
        except Exception:  # noqa: BLE001 - a negative count is how the library is told
            return -1

    return types.TokenizerCallback(call)


def _embed_thunk(embeddings: Callable[[Sequence[int], c.Array[Any]], None]) -> Any:
    def call(_data: Any, tokens: Any, count: int, room: int, size: int) -> int:
        try:
            embeddings(tokens[:count], (c.c_float * (size // 4)).from_address(room))
            return 0
        except Exception:  # noqa: BLE001 - any other code is how the library is told
            return -1

    return types.EmbedCallback(call)


def infer_param(
    library: Library,
    mode: Mode = Mode.GENERATE,
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 0,
    keep_history: bool = False,
    lora: bytes | None = None,
    save_prompt_cache: Path | None = None,
) -> Any:
    """Return an ``RKLLMInferParam``; it keeps what it points to.

    ``sampling`` and ``max_new_tokens`` exist from 1.3.0.
    """
    infer = library.layout.infer(mode=int(mode), keep_history=int(keep_history))
    if lora is not None:
        infer.lora_params = c.pointer(types.LoraParam(lora))
    if save_prompt_cache is not None:
        path = str(save_prompt_cache).encode()
        infer.prompt_cache_params = c.pointer(types.PromptCacheParam(1, path))
    if library.layout.per_run:
        infer.max_new_tokens = max_new_tokens
        if sampling is not None:
            defaults = library.default_param()
            wanted = types.SamplingParam()
            # The structure replaces the whole set: what we have no say in is the library's own.
            for name in ("mirostat", "mirostat_tau", "mirostat_eta"):
                setattr(wanted, name, getattr(defaults, name))
            _set_sampling(wanted, sampling)
            infer.sampling_params = c.pointer(wanted)
    return infer
