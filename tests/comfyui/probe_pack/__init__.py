"""Nodes that only the tests use: they bring tensors in and out of a real server, exactly."""

import os

import folder_paths
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file, save_file


class LoadTensor(io.ComfyNode):
    """Reads a tensor from the input folder as LATENT and as IMAGE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeLoadTensor",
            category="probe",
            inputs=[io.String.Input("name")],
            outputs=[io.Latent.Output(), io.Image.Output()],
        )

    @classmethod
    def execute(cls, name):
        tensor = load_file(os.path.join(folder_paths.get_input_directory(), name))["tensor"]
        return io.NodeOutput({"samples": tensor}, tensor)


class SaveTensor(io.ComfyNode):
    """Writes an IMAGE or the samples of a LATENT to the output folder."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeSaveTensor",
            category="probe",
            is_output_node=True,
            inputs=[
                io.String.Input("name"),
                io.Image.Input("image", optional=True),
                io.Latent.Input("latent", optional=True),
            ],
        )

    @classmethod
    def execute(cls, name, image=None, latent=None):
        tensor = image if latent is None else latent["samples"]
        save_file({"tensor": tensor.contiguous()}, os.path.join(folder_paths.get_output_directory(), name))
        return io.NodeOutput()


class EngineState(io.ComfyNode):
    """Tells whether a parallel VAE's engine holds memory."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeEngineState",
            category="probe",
            is_output_node=True,
            not_idempotent=True,
            inputs=[io.Vae.Input("vae"), io.Int.Input("call")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # runs every time

    @classmethod
    def execute(cls, vae, call):  # noqa: ARG003 (only there to make prompts differ)
        return io.NodeOutput(ui={"loaded": [vae._engine.loaded]})


class ProbeExtension(ComfyExtension):
    """Lists the nodes."""

    async def get_node_list(self):
        return [LoadTensor, SaveTensor, EngineState]


async def comfy_entrypoint():
    """ComfyUI's way in."""
    return ProbeExtension()
