"""One request: who may end it, where its text goes, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors.policy import NORMAL
from rkvlmd.messages import PRIORITIES, Ended, JobView, Timings, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from rkvlmd.errors import RkvlmdError
    from rkvlmd.messages import ChatRequest, EndReason, Phase
    from rkvlmd.wire.child import Perf
    from rkvlmd.wire.thinking import Thinking


class Outbox:
    """One job's text on its way to one reader.

    Merges what the reader has not taken yet, so the writer never waits for a
    slow client. It holds at most what one job may generate. Thoughts come
    before the text that they lead to.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._thoughts: list[str] = []
        self._end: Ended | None = None
        self._wake = trio.Event()

    def put(self, text: str, thought: str = "") -> None:
        """Add text and thoughts; never waits. What comes after the end is dropped."""
        if (text or thought) and self._end is None:
            self._parts.append(text)
            self._thoughts.append(thought)
            self._wake.set()

    def close(self, end: Ended) -> None:
        """Say how the job ended. The first end stays."""
        if self._end is None:
            self._end = end
        self._wake.set()

    @property
    def end(self) -> Ended | None:
        """How the job ended, once it has."""
        return self._end

    async def take(self) -> tuple[str, Ended | None]:
        """Wait for text, thoughts or the end; return text and end, which is ``None`` before it.

        The last text and the end come together; ``thoughts`` gives those that
        came with them.
        """
        await self._wake.wait()
        text, self._parts = "".join(self._parts), []
        if self._end is None:
            self._wake = trio.Event()
        return text, self._end

    def thoughts(self) -> str:
        """Return the thoughts that nobody has taken yet."""
        taken, self._thoughts = "".join(self._thoughts), []
        return taken


@dataclass(eq=False, slots=True)
class Job:
    """One admitted request.

    ``checked`` is set when every check of the input is done (pictures decoded,
    prompt counted) or when the job has ended: from then on the front may
    choose a status. ``model`` is the name that the request resolved to, with
    ``adapter`` or none, ``rank`` its class in the queue, 0 the best.
    ``text_bytes`` are held for the text as long as the job lives.
    ``estimated``: nobody could count the prompt. ``ignored`` names the
    parameters that had no effect, ``perf`` is what the library measured. ``seconds`` holds the time of each stage, by
    the names of ``messages.Timings``; ``leased``, ``first_token`` and
    ``last_token`` are times of the loop's clock, as is ``phase_since``, when
    the phase began; ``ended_in`` is the phase in which its end came.
    ``on_phase`` hears of each new phase. ``thinking`` says how thoughts are told
    from the answer, of a model that has any.
    ``count_pixels`` takes the pixels of each picture that is ready,
    ``count_bytes`` those of a download, and minus as many when they are gone.
    """

    id: str
    client: str
    request: ChatRequest
    deadline: float
    submitted: float
    model: str = ""
    adapter: str = ""
    rank: int = NORMAL
    text_bytes: int = 0
    phase_since: float = 0.0
    outbox: Outbox = field(default_factory=Outbox)
    checked: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    thinking: Thinking | None = None
    max_tokens: int = 0
    leased: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended_in: Phase = "done"
    estimated: bool = False
    ignored: tuple[str, ...] = ()
    perf: Perf | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    count_pixels: Callable[[int], None] = lambda _pixels: None
    count_bytes: Callable[[int], None] = lambda _more: None
    on_phase: Callable[[], None] = field(default=lambda: None, repr=False)
    _phase: Phase = "admitted"

    def __post_init__(self) -> None:
        self.phase_since = self.submitted

    @property
    def phase(self) -> Phase:
        """What happens to the job now."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        if phase != self._phase:
            self._phase, self.phase_since = phase, trio.current_time()
            self.on_phase()

    def abandon(self, why: EndReason) -> None:
        """End the job from outside. Sync, so a cancelled task's ``finally`` may call it.

        The reader sees the end at once; the engine is joined behind it.
        """
        if self.outbox.end is None:
            self.finish(why)
            self.scope.cancel(reason=why)

    def finish(self, reason: EndReason, error: RkvlmdError | None = None) -> None:
        """Say how the job ended. The first end stays."""
        if self.outbox.end is not None:
            return
        if error is not None:
            # Its frames know the job, and so do those of what it came from: with them the job, its
            # prompt and its pictures would stay until the collector comes.
            error.__traceback__ = error.__context__ = error.__cause__ = None
        self.ended_in = self.phase
        self.seconds["total"] = trio.current_time() - self.submitted
        usage = Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            image_tokens=self.image_tokens,
            estimated=self.estimated,
            reasoning_tokens=min(self.reasoning_tokens, self.completion_tokens),
        )
        self.outbox.close(Ended(reason, usage, Timings(**self.seconds), error))
        self.checked.set()

    def spent(self, stage: str, since: float) -> None:
        """Add the time since ``since`` (the loop's clock) to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + trio.current_time() - since

    def view(self) -> JobView:
        """Return what ``rkvlmctl jobs`` shows; call it inside the loop."""
        return JobView(
            id=self.id,
            client=self.client,
            model=self.model,
            phase=self.phase,
            age=trio.current_time() - self.submitted,
            pictures=len(self.request.pictures),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            stream=self.request.stream,
            priority=PRIORITIES[self.rank],
            phase_age=trio.current_time() - self.phase_since,
        )
