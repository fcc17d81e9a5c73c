"""Each op written out in fp64, and tensors to try it on: what the tests of ops on CPUs and GPUs compare with.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F


def random(*shape, dtype=torch.float32, seed=0, device="cpu"):
    """The same values in every dtype (up to its rounding) and on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def random_weight(out_channels, channels, *kernel, dtype=torch.float32, seed=1, device="cpu"):
    """``[O, C, *kernel]``, channels last, that keeps the size of what it convolves."""
    weight = random(out_channels, channels, *kernel, seed=seed, dtype=torch.float64)
    weight = (weight / (channels * math.prod(kernel)) ** 0.5).to(device, dtype)
    return weight.contiguous(memory_format=torch.channels_last_3d if len(kernel) == 3 else torch.channels_last)


def order(count, *, spare=0, seed=0, device="cpu"):
    """``count`` of ``count + spare`` slots, in no order."""
    return torch.randperm(count + spare, generator=torch.Generator().manual_seed(seed))[:count].int().to(device)


def in_arena(frames, slots, *, border, spare=2):
    """An arena that has ``frames`` ``[T, H, W, C]`` within zero borders in ``slots``, and NaN in all other slots."""
    padded = F.pad(frames, (0, 0, border, border, border, border))
    arena = padded.new_full((len(slots) + spare, *padded.shape[1:]), math.nan)
    arena[slots.long()] = padded
    return arena


def turned(x):
    """With rows and columns in each other's place."""
    return x.transpose(1, 2).contiguous()


