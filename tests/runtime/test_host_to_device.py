"""Pixels on their way to the device."""

from __future__ import annotations

import torch

from wan_vae_parallel.model.lines import Piece
from wan_vae_parallel.runtime.host_to_device import to_device


def test_what_has_come_stays_though_its_memory_on_the_host_is_used_again():
    ring = torch.zeros(2, 3, 4, 4, 3)

    def pieces():
        for number in range(5):
            ring[number % 2] = number
            # A whole place, and rows of one: of strides that are contiguous, and that are not.
            yield Piece(ring[number % 2], (0, 0, 0))
            yield Piece(ring[number % 2, :, 1:3], (0, 0, 0))
            yield Piece(None, (1,))

    arrived = list(to_device(pieces(), torch.device("cpu")))
    assert [piece.counts for piece in arrived[:3]] == [(0, 0, 0), (0, 0, 0), (1,)]
    for index, piece in enumerate(arrived):
        if index % 3 == 2:
            assert piece.frames is None
        else:
            assert piece.frames.is_contiguous()
            assert (piece.frames == index // 3).all()
