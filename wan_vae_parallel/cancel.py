"""Cancelling what a decode waits for: workers that start, kernels that compile, settings, a device's layers.

Whoever waits long calls `check_cancelled` several times a second, in the thread that decodes; whoever comes by more
often than that calls `look_whether_cancelled`.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from types import TracebackType

# How often those who wait look, in seconds.
LOOK_SECONDS = 0.1

_current: contextvars.ContextVar[cancellable | None] = contextvars.ContextVar("current", default=None)


class Cancelled(BaseException):
    """Carries what the check raised past handlers that are for failures."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(f"cancelled ({type(reason).__name__}: {reason})")
        self.reason = reason


class cancellable:
    """Within it, in this thread, `check_cancelled` calls ``check``; what that raises ends the block.

    No generator makes it: such would change a StopIteration that passes.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check
        # When that was called last, by the clock.
        self.looked = time.monotonic()

    def __enter__(self) -> None:
        self._token = _current.set(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _current.reset(self._token)
        if isinstance(error, Cancelled):
            raise error.reason from None


def check_cancelled() -> None:
    """Ends the decode of this thread if that was cancelled."""
    current = _current.get()
    if current is None:
        return
    try:
        current.check()
    except BaseException as reason:  # noqa: BLE001 (it is raised again where it is expected)
        raise Cancelled(reason) from None
    current.looked = time.monotonic()


def look_whether_cancelled() -> None:
    """`check_cancelled`, if nobody has just done so: it costs next to nothing, however often it is called."""
    current = _current.get()
    if current is not None and time.monotonic() - current.looked >= LOOK_SECONDS:
        check_cancelled()
