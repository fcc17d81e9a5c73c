"""What the tests of kernels share: where they run, what they may not fall back to, random inputs.

Without a GPU the same tests run on small shapes in Triton's interpreter, in fp16 (of bf16 it multiplies the bits):
``TRITON_INTERPRET=1 python -m pytest tests/gpu -k 'kernels or rows'``, with NumPy 2.2 for Triton 3.6, see .ci/run. Each
setting takes a GPU about a second to compile, so that tests share settings where they can: widths, dtypes and columns
are not chosen at random.
"""

from __future__ import annotations

import functools
import math
import os

import pytest
import torch

from tests.ops import plain
from wan_vae_parallel.ops import attention, conv, frames, norm_silu, pixels, shortcut

INTERPRETED = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("_kernels_alone"),
    pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="no CUDA device is there"),
]
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
DTYPE = DTYPES[0]
# Several tiles of positions, and none full.
SIZE = (2, 3, 5) if INTERPRETED else (2, 11, 45)
# As channels in and out: all widths of the decoders, and others.
WIDTHS = [16, 48, 80, 96, 128, 160, 192, 256, 320, 384, 512, 1024]

_on_device = {"device": DEVICE}
conv_problem = functools.partial(plain.conv_problem, **_on_device)
down_problem = functools.partial(plain.down_problem, **_on_device)
upsample_problem = functools.partial(plain.upsample_problem, **_on_device)
random = functools.partial(plain.random, **_on_device)
order = functools.partial(plain.order, **_on_device)


def leave_kernels_alone(monkeypatch):
    """No test passes because PyTorch's own kernels stood in; and all that an op allocates is NaN at first."""
    monkeypatch.setattr(conv, "F", None)
    monkeypatch.setattr(attention, "F", None)
    monkeypatch.setattr(norm_silu, "_wide_norm", None)

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    if INTERPRETED:
        for module in (attention, conv, frames, norm_silu, pixels, shortcut):
            monkeypatch.setattr(module, "kernels_run", lambda _: True)


def here(*interpreted, gpu):
    """Cases for a GPU, or fewer and smaller ones for the interpreter."""
    return list(interpreted) if INTERPRETED else gpu


def eager_of(module, function, *args, **kwargs):
    """What an op makes on PyTorch's own kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kernels_run", lambda _: False)
        return function(*args, **kwargs)


def norm_inputs(shape, dtype):
    return 3 * random(*shape, dtype=dtype), 1 + 0.1 * random(shape[-1], dtype=dtype, seed=1)
