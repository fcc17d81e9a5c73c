"""Whether processes still run, when nothing but their silence could tell."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A machine that is gone, or has no breath left for anything.
SILENT_SECONDS = 60.0
# Of this machine's processes the system tells whether they are stopped. Who continues one sooner does no harm.
_STOPPED_SECONDS = 5.0
# Loading torch from a cold disk, on a machine that is busy with as much for other ranks.
_BEGIN_SECONDS = 300.0
# If this process itself did not run for so long, it can't blame others for their silence.
PAUSE_SECONDS = 2.0


def stopped(pid: int | None) -> bool:
    """Whether somebody has stopped the process (SIGSTOP), so that it lives and does nothing."""
    return _status(pid)[0] == "T"


def _status(pid: int | None) -> tuple[str, str]:
    """A process's state letter, and when it started; nothing of one that is gone, or where no /proc tells."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], words[19]
    except (OSError, IndexError):
        return "", ""


def _identity() -> dict[str, Any]:
    """This process, so that others know whether they see the same one under its number."""
    machine = ""
    with contextlib.suppress(OSError):
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return {"machine": machine, "pid": os.getpid(), "started": _status(os.getpid())[1]}


@dataclasses.dataclass
class _Neighbour:
    rank: int
    heard: float
    beats: int = 0


class Heartbeat:
    """Shows that this rank runs, in a store that all ranks reach, and looks after some of them.

    Args:
        store: the ranks'.
        rank: this one.
        name: what it is called in errors.
        world_size: number of ranks.
        others: the ranks to look after; every rank should be among some other's.
    """

    def __init__(self, store: Store, rank: int, name: str, world_size: int, others: Iterable[int]) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._identity = _identity()
        self._looked = time.monotonic()
        self._neighbours = [_Neighbour(other, self._looked) for other in sorted({*others} - {rank})]
        store.set(_who(rank), json.dumps({**self._identity, "name": name}))
        store.add(_beats(rank), 1)

    def beat(self) -> str:
        """To be called about once a second; returns what is wrong with another rank, or nothing.

        Those that are stopped on this machine are continued then, so that they can end.

        Raises:
            RuntimeError: the store is gone.
        """
        self._store.add(_beats(self._rank), 1)
        now = time.monotonic()
        awake = now - self._looked < PAUSE_SECONDS
        self._looked = now
        for neighbour in self._neighbours:
            beats = self._store.add(_beats(neighbour.rank), 0)
            if beats != neighbour.beats or beats < 0 or not awake:  # below zero: it is over
                neighbour.beats, neighbour.heard = beats, now
            silent = now - neighbour.heard
            if beats == 0 and silent > _BEGIN_SECONDS:
                return f"no word from rank {neighbour.rank} since {silent:.0f} s; look at its output and its machine"
            if beats > 0 and silent > _STOPPED_SECONDS and (reason := self._verdict(neighbour.rank, silent)):
                self._continue_all()
                return reason
        return ""

    def end(self) -> None:
        """This rank will show nothing more, and that is right."""
        with contextlib.suppress(RuntimeError):  # the store may be gone, and nobody looks then
            self._store.add(_beats(self._rank), -(2**40))

    def _verdict(self, rank: int, silent: float) -> str:
        who = self._of(rank)
        # Not to begin with the rank's name: these are not its own words.
        reason = f"no answer from {who['name']} for {silent:.0f} s"
        if self._sees_stopped(who):
            return f"{reason}: its process {who['pid']} was stopped"
        if silent > SILENT_SECONDS:
            return f"{reason}; look at what its process {who['pid']} and its machine do"
        return ""

    def _continue_all(self) -> None:
        for rank in range(self._world_size):
            if self._store.check([_who(rank)]) and self._sees_stopped(who := self._of(rank)):
                with contextlib.suppress(OSError):
                    os.kill(who["pid"], signal.SIGCONT)

    def _sees_stopped(self, who: dict[str, Any]) -> bool:
        same_machine = who["machine"] and who["machine"] == self._identity["machine"]
        return bool(same_machine) and _status(who["pid"]) == ("T", who["started"])

    def _of(self, rank: int) -> dict[str, Any]:
        who: dict[str, Any] = json.loads(self._store.get(_who(rank)))
        return who


def _who(rank: int) -> str:
    return f"who/{rank}"


def _beats(rank: int) -> str:
    return f"beats/{rank}"
