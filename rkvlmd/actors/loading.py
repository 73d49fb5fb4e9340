"""How a model's children are brought up and taken down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from rkvlmd.actors import engine, memory
from rkvlmd.actors.child import Child, ChildDiedError, ChildWedgedError
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import catalog
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child as wire

if TYPE_CHECKING:
    from rkvlmd.actors.records import Record
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)

#: File in the state folder that remembers checked hashes; the most of them (one a file, some
#: hundred bytes each), and the largest file that is read, bytes.
HASHES = "hashes.json"
MOST_HASHES = 4096
MOST_HASHES_BYTES = 1 << 20


class LoadError(Exception):
    """A load failed; the text has the child's last words, ``public`` is for clients.

    ``died`` says that a child ended by itself: such a load is tried once more.
    """

    def __init__(self, text: str, public: RkvlmdError, *, died: bool = False) -> None:
        super().__init__(text)
        self.public = public
        self.died = died


@dataclass(eq=False, slots=True)
class Part:
    """One child of a model and what it said at ``ready``."""

    name: str
    role: str
    index: int
    size: int
    npu: bool = False
    child: Child | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    info: dict[str, Any] = field(default_factory=dict)
    ready: bool = False
    fraction: float = 0.0
    starts: int = 0

    @property
    def key(self) -> str:
        """Which of the model's parts it is, the same over restarts."""
        return f"{self.role}.{self.index}"

    def resident(self) -> int:
        """Return the bytes it holds; what lies in the NPU's memory is in no process's figure."""
        if self.child is None:
            return 0
        held = memory.resident(self.child.pid)
        return max(held, self.size) if self.npu and self.ready else held

    @property
    def alive(self) -> bool:
        """Whether it takes orders."""
        return self.ready and self.child is not None and self.child.alive


@dataclass(eq=False, slots=True)
class Loaded:
    """The children of one model; encoders may be there without the decoder."""

    parts: list[Part]

    @property
    def alive(self) -> bool:
        """Whether every child takes orders."""
        return all(part.alive for part in self.parts)

    @property
    def decoding(self) -> bool:
        """Whether the decoder exists, though it may have died."""
        return any(part.child is not None for part in self.parts if part.role == "decoder")

    @property
    def missing(self) -> list[Part]:
        """Those that do not exist."""
        return [part for part in self.parts if part.child is None]

    @property
    def children(self) -> list[Child]:
        """Those that exist."""
        return [part.child for part in self.parts if part.child is not None]

    def child(self, role: str, index: int = 0) -> Child:
        """Return the child of a role; ``index`` is that of an encoder in the manifest."""
        part = next(p for p in self.parts if p.role == role and p.index == index)
        assert part.child is not None
        return part.child

    def lines(self) -> Iterator[dict[str, object]]:
        """For ``rkvlmctl status``."""
        for part in self.parts:
            if part.child is not None:
                yield {
                    "name": part.name,
                    "pid": part.child.pid,
                    "state": "ready" if part.alive else "starting",
                    "restarts": max(0, part.starts - 1),
                    "memory_bytes": part.resident(),
                    "info": part.info,
                }


Options = Callable[[str], dict[str, Any]]


