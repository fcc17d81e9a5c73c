"""Calls of a parallel VAE that no core makes today, and what is within it and around it."""

import copy
import sys

import comfy.model_management as model_management
import torch
from comfy_api.latest import io


def of_the_pack(name):
    """A module of the pack, which ComfyUI names by its path."""
    return next(module for key, module in sys.modules.items() if key.endswith("wan-vae-parallel." + name))


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


class DecodeWithoutRoom(io.ComfyNode):
    """Decodes where the host has no memory left; tells the error."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeDecodeWithoutRoom",
            category="probe",
            is_output_node=True,
            inputs=[io.Latent.Input("samples"), io.Vae.Input("vae")],
        )

    @classmethod
    def execute(cls, samples, vae):
        memory = of_the_pack("wan_vae_parallel.memory")
        was, memory.free_memory = memory.free_memory, lambda _: 1000
        try:
            vae.decode(samples["samples"])
        except MemoryError as error:
            return io.NodeOutput(ui={"error": [str(error)]})
        finally:
            memory.free_memory = was
        raise AssertionError("it had room")


class ChosenDevices(io.ComfyNode):
    """Tells which devices the nodes take on a machine with two GPUs."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeChosenDevices",
            category="probe",
            is_output_node=True,
            inputs=[io.String.Input("devices"), io.String.Input("put_on")],
        )

    @classmethod
    def execute(cls, devices, put_on):
        choices, parsing = of_the_pack("nodes.choices"), of_the_pack("wan_vae_parallel.devices")
        there = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)]
        was = choices.available_devices, parsing.available_devices, parsing._why_alone, model_management.vae_device
        name_of = torch.cuda.get_device_name
        choices.available_devices = parsing.available_devices = lambda: there
        parsing._why_alone = lambda _: ""
        model_management.vae_device = lambda: there[1]
        torch.cuda.get_device_name = lambda device: f"GPU {device.index}"
        try:
            chosen = choices.choose_devices(devices, torch.device(put_on) if put_on else None)
            listed = [f"{device} {name}" for device, name in choices.listed_devices().items()]
        finally:
            choices.available_devices, parsing.available_devices, parsing._why_alone, model_management.vae_device = was
            torch.cuda.get_device_name = name_of
        return io.NodeOutput(ui={"devices": [str(device) for device in chosen], "listed": listed})


class DecodeAsLaterCores(io.ComfyNode):
    """Decodes with arguments that no core has yet."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeDecodeAsLaterCores",
            category="probe",
            inputs=[io.Latent.Input("samples"), io.Vae.Input("vae")],
            outputs=[io.Image.Output(), io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, vae):
        whole = vae.decode(samples["samples"], vae_options={"unheard": 1}, unheard=True)
        tiled = vae.decode_tiled(samples["samples"], 64, tile_y=64, unheard=True)
        return io.NodeOutput(whole.flatten(0, 1), tiled.flatten(0, 1))


class EncodeAsLaterCores(io.ComfyNode):
    """Encodes with arguments that no core has yet."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeEncodeAsLaterCores",
            category="probe",
            inputs=[io.Image.Input("pixels"), io.Vae.Input("vae")],
            outputs=[io.Latent.Output(), io.Latent.Output(), io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels, vae):
        whole = vae.encode(pixels, vae_options={"unheard": 1}, unheard=True)
        tiled = vae.encode_tiled(pixels, 64, tile_y=64, unheard=True)
        pictures = vae.encode(pixels, not_video=True)
        return io.NodeOutput({"samples": whole}, {"samples": tiled}, {"samples": pictures})


class EncodePictures(io.ComfyNode):
    """Encodes each picture by itself, as core does where a VAE says that it is for no videos."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeEncodePictures",
            category="probe",
            inputs=[io.Image.Input("pixels"), io.Vae.Input("vae")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels, vae):
        vae = copy.copy(vae)
        vae.not_video = True
        return io.NodeOutput({"samples": vae.encode(pixels)})