def conv_problem(size, channels, out_channels, kernel=(3, 3, 3), *, time_stride=1, dtype=torch.float32, device="cpu"):
    """Arena, slots in no order, weight, bias: past frames that are not blank, and NaN in the slots not named."""
    frames, rows, columns = size
    slots = order((frames - 1) * time_stride + kernel[0], spare=2, device=device)
    pictures = random(len(slots), rows, columns, channels, dtype=dtype, device=device)
    arena = in_arena(pictures, slots, border=kernel[1] // 2)
    weight = random_weight(out_channels, channels, *kernel, dtype=dtype, device=device)
    return arena, slots, weight, random(out_channels, dtype=dtype, seed=2, device=device)


def upsample_problem(size, channels, out_channels, *, dtype=torch.float32, device="cpu"):
    """Frames without a border, and arena, slots, weight, bias."""
    slots = order(size[0], spare=2, device=device)
    frames = random(*size, channels, dtype=dtype, device=device)
    weight = random_weight(out_channels, channels, 3, 3, dtype=dtype, device=device)
    bias = random(out_channels, dtype=dtype, seed=2, device=device)
    return frames, (in_arena(frames, slots, border=1), slots, weight, bias)


def down_problem(size, channels, out_channels, *, dtype=torch.float32, device="cpu"):
    """Frames of twice ``size`` without a border; and arena, slots, weight, bias, with NaN in the borders not read."""
    frames, rows, columns = size
    slots = order(frames, spare=2, device=device)
    pictures = random(frames, 2 * rows, 2 * columns, channels, dtype=dtype, device=device)
    arena = in_arena(pictures, slots, border=1)
    arena[:, 0] = math.nan
    arena[:, :, 0] = math.nan
    weight = random_weight(out_channels, channels, 3, 3, dtype=dtype, device=device)
    return pictures, (arena, slots, weight, random(out_channels, dtype=dtype, seed=2, device=device))


def bits(x):
    """What ``x`` has in memory, so that NaN equals NaN."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def inside(arena, slots, border):
    """What lies within the borders of an arena's slots; a copy."""
    return arena[slots.long(), border : arena.shape[1] - border, border : arena.shape[2] - border]


def changed_alone(arena, before, slots, border):
    """Whether ``arena`` has the bits that it had before but for what lies within the borders of ``slots``."""
    old, new = bits(before).clone(), bits(arena).clone()
    for tensor in (old, new):
        tensor[slots.long(), border : arena.shape[1] - border, border : arena.shape[2] - border] = 0
    return torch.equal(old, new)


def relative_error(actual, exact):
    """Of all values together: one that is wrong, or NaN, shows among ten thousand that are rounded."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def errs_at_most_twice_as_much(actual, eager, exact):
    """Whether ``actual`` is as close as eager PyTorch, or as the rounded exact values where eager has luck."""
    rounding = relative_error(exact.to(actual.dtype), exact)
    return relative_error(actual, exact) <= 2 * max(relative_error(eager, exact), rounding)


def plain_conv(arena, slots, weight, bias, *, halves=1, time_stride=1, residual=None):
    """Tap by tap."""
    seen = arena[slots.long()].double()
    taps = weight.double()
    out_channels, _, *kernel = weight.shape
    frames, rows, columns = (size - taken + 1 for size, taken in zip(seen.shape, kernel, strict=False))
    total = bias.double().expand(-(-frames // time_stride), rows, columns, out_channels)
    for t, h, w in itertools.product(*map(range, kernel)):
        total = total + seen[t : t + frames : time_stride, h : h + rows, w : w + columns] @ taps[:, :, t, h, w].T
    if halves == 2:
        earlier, later = total.chunk(2, dim=3)
        total = torch.stack([earlier, later], dim=1).flatten(0, 1)
    return total if residual is None else total + residual.double()


def eager_conv(arena, slots, weight, bias, *, time_stride=1):
    """What PyTorch makes of ``[N, C, T, H, W]``, as code without pages has it."""
    seen = arena[slots.long()].permute(3, 0, 1, 2)[None].contiguous()
    return F.conv3d(seen, weight.contiguous(), bias, stride=(time_stride, 1, 1))[0].permute(1, 2, 3, 0)


def plain_upsample_conv(frames, weight, bias):
    """``frames`` ``[T, H, W, C]`` without a border, doubled and convolved as Wan's code does it, in their dtype."""
    doubled = F.interpolate(frames.permute(0, 3, 1, 2).contiguous(), scale_factor=2.0, mode="nearest-exact")
    return F.conv2d(doubled, weight.contiguous(), bias, padding=1).permute(0, 2, 3, 1)


def plain_down_conv(frames, weight, bias):
    """``frames`` ``[T, 2H, 2W, C]`` without a border, padded and convolved as Wan's code does it, in their dtype."""
    padded = F.pad(frames.permute(0, 3, 1, 2), (0, 1, 0, 1)).contiguous()
    return F.conv2d(padded, weight.contiguous(), bias, stride=2).permute(0, 2, 3, 1)


def plain_norm(x, gamma):
    return F.normalize(x.double(), dim=-1) * math.sqrt(x.shape[-1]) * gamma.double().reshape(-1)


def eager_norm(x, gamma):
    """As diffusers does it: the statistics in fp32, the scaling in half precision."""
    return F.normalize(x.float(), dim=-1).to(x.dtype) * math.sqrt(x.shape[-1]) * gamma.reshape(-1)


def plain_attention(query, key, value):
    """In the dtype of what it gets."""
    scores = torch.einsum("tnc,tmc->tnm", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("tnm,tmc->tnc", scores.softmax(-1), value)


def plain_frames(x, patch):
    frames, rows, columns, channels = x.shape
    out = x.new_empty((frames, rows * patch, columns * patch, channels // patch**2), dtype=torch.float64)
    for colour in range(out.shape[-1]):
        for column in range(patch):
            for row in range(patch):
                out[:, row::patch, column::patch, colour] = x[..., (colour * patch + column) * patch + row].double()
    return ((out + 1) / 2).clamp(0, 1)


def plain_duplicated(x, out_channels, time_factor, phases):
    """Wan 2.2's DupUp3D in ``x``'s dtype: repeat channels, read them as (channel, frame, row, column)."""
    frames, rows, columns, channels = x.shape
    spread = x.permute(3, 0, 1, 2).repeat_interleave(out_channels * time_factor * 4 // channels, dim=0)
    spread = spread.view(out_channels, time_factor, 2, 2, frames, rows, columns)[:, slice(*phases)]
    return spread.permute(4, 1, 5, 2, 6, 3, 0).reshape(-1, 2 * rows, 2 * columns, out_channels)


def plain_averaged(x, out_channels, time_factor):
    """Wan 2.2's AvgDown3D in fp64: blank frames first, then averages in the order (channel, frame, row, column)."""
    frames, rows, columns, channels = x.shape
    missing = -frames % time_factor
    padded = F.pad(x.double().permute(3, 0, 1, 2), (0, 0, 0, 0, missing, 0))
    parts = padded.reshape(channels, -1, time_factor, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 6, 1, 3, 5)
    return parts.reshape(out_channels, -1, *parts.shape[4:]).mean(dim=1).permute(1, 2, 3, 0)


def plain_taps(pixels, patch, values):
    """All neighbourhoods of ``pixels`` ``[T, H * p, W * p, C]``, one value after the other, in fp64; then zeros."""
    frames, rows, columns = pixels.shape[0], pixels.shape[1] // patch, pixels.shape[2] // patch
    padded = F.pad(2 * pixels.double() - 1, (0, 0, patch, patch, patch, patch))
    out = torch.zeros((frames, rows, columns, values), dtype=torch.float64, device=pixels.device)
    places = itertools.product(range(3 * patch), range(3 * patch), range(pixels.shape[3]))
    for k, (top, left, colour) in enumerate(places):
        out[..., k] = padded[:, top : top + rows * patch : patch, left : left + columns * patch : patch, colour]
    return out
