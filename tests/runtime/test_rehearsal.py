"""Kernels that are compiled ahead of a decode: those that it asks for, and nothing is computed or sent for them."""

from __future__ import annotations

import pytest
import torch

from tests.parallel import launch
from wan_vae_parallel.files.checkpoint import read_checkpoint
from wan_vae_parallel.parallel.plan import plan_shards
from wan_vae_parallel.runtime.shard import ShardDecoder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with launch.Ranks(3, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def _rehearse_and_decode(rank, world_size, path, shape, chunk):
    """What is asked to be compiled, before and in a decode; and halo rows that a rehearsal alone has sent."""
    checkpoint = read_checkpoint(path)
    decoder = ShardDecoder(checkpoint.architecture, checkpoint.decoder, torch.device("cpu"), torch.float32)
    plan = plan_shards(*shape[-2:], world_size)
    asked = []

    def compile(key, run):
        asked.append(key)
        if len(asked) == 1:
            run()  # in which neighbours that are not at it, too, would wait for each other

    decoder._local._compile = compile
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if rank == 1:
        decoder.rehearse(plan, launch.group(), latents.shape, chunk)
        ahead = list(asked)
    else:
        ahead = None
        asked.append(None)
    for _ in decoder.steps(decoder.own_rows(latents, plan, rank), plan, launch.group(), chunk):
        pass
    return ahead, asked[1:]


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (4, 7)])
@pytest.mark.parametrize("chunk", [2, 9])
def test_a_rehearsal_compiles_what_the_decode_asks_for_and_needs_no_other_rank(ranks, path, rows, columns, chunk):
    _, (ahead, asked), _ = ranks.run(_rehearse_and_decode, str(path), (1, 16, 6, rows, columns), chunk, members=3)
    assert ahead == asked
    assert len(asked) == 1