class Loader:
    """Starts, loads and stops children; owned by residency, whose nursery they run in."""

    def __init__(
        self,
        settings: Settings,
        state: Path,
        *,
        options: Options = lambda _role: {},
        make_child: Callable[[str, str], Child] | None = None,
    ) -> None:
        self._settings = settings
        self._hashes = state / HASHES
        self._options = options
        self._make_child = make_child or (lambda n, r: Child(n, r, self._settings.engine))
        self._remembered: dict[str, str] | None = None
        self.nursery: trio.Nursery | None = None
        #: Children of each role that were started in the place of one that had gone.
        self.restarts = {"encoder": 0, "decoder": 0}
        self.on_change: Callable[[], None] = lambda: None
        self.on_death: Callable[[str, ChildDiedError], None] = lambda _n, _d: None

    def adopt(self, settings: Settings) -> None:
        """Take settings that were read again; for children to come."""
        self._settings = settings

    async def verify(self, record: Record) -> None:
        """Check the files' hashes, once per (inode, size, time of change).

        Raises:
          LoadError: a file is missing or is not what the manifest says.

        """
        if self._remembered is None:
            self._remembered = await trio.to_thread.run_sync(self._read_hashes)
        cancelled = False
        token = trio.lowlevel.current_trio_token()

        def progress(fraction: float) -> None:
            if cancelled:
                raise InterruptedError
            token.run_sync_soon(self._progress, record, fraction / 2)

        try:
            problems, remembered = await trio.to_thread.run_sync(
                catalog.verify, record.entry, dict(self._remembered), progress,
                abandon_on_cancel=True,
            )  # fmt: skip
        except trio.Cancelled:
            cancelled = True
            raise
        if problems:
            text = "; ".join(problems)
            raise LoadError(text, RkvlmdError("invalid_model", "Its files are damaged."))
        if remembered.items() <= self._remembered.items():
            return
        # Those of other models stay, or each swap would read whole model files again. The latest
        # come last; those of files that are gone are pushed out one day.
        others = {k: v for k, v in self._remembered.items() if k not in remembered}
        self._remembered = dict([*others.items(), *remembered.items()][-MOST_HASHES:])
        await trio.to_thread.run_sync(self._write_hashes, self._remembered)

    def _read_hashes(self) -> dict[str, str]:
        try:
            with self._hashes.open("rb") as file:
                data = file.read(MOST_HASHES_BYTES + 1)
            return msgspec.json.decode(data, type=dict[str, str])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            log.warning("%s in the state folder is damaged; files are hashed again", HASHES)
            return {}

    def _write_hashes(self, remembered: dict[str, str]) -> None:
        """Best effort: without it the next start hashes again."""
        temporary = self._hashes.with_suffix(".new")
        try:
            temporary.write_bytes(msgspec.json.encode(remembered))
            temporary.replace(self._hashes)
        except OSError as exc:
            log.warning("the checked hashes could not be kept: %s", exc.strerror)

    async def bring_up(self, record: Record) -> None:
        """Start what does not run: all parts at the same time, those on the NPU in turn.

        An operation on the NPU's memory fails when work in another IOMMU domain
        keeps it waiting for 6 s, so there the decoder comes first, as in the
        vendor's own program, and the encoders after it.

        Raises:
          LoadError: a part failed; the others keep what they have.

        """
        if record.loaded is None:
            record.loaded = Loaded(list(parts_of(record.entry)))
        errors: list[LoadError] = []

        async def one(part: Part) -> None:
            try:
                await self._start(record, part)
            except LoadError as exc:
                errors.append(exc)

        async def on_npu(parts: list[Part]) -> None:
            for part in sorted(parts, key=lambda part: part.role != "decoder"):
                if not errors:
                    await one(part)

        missing = [part for part in record.loaded.parts if not part.alive]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on_npu, [part for part in missing if part.npu])
            for part in missing:
                if not part.npu:
                    nursery.start_soon(one, part)
        if errors:
            raise errors[0]

    async def _start(self, record: Record, part: Part) -> None:
        assert self.nursery is not None
        await self._stop(part)
        part.child = child = self._make_child(part.name, part.role)
        part.scope = trio.CancelScope()
        part.fraction = 0.0
        part.starts += 1
        if part.starts > 1:
            self.restarts[part.role] += 1
        order = wire.Load(
            folder=str(record.entry.folder),
            manifest=manifests.to_builtins(record.entry.manifest),
            part=part.index,
            options={
                **self._engine_options(record.entry.manifest.decoder.engine),
                **self._options(part.role),
            },
        )

        def progress(fraction: float, _doing: str) -> None:
            part.fraction = max(0.0, min(1.0, fraction))
            parts = record.loaded.parts if record.loaded is not None else [part]
            self._progress(record, 0.5 + sum(p.fraction for p in parts) / len(parts) / 2)

        try:
            await self.nursery.start(self._keep, record.name, part, child, name=part.name)
            ready = await engine.load(
                child, order, self._settings.engine, size=part.size, progress=progress
            )
        except ChildDiedError as exc:
            raise LoadError(
                f"{exc.name} ended while it loaded: {exc.how}: {exc.last_words[-500:]}",
                RkvlmdError("model_failed", "The engine ended while the model was loaded."),
                died=not exc.planned,
            ) from exc
        except ChildWedgedError as exc:
            raise LoadError(
                f"{exc}: {child.last_words[-500:]}",
                RkvlmdError("model_failed", "The load took too long."),
            ) from exc
        except RkvlmdError as exc:
            # What a library printed is nowhere else: the child leaves with it.
            printed = f": {child.last_words[-500:]}" if child.last_words else ""
            raise LoadError(f"{part.name}: {exc.message}{printed}", exc) from exc
        part.info = {**(child.hello.libraries if child.hello else {}), **ready.info}
        part.ready = True
        part.fraction = 1.0

    def _engine_options(self, engine: str) -> dict[str, Any]:
        """Return what every engine child is told."""
        npu = self._settings.npu
        return {
            "threads": self._settings.engine.threads,
            "library": npu.library,
            "layout": npu.layout,
            "soc": npu.soc,
            "sampling": npu.sampling,
            "state": str(self._hashes.parent),
            "conversations_bytes": conversations_bytes(self._settings, engine),
        }

    async def _keep(
        self,
        model: str,
        part: Part,
        child: Child,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """One child's task: from start to reaped."""
        with part.scope:
            await child.run(task_status=task_status)
        stopped = part.scope.cancel_called
        was_ready, part.ready = part.ready, False
        if was_ready and not stopped and child.death is not None:
            self.on_death(model, child.death)

    async def take_down(self, loaded: Loaded, role: str = "") -> None:
        """Stop all children, or those of one role, and wait until they are gone."""
        async with trio.open_nursery() as nursery:
            for part in loaded.parts:
                if role in ("", part.role):
                    nursery.start_soon(self._stop, part)

    async def _stop(self, part: Part) -> None:
        if part.child is not None:
            part.scope.cancel(reason="the model is unloaded")
            await part.child.dead.wait()
            part.child = None
            part.ready = False
            part.info = {}

    def _progress(self, record: Record, fraction: float) -> None:
        record.progress = max(record.progress, min(1.0, fraction))
        self.on_change()


def parts_of(entry: Entry) -> Iterator[Part]:
    """Return what a model's load starts, none of it running."""
    manifest, folder = entry.manifest, entry.folder
    for index, encoder in enumerate(manifest.encoders):
        name = f"encoder:{entry.name}" + (f".{index}" if index else "")
        npu = encoder.engine == "rknn"
        more = [encoder.projector] if encoder.projector is not None else []
        files = [encoder.file, *(f.file for f in (*more, *encoder.data))]
        yield Part(name, "encoder", index, sum(_size(folder / f) for f in files), npu)
    files = [f.file for f in manifest.decoder.files.values()]
    files += [adapter.file for adapter in manifest.decoder.adapters]
    size = sum(_size(folder / f) for f in files)
    npu = manifest.decoder.engine == "rkllm"
    yield Part(f"decoder:{entry.name}", "decoder", 0, size, npu)


def conversations_bytes(settings: Settings, engine: str) -> int:
    """Return how much a decoder of this engine may keep of other conversations."""
    section = settings.npu if engine == "rkllm" else settings.cache
    return section.conversations_bytes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
