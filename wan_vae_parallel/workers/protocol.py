"""What a run needs of the pool of workers that do it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .shared_memory import SharedMemory
from .shared_weights import Part
from .turn import Holder

# What a worker takes on a GPU besides a decode's own memory: the driver's context, kernels, boxes for the neighbours.
WORKER_BYTES = 3 * 2**28
# A GPU that is not done with a step by then waits for another one in vain.
STEP_SECONDS = 600.0


class Workers(Protocol):
    """What a run needs of the pool whose workers do it; see `pool.WorkerPool`."""

    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    encode_dtype: torch.dtype
    rings: list[SharedMemory]
    worked_on: tuple[torch.device, ...]

    @property
    def ours(self) -> bool:
        """Whether the workers are this process's."""
        ...

    @property
    def stage(self) -> str:
        """Of all workers."""
        ...

    @property
    def found(self) -> str:
        """The stage, for whoever wants them now: those of which one has ended are gone."""
        ...

    def belongs_here(self) -> None:
        """Notes that this thread goes on."""
        ...

    def leave(self, turn: Holder) -> None:
        """Gives them back, if it is ``turn`` that they were entered with."""
        ...

    def begin(self) -> None:
        """Begins them, if there are none that live."""
        ...

    def start(self, part: Part) -> None:
        """Waits until they are ready with a part's weights."""
        ...

    def advance(self, part: Part, soon: tuple[torch.Size, int] | None = ...) -> bool:
        """Brings them nearer to that without waiting; whether they are ready."""
        ...

    def open(self, kind: str, request: dict[str, Any], *descriptors: int) -> None:
        """Tells them what is to be done."""
        ...

    def finish(self) -> None:
        """Ends that."""
        ...

    def stop(self, grace: float = ...) -> None:
        """Ends them."""
        ...

    def tell(self, *message: object) -> None:
        """Sends all of them a message."""
        ...

    def hand_over(self, *descriptors: int) -> None:
        """Gives all of them descriptors, which follow a message that said so."""
        ...

    def gather(self, kind: str, count: int, *, limit: float | None = ...) -> list[tuple[Any, ...]]:
        """Waits for the answers of the first ``count``."""
        ...
