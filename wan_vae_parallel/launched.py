"""What ``torchrun`` started: its process group, and an end that leaves nothing half-written."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from .errors import DeviceError
from .files import remove_unfinished

# torchrun itself kills after 30.
_UNWIND_SECONDS = 3.0


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextlib.contextmanager
def torchrun_group(devices: str) -> Iterator[dist.ProcessGroup]:
    """The group of all processes that torchrun started: over NCCL with a GPU each, over gloo on the CPU.

    Args:
        devices: ``"auto"`` or ``"cpu"``.

    Raises:
        DeviceError: more processes on this machine than GPUs.
    """
    cuda = devices != "cpu" and torch.cuda.is_available()
    device = None
    if cuda:
        local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= count:
            raise DeviceError(
                f"torchrun started {local_rank + 1} or more processes on this machine, which has {count} GPUs; "
                f"take --nproc-per-node {count}, or --devices cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    _end_when_told()
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _end_when_told() -> None:
    """Sees to it that SIGTERM ends this process, also while it waits for a rank that is gone and can't unwind."""
    if os.name != "posix":
        return
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)

    def wait() -> None:
        while signal.SIGTERM not in os.read(told, 1):
            pass
        time.sleep(_UNWIND_SECONDS)
        remove_unfinished()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
