"""Cancelling what a decode waits for besides its frames: workers that start, kernels that compile, settings.

Whoever waits long calls `check_cancelled` several times a second, in the thread that decodes.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from types import TracebackType

# How often those who wait look, in seconds.
LOOK_SECONDS = 0.1

_check: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("check", default=None)


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
        self._check = check

    def __enter__(self) -> None:
        self._token = _check.set(self._check)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _check.reset(self._token)
        if isinstance(error, Cancelled):
            raise error.reason from None


def check_cancelled() -> None:
    """Ends the decode of this thread if that was cancelled."""
    check = _check.get()
    if check is None:
        return
    try:
        check()
    except BaseException as reason:  # noqa: BLE001 (it is raised again where it is expected)
        raise Cancelled(reason) from None
