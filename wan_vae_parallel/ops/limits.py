"""Sizes that operations, their kernels and the arithmetic of memory go by."""

# Of a tensor, as torch's own convolutions count: with more some raise, and some are wrong, as cuDNN's version has it.
MOST_VALUES = 2**31 - 1
# Up to so many channels attention takes one pass; for more its weights are written, so many at a time (128 MiB).
FUSED_CHANNELS = 384
WEIGHTS_AT_ONCE = 2**26
