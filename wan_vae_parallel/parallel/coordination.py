"""What ranks tell one another before they exchange bytes, and when one of them can't go on."""

from __future__ import annotations

import collections
import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from ..errors import OutOfMemoryError, WanVAEError, WorkerError, is_out_of_memory, summary

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# For words that ranks say one after another, with nothing to do in between.
WORD_SECONDS = 60.0
# For words after work that takes its time: weights read from a slow disk, a caller who does other things.
WORK_SECONDS = 600.0
# A rank that waits looks this often whether another one has failed.
LOOK_SECONDS = 0.5

# Of each tensor: enough to tell other weights, whatever their size.
_SAMPLE = 1024
_FAILED = "failed"

# By ranks, over all their meetings: the number of the last meeting, and the keys that they still have in the store.
_met: collections.Counter[tuple[int, ...]] = collections.Counter()
_said: collections.defaultdict[tuple[int, ...], list[str]] = collections.defaultdict(list)


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A short text that differs where names, shapes, dtypes or the beginnings of values do."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = tensor.detach().flatten()[:_SAMPLE].to("cpu", torch.float64)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


class Coordinator:
    """A meeting of a group's ranks: words that they leave in the store through which they found each other.

    No device waits for them and no group of its own is needed. All ranks make one for the same thing, and then
    the same calls in the same order; every wait has an end, as long as the store answers.

    The first rank numbers the meetings, so that none can be taken for another. To one that the first rank refused
    before it came here, the others came in vain: they hear of its next one, and raise if that is about something
    else. Called again they join that one, for which the first rank waits `WORD_SECONDS`.

    Args:
        group: the ranks.
        about: what the meeting is for, by what it is called; ranks meet only if they have the same.
        place: this rank's, for errors; by default the host's name.

    Raises:
        WorkerError: ranks did not come, or to something else; or the group has failed for good before.
    """

    def __init__(self, group: dist.ProcessGroup, about: Mapping[str, str] | None = None, place: str = "") -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.device_names: list[str] = []
        self._place = place or socket.gethostname()
        self._ranks = tuple(dist.get_process_group_ranks(group))
        self._store = word_store(dist.distributed_c10d._get_default_store(), self._ranks)
        self._number = _met[self._ranks] + 1
        self._count = 0
        if self.rank == 0:
            self._announce(dict(about or {}))
        else:
            self._join(dict(about or {}))
        self._forget()

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (plain data), by rank."""
        return self.gather(lambda: value, WORD_SECONDS)

    def gather(self, step: Callable[[], Any], patience: float) -> list[Any]:
        """What ``step`` returned (plain data) on every rank, by rank; where it fails on one, it fails on all.

        Args:
            step: what each rank does; it must not wait for others.
            patience: seconds until ranks that said nothing are an error.

        Raises:
            WorkerError: another rank's step failed, or took too long. A rank's own error is raised as it is.
        """
        round_, self._count = str(self._count), self._count + 1
        try:
            word = {"value": step()}
        except BaseException as error:
            own = with_hint(error, self._name(self.rank))
            self._publish(round_, {"error": with_rank(own, self._name(self.rank))})
            if own is error:
                raise
            raise own from error
        self._publish(round_, word)
        words = self._wait_for(round_, range(self.world_size), patience)
        self._forget()
        return [theirs["value"] for theirs in words]

    def from_first(self, value: Any) -> Any:
        """The first rank's ``value``, on all; the first does not wait for the others."""
        round_, self._count = str(self._count), self._count + 1
        if self.rank == 0:
            self._publish(round_, {"value": value})
            return value
        return self._wait_for(round_, [0], WORK_SECONDS)[0]["value"]

    def fail(self, error: Exception) -> NoReturn:
        """Raises ``error``, or its cause on another rank, and ends the group for good.

        For what fails while other ranks wait for this one's bytes: they can't be met again.
        """
        name = self._name(self.rank)
        own = with_hint(error, name)
        cause = report_failure(self._store, with_rank(own, name))
        if not cause.startswith(name):
            raise WorkerError(cause) from error
        if own is error:
            raise own
        raise own from error

    def _announce(self, about: dict[str, str]) -> None:
        _met[self._ranks] = self._number
        everyone = range(self.world_size)
        self._publish("about", about)
        self._publish("come", {"about": about, "place": self._place})
        try:
            words = self._wait_for("come", everyone, WORK_SECONDS)
            deadline = time.monotonic() + WORD_SECONDS
            # Who came to another meeting may come to this one next.
            while reason := _disagreement({rank: word["about"] for rank, word in enumerate(words)}):
                if time.monotonic() > deadline:
                    raise WorkerError(reason)
                time.sleep(LOOK_SECONDS / 10)
                words = self._wait_for("come", everyone, WORD_SECONDS)
        except WorkerError as error:
            self._publish("begun", {"error": str(error)})
            raise
        self.device_names = [word["place"] for word in words]
        self._publish("begun", {"places": self.device_names})

    def _join(self, about: dict[str, str]) -> None:
        theirs = self._wait_for("about", [0], WORK_SECONDS)[0]
        while self._has("begun"):
            # Given up without this rank: all that came later are numbered after it.
            _met[self._ranks] = self._number
            self._number += 1
            theirs = self._wait_for("about", [0], WORK_SECONDS)[0]
        self._publish("come", {"about": about, "place": self._place})
        if reason := _disagreement({0: theirs, self.rank: about}):
            raise WorkerError(f"{reason}; or rank 0 refused this call, and its own error says why")
        _met[self._ranks] = self._number
        self.device_names = self._wait_for("begun", [0], WORK_SECONDS + WORD_SECONDS)[0]["places"]

    def _name(self, rank: int) -> str:
        place = self.device_names[rank] if self.device_names else self._place if rank == self.rank else ""
        return f"rank {rank} on {place}" if place else f"rank {rank}"

    def _key(self, what: str, rank: int) -> str:
        return f"{self._number}/{what}/{rank}"

    def _publish(self, what: str, word: object) -> None:
        key = self._key(what, self.rank)
        if key not in _said[self._ranks]:
            _said[self._ranks].append(key)
        self._query(self._store.set, key, json.dumps(word))

    def _wait_for(self, what: str, ranks: Sequence[int], patience: float) -> list[Any]:
        """What each of ``ranks`` said; raises the first error among it, or names those who said nothing."""
        keys = [self._key(what, rank) for rank in ranks]
        # Asked for again and again, as a wait in the store could not be told of a failure. The pauses grow with the
        # time waited, and cost at most a twentieth of it.
        began = looked = now = time.monotonic()
        while not self._query(self._store.check, keys) and now < began + patience:
            if now > looked + LOOK_SECONDS:
                looked = now
                if cause := self._query(failure, self._store):
                    raise WorkerError(cause)
            time.sleep(min(max(0.0005, (now - began) / 20), 0.05))
            now = time.monotonic()
        silent = [rank for rank in ranks if not self._has(what, rank)]
        heard = [key for rank, key in zip(ranks, keys, strict=True) if rank not in silent]
        words = [json.loads(self._query(self._store.get, key)) for key in heard]
        for word in words:
            if "error" in word:
                raise WorkerError(word["error"])
        if silent:
            raise WorkerError(
                f"{', '.join(map(self._name, silent))} said nothing for {patience:.0f} s; look at their output, see "
                f"that all ranks make the same calls and that their machines reach one another"
            )
        return words

    def _has(self, what: str, rank: int = 0) -> bool:
        return self._query(self._store.check, [self._key(what, rank)])

    def _forget(self) -> None:
        """Takes back what all ranks have read: they have all answered to the last word, so that is all before it."""
        said = _said[self._ranks]
        for key in said[:-1]:
            self._query(self._store.delete_key, key)
        del said[:-1]

    def _query(self, ask: Callable[..., Any], *arguments: object) -> Any:
        try:
            return ask(*arguments)
        except RuntimeError as error:
            raise WorkerError(
                f"{self._name(self.rank)} can't reach the ranks' store, which the first one's machine keeps "
                f"({summary(error)}); look at the output there"
            ) from error


