"""Kinds of convolutions, and how fast a GPU model was seen to run them: on our kernels, and without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Equal bits are worth so much: cuDNN has to be faster by more to get a kind of layer.
_BITS_ARE_WORTH = 1.1


class LayerKind(NamedTuple):
    """What convolutions have in common whose speed is the same, whatever the picture.

    Attributes:
        op: ``"conv"``, ``"upsample_conv"``, ``"down_conv"`` or ``"head_conv"``, the function of `ops.conv`.
        channels: C of the weight.
        out_channels: O of the weight.
        kernel: kt, kh and kw of the weight.
        halves: output frames that the channels are shared out among.
        time_stride: input frames from one output frame to the next.
    """

    op: str
    channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    halves: int = 1
    time_stride: int = 1

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        halves = f" in {self.halves} halves" if self.halves > 1 else ""
        stride = f" every {self.time_stride} frames" if self.time_stride > 1 else ""
        return f"{self.op} {kernel} {self.channels} to {self.out_channels}{halves}{stride}"

    @property
    def scale(self) -> int:
        """How many times rows and columns grow."""
        return 2 if self.op == "upsample_conv" else 1

    @property
    def flops(self) -> int:
        """Of one position of the output, with all its channels; as the layer is published, not as a kernel does it."""
        kt, kh, kw = self.kernel
        return 2 * kt * kh * kw * self.channels * self.out_channels


@dataclass(frozen=True)
class Measured:
    """TFLOP/s of one kind of layer on one GPU model, in one dtype; 0 for what does not run there.

    Attributes:
        tiles: of each of `kernels.tiles.candidates`, in their order.
        cudnn: of all that takes a kernel's place: cuDNN, and the copies that bring the arena's frames into its form.
    """

    tiles: tuple[float, ...]
    cudnn: float

    @property
    def ours(self) -> float:
        """The best setting's."""
        return max(self.tiles, default=0.0)

    @property
    def lost(self) -> bool:
        """Whether cuDNN is faster by over 10%, or alone."""
        return self.cudnn > self.ours * _BITS_ARE_WORTH
