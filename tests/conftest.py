"""What every test shares: no surprises from the environment, repeatable hypothesis."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import trio.testing

# No deadline: two cores may be busy. Derandomised: a failure is there every time.
hypothesis.settings.register_profile(
    "house", deadline=None, derandomize=True, database=None, max_examples=100
)
hypothesis.settings.load_profile("house")

#: Variables that change where the daemon puts things and whom it tells.
_FOREIGN = (
    "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID",
    "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "NO_COLOR", "OPENAI_API_KEY", "OPENAI_BASE_URL",
)  # fmt: skip


# A shell starts background jobs with SIGINT ignored, and programs that tests start would inherit
# that: a Ctrl-C could not be tested in them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def patient_clock() -> trio.testing.MockClock:
    """Jump as ``autojump_clock`` does, when nothing has happened for a while of the real time.

    For tests with sockets and threads: what the kernel or a thread still has in hand on a busy
    machine must not look as if all were waiting for the clock.
    """
    return trio.testing.MockClock(autojump_threshold=0.1)


@pytest.fixture(autouse=True, scope="session")
def _plain_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name in _FOREIGN or name.lower().endswith("_proxy"):
                patch.delenv(name)
        yield
