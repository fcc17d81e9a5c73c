"""Sizes and widths that operations, their kernels and the arithmetic of memory go by."""

# Of a tensor, as torch's own convolutions count: with more some raise, and some are wrong, as cuDNN's version has it.
MOST_VALUES = 2**31 - 1
# Up to so many channels attention takes one pass; for more its weights are written, so many at a time (288 MiB).
FUSED_CHANNELS = 384
WEIGHTS_AT_ONCE = 9 * 2**24

# Of norms: Qwen-Image-2.1 has 9 times a power of two, which is 72 registers a thread; 8 channels are 16 bytes.
_MOST_GROUPS, _LANES = 9, (8, 1024)


def powers_of_two(channels: int, most: int) -> tuple[int, int]:
    """How many equal powers of two, of ``most`` at most, make up ``channels``, and their size."""
    part = min(most, channels & -channels)
    return channels // part, part


def norm_takes(channels: int) -> bool:
    """Whether the norm's kernel takes so many channels: up to 9 times a power of two from 8 to 1024."""
    groups, lanes = powers_of_two(channels, channels)
    return _LANES[0] <= lanes <= _LANES[1] and groups <= _MOST_GROUPS


def attention_takes(channels: int) -> bool:
    """Whether attention's kernels take so many: up to 5 times a power of two from 16 to 128, or multiples of 128."""
    parts, part = powers_of_two(channels, 128)
    return part >= 16 and parts <= 5 if channels <= FUSED_CHANNELS else part == 128