def word_store(store: Store, ranks: Iterable[int]) -> Store:
    """The part of a world's ``store`` where ``ranks`` leave their words."""
    name = f"wan-vae-parallel/{'-'.join(map(str, ranks))}"
    return dist.PrefixStore(name, store)


def report_failure(words: Store, text: str) -> str:
    """Says in a `word_store` that its ranks can't go on; returns what was said first, which is the cause."""
    try:
        return words.compare_set(_FAILED, "", text).decode()
    except RuntimeError:  # the store is gone, and its machine's end is the news
        return text


def failure(words: Store) -> str:
    """What `report_failure` said; nothing if all is well.

    Raises:
        RuntimeError: the store is gone.
    """
    return words.get(_FAILED).decode() if words.check([_FAILED]) else ""


def with_rank(error: BaseException, name: str) -> str:
    """``error`` of the rank called ``name``, for the others; one that names its rank is passed on as it is."""
    text = str(error)
    return text if text.startswith("rank ") else f"{name}: {type(error).__name__}: {summary(error)}"


def with_hint(error: BaseException, name: str) -> BaseException:
    """Our own error for what torch says about memory and connections; any other error is returned as it is."""
    if isinstance(error, WanVAEError) or not isinstance(error, Exception):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"{name} ran out of memory ({summary(error)}); take a smaller chunk, use more devices, or free some of "
            f"its memory"
        )
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return WorkerError(
            f"{name} lost the connection to another rank ({summary(error)}); the first error in the ranks' outputs "
            f"is the cause, or else the network: name its interface with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, "
            f"and where GPUs can't reach one another, try NCCL_P2P_DISABLE=1"
        )
    return error


def check_agreement(facts: Mapping[str, str], coordinator: Coordinator) -> None:
    """Compares ``facts`` among all ranks; all must call.

    Args:
        facts: what must be alike, by what it is called.
        coordinator: the ranks'.

    Raises:
        WorkerError: on every rank, where ranks differ: neighbours would take each other's bytes for what they
            are not.
    """
    check_same(coordinator.exchange(dict(facts)))


def check_same(facts: Sequence[Mapping[str, str]]) -> None:
    """Like `check_agreement`, with every rank's facts at hand."""
    if reason := _disagreement(dict(enumerate(facts))):
        raise WorkerError(reason)


def _disagreement(facts: Mapping[int, Mapping[str, str]]) -> str:
    """In what which rank's ``facts`` differ from the first rank's; nothing if none do."""
    for rank, theirs in facts.items():
        for name in {**facts[0], **theirs}:
            first, other = facts[0].get(name), theirs.get(name)
            if first != other:
                return (
                    f"ranks disagree on the {name}: rank 0 has {first}, rank {rank} has {other}; give all of "
                    f"them the same arguments, files and version"
                )
    return ""
