"""Graphs whose one node `tests/bench/comfyui` times: a decode, an encode of a video, image-to-video's encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from tests.comfyui.server import node

CHECKPOINT = "wan21.safetensors"


@dataclass(frozen=True)
class Contender:
    """Whose VAE works: core's, or ours on ``devices`` devices."""

    devices: int = 0

    @property
    def name(self) -> str:
        return "ours" if self.devices else "core"

    def loader(self, *, cpu: bool, chunk: int) -> dict:
        if not self.devices:
            return node("VAELoader", vae_name=CHECKPOINT)
        names = ["cpu"] * self.devices if cpu else [f"cuda:{i}" for i in range(self.devices)]
        return node("WanVAEParallelLoader", vae_name=CHECKPOINT, devices=",".join(names), dtype="auto", chunk=chunk)


class Work(Protocol):
    """What the node ``work`` of a graph does. A graph's ``vae`` is a loader, and ``seen`` looks at what came out."""

    # The entry of the server's clock that counts: a node's, or one that a node of the pack makes.
    timed: str

    def graph(self, contender: Contender, folder: Path, size: str, frames: int, index: int) -> dict:
        """Nodes of the run ``index`` besides the loader; what they read from ``folder`` is there after this."""
        ...


@dataclass(frozen=True)
class Decode:
    """VAE Decode of latents that are other ones every time; of images ``batch`` are as many at once."""

    own_node: bool = False
    batch: int = 1
    timed = "work"

    def graph(self, contender: Contender, folder: Path, size: str, frames: int, index: int) -> dict:
        name = f"latent_{size}_{index}.safetensors"
        columns, rows = (int(side) // 8 for side in size.split("x"))
        shape = (self.batch, 16, (frames - 1) // 4 + 1, rows, columns)
        save_file({"tensor": torch.randn(shape, generator=torch.Generator().manual_seed(index))}, folder / name)
        wired = {"samples": ["latent", 0], "vae": ["vae", 0]}
        own = contender.devices and self.own_node
        return {
            "latent": node("ProbeLoadTensor", name=name),
            "work": node("WanVAEParallelDecode" if own else "VAEDecode", **wired),
            "seen": node("ProbeDiscard", image=["work", 0]),
        }


@dataclass(frozen=True)
class Encode:
    """VAE Encode of random pixels that are other ones every time."""

    own_node: bool = False
    timed = "work"

    def graph(self, contender: Contender, folder: Path, size: str, frames: int, index: int) -> dict:  # noqa: ARG002 (Work)
        width, height = map(int, size.split("x"))
        wired = {"pixels": ["pixels", 0], "vae": ["vae", 0]}
        own = contender.devices and self.own_node
        return {
            "pixels": node("ProbePixels", width=width, height=height, length=frames, seed=index),
            "work": node("WanVAEParallelEncode" if own else "VAEEncode", **wired),
            "seen": node("ProbeDiscard", latent=["work", 0]),
        }


@dataclass(frozen=True)
class ImageToVideo:
    """Core's WanImageToVideo of a picture that is another one every time; timed is the VAE's encode within it."""

    timed = "encode"

    def graph(self, contender: Contender, folder: Path, size: str, frames: int, index: int) -> dict:  # noqa: ARG002 (Work)
        width, height = map(int, size.split("x"))
        return {
            "pixels": node("ProbePixels", width=width, height=height, length=1, seed=index),
            "words": node("ProbeConditioning"),
            "clocked": node("ProbeClockEncode", vae=["vae", 0]),
            "work": node(
                "WanImageToVideo",
                positive=["words", 0],
                negative=["words", 0],
                vae=["clocked", 0],
                start_image=["pixels", 0],
                width=width,
                height=height,
                length=frames,
                batch_size=1,
            ),
            "seen": node("ProbeDiscard", conditioning=["work", 0]),
        }
