"""Decodes by more ranks than there are GPUs: those in the middle have a neighbour on both sides.

Each rank is a process, and a GPU switches between its ranks every few milliseconds, so that this takes long but needs
few devices: three and four ranks one, eight as many as there are, of four at most. Halo rows, keys and values travel as
between devices of their own, through memory that others write to; gloo says when keys and values have come.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.oracle import FAMILIES, load, oracle_vae, random_latents
from tests.parallel import launch
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict, read_checkpoint
from wan_vae_parallel.parallel import peer_memory
from wan_vae_parallel.parallel.edges import ShardEdges
from wan_vae_parallel.parallel.plan import plan_shards
from wan_vae_parallel.runtime.local import LocalDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there"),
]
pytest.importorskip("triton", reason="there are no kernels without Triton")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with launch.Ranks(4, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


class HostSignals:
    """In place of torch's signals, which want devices of their own: each waits for the device and sends a byte."""

    def __init__(self):
        self._sent = []

    def put_signal(self, peer):
        torch.cuda.synchronize()
        byte = torch.zeros(1, dtype=torch.uint8)
        self._sent.append((byte, dist.isend(byte, dist.get_global_rank(launch.group(), peer), launch.group())))

    def wait_signal(self, peer):
        dist.recv(torch.zeros(1, dtype=torch.uint8), dist.get_global_rank(launch.group(), peer), launch.group())


def shared_mailbox(rank, world_size):
    """One whose boxes may lie on the same device as others'."""
    size = 4 * peer_memory._BOX_BYTES + peer_memory._SIGNAL_BYTES + 2 * (world_size - 1) * peer_memory._PAIR_BYTES
    own = torch.zeros(size, dtype=torch.uint8, device="cuda")
    return peer_memory.PeerMemory(launch.shared(own), rank, own, HostSignals())


@torch.inference_mode()
def decode_own(rank, world_size, weights, latents, chunk, devices):
    """This rank's part of the frames, and how many halo rows it sent; neighbours share a device, or have two."""
    device = torch.device("cuda", rank * devices // world_size)
    torch.cuda.set_device(device)
    checkpoint = read_checkpoint(weights)
    decoder = LocalDecoder(checkpoint.architecture, checkpoint.decoder, device=device, dtype=torch.bfloat16)
    plan = plan_shards(*latents.shape[-2:], world_size)
    latents = latents.transpose(-1, -2) if plan.transposed else latents
    edges = ShardEdges(plan, launch.group(), shared_mailbox(rank, world_size))
    own = latents[:, :, :, plan.bounds[rank] : plan.bounds[rank + 1]]
    frames = [part.cpu() for part in decoder.stream(own, chunk, edges, transposed=plan.transposed)]
    dist.barrier(launch.group())  # until here neighbours may write
    return torch.cat(frames, dim=1), edges.rows_sent


def check(ranks, folder, family, count, size, axis, chunk, devices, width=96):
    """So many ranks' frames of latents of a size are one device's, bit for bit, and each sends what it must."""
    oracle = oracle_vae(family, width=width)
    weights = folder / "vae.safetensors"
    save_file(dict(checkpoint_from_state_dict(oracle.state_dict(), source="diffusers").decoder), weights)
    latents = random_latents(family, frames=4, rows=size[0], columns=size[1])
    with load(oracle, devices="cuda:0", dtype="bfloat16", chunk=3) as vae:
        expected = vae.decode(latents)
    parts = ranks.run(decode_own, str(weights), latents, chunk, devices, members=count, timeout=150)
    frames = torch.cat([frames for frames, _ in parts], dim=axis)
    assert expected.std() > 0.05
    assert torch.equal(frames, expected), (count, (frames - expected).abs().max())
    sent = [rows for _, rows in parts]
    assert all(rows == 2 * sent[0] for rows in sent[1:-1])
    assert sent[0] == sent[-1] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_are_those_of_one_rank_bit_for_bit(ranks, tmp_path, family):
    check(ranks, tmp_path, family, 3, (13, 18), 3, 2, devices=1)
    check(ranks, tmp_path, family, 4, (18, 13), 2, 1, devices=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_where_attention_goes_twice_over_the_keys_are_those_of_one_rank(ranks, tmp_path, family):
    # 512 channels, more than one pass takes.
    check(ranks, tmp_path, family, 3, (13, 18), 3, 2, devices=1, width=128)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several CUDA devices")
def test_eight_ranks_frames_are_those_of_one_bit_for_bit(tmp_path):
    with launch.Ranks(8, tmp_path) as ranks:
        for family in FAMILIES:
            check(ranks, tmp_path, family, 8, (13, 18), 2, 2, devices=min(4, torch.cuda.device_count()))
