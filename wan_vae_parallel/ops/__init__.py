"""One operation a file, on plain tensors: no modules, no state, no ranks.

T frames, H rows, W columns, C channels; activations are contiguous ``[T, H, W, C]``, which torch calls
``channels_last_3d`` once the axes are named ``[1, C, T, H, W]``.
"""
