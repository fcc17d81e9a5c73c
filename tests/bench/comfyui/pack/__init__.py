"""Nodes for `tests/bench/comfyui`, and a clock around every node that the server executes.

The clock writes a line of JSON for each execution to ``executions.jsonl`` in the output folder: prompt, node, the
seconds of `time.perf_counter` at its start and its end, which on Linux is one clock for all processes, and the most
bytes that its tensors have taken on the first GPU meanwhile, in this process. A VAE that went through
`ProbeClockEncode` writes such a line for each encode, too.
"""

import contextlib
import functools
import inspect
import json
import os
import time

import comfy.model_management as model_management
import comfy.model_patcher
import comfy.ops
import execution
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from comfy_execution.utils import get_executing_context


@contextlib.contextmanager
def clock(prompt, name):
    """Writes how long what is within it took, whatever comes of it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        yield
    finally:
        ended = time.perf_counter()
        line = {"prompt": prompt, "node": name, "started": started, "ended": ended}
        # Before the first use of the GPU there is none; asking would make this process a context.
        line["peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        with open(os.path.join(folder_paths.get_output_directory(), "executions.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


def clocked(execute):
    """ComfyUI's ``execute`` of one node, timed from its call to its return."""
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    async def timed(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        with clock(given["prompt_id"], given["current_item"]):
            return await execute(*args, **kwargs)

    return timed


class ClockEncode(io.ComfyNode):
    """Passes a VAE on whose ``encode`` is timed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeClockEncode",
            category="probe",
            inputs=[io.Vae.Input("vae")],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae):
        if "encode" not in vars(vae):  # in ComfyUI's cache the VAE stays the same one
            encode = vae.encode

            @functools.wraps(encode)
            def timed(*args, **kwargs):
                with clock(get_executing_context().prompt_id, "encode"):
                    return encode(*args, **kwargs)

            vae.encode = timed
        return io.NodeOutput(vae)


class Pixels(io.ComfyNode):
    """Random pixels by their seed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbePixels",
            category="probe",
            inputs=[io.Int.Input(name, max=1 << 30) for name in ("width", "height", "length", "seed")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, width, height, length, seed):
        return io.NodeOutput(torch.rand(length, height, width, 3, generator=torch.Generator().manual_seed(seed)))


class Conditioning(io.ComfyNode):
    """The conditioning of no words."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="ProbeConditioning", category="probe", outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls):
        return io.NodeOutput([[torch.zeros(1, 1, 8), {}]])


class Discard(io.ComfyNode):
    """Ends a graph without a file: says shape, mean and deviation of what it is given, which it samples."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeDiscard",
            category="probe",
            is_output_node=True,
            inputs=[
                io.Image.Input("image", optional=True),
                io.Latent.Input("latent", optional=True),
                io.Conditioning.Input("conditioning", optional=True),
                io.Vae.Input("vae", optional=True),
            ],
        )

    @classmethod
    def execute(cls, image=None, latent=None, conditioning=None, vae=None):  # noqa: ARG003 (the VAE is to be loaded)
        if image is not None:
            result, sample = image, image[::8, ::16, ::16]
        elif latent is not None:
            result = sample = latent["samples"]
        elif conditioning is not None:
            result = sample = conditioning[0][1]["concat_latent_image"]
        else:
            return io.NodeOutput()
        mean, deviation = float(sample.float().mean()), float(sample.float().std())
        return io.NodeOutput(ui={"shape": list(result.shape), "mean": [mean], "deviation": [deviation]})


class AskForRoom(io.ComfyNode):
    """Loads a model that needs all of the device's memory, as sampling a large one would; its weights are small."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeAskForRoom",
            category="probe",
            is_output_node=True,
            not_idempotent=True,
            # The VAE keeps its place in ComfyUI's cache by being part of the prompt.
            inputs=[io.Vae.Input("vae"), io.Int.Input("call")],
        )

    @classmethod
    def execute(cls, vae, call):  # noqa: ARG003 (call makes prompts differ)
        device = model_management.get_torch_device()
        total = model_management.get_total_memory(device)
        if device.type == "cpu":
            model_management.free_memory(1e30, device)  # there, loading a model frees nothing
            return io.NodeOutput()
        model_management.load_models_gpu([large_model(device)], memory_required=total)
        return io.NodeOutput()


@functools.cache
def large_model(device):
    """The stand-in; it stays loaded, as a graph's own would. Core's dynamic class wants a model's real memory."""
    model = torch.nn.Sequential(comfy.ops.manual_cast.Linear(4096, 4096, dtype=torch.bfloat16))
    return comfy.model_patcher.ModelPatcher(
        model, load_device=device, offload_device=model_management.unet_offload_device()
    )


class BenchExtension(ComfyExtension):
    """Lists the nodes."""

    async def get_node_list(self):
        return [AskForRoom, ClockEncode, Conditioning, Discard, Pixels]


async def comfy_entrypoint():
    """ComfyUI's way in."""
    execution.execute = clocked(execution.execute)
    return BenchExtension()
