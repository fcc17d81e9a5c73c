"""Cancelling what a decode waits for besides its frames: workers that start, kernels that compile, settings.

Whoever waits long calls `check_cancelled` several times a second, in the thread that decodes.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

# How often those who wait look, in seconds.
LOOK_SECONDS = 0.1

_check: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("check", default=None)


class _Cancelled(BaseException):
    """Carries what the check raised past handlers that are for failures."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(f"cancelled ({type(reason).__name__}: {reason})")
        self.reason = reason


@contextlib.contextmanager
def cancellable(check: Callable[[], None]) -> Iterator[None]:
    """Within it, in this thread, `check_cancelled` calls ``check``; what that raises ends the block."""
    token = _check.set(check)
    try:
        yield
    except _Cancelled as cancelled:
        raise cancelled.reason from None
    finally:
        _check.reset(token)


def check_cancelled() -> None:
    """Ends the decode of this thread if that was cancelled."""
    check = _check.get()
    if check is None:
        return
    try:
        check()
    except BaseException as reason:  # noqa: BLE001 (it is raised again where it is expected)
        raise _Cancelled(reason) from None
