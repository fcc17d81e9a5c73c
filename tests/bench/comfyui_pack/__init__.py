"""Nodes for `tests/bench/comfyui.py`, and a clock around every node that the server executes.

The clock writes a line of JSON for each execution to ``executions.jsonl`` in the output folder: prompt, node, the
seconds of `time.perf_counter` at its start and its end, which on Linux is one clock for all processes, and the most
bytes that its tensors have taken on the first GPU meanwhile, in this process.
"""

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


def clocked(execute):
    """ComfyUI's ``execute`` of one node, timed from its call to its return, whatever comes of it."""
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    async def timed(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            return await execute(*args, **kwargs)
        finally:
            ended = time.perf_counter()
            line = {"prompt": given["prompt_id"], "node": given["current_item"], "started": started, "ended": ended}
            # Before the first use of the GPU there is none; asking would make this process a context.
            line["peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
            with open(os.path.join(folder_paths.get_output_directory(), "executions.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")

    return timed


class Discard(io.ComfyNode):
    """Ends a graph without a file: says an IMAGE's shape, mean and deviation, which it samples; takes a VAE too."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeDiscard",
            category="probe",
            is_output_node=True,
            inputs=[io.Image.Input("image", optional=True), io.Vae.Input("vae", optional=True)],
        )

    @classmethod
    def execute(cls, image=None, vae=None):  # noqa: ARG003 (the VAE is there to be loaded)
        if image is None:
            return io.NodeOutput()
        sample = image[::8, ::16, ::16].float()
        mean, deviation = float(sample.mean()), float(sample.std())
        return io.NodeOutput(ui={"shape": list(image.shape), "mean": [mean], "deviation": [deviation]})


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
        return [Discard, AskForRoom]


async def comfy_entrypoint():
    """ComfyUI's way in."""
    execution.execute = clocked(execution.execute)
    return BenchExtension()
