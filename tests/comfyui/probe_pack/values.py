"""Values of other nodes' kinds: tensors in and out, lists, words, sound, video."""

import json
import os
from io import BytesIO

import folder_paths
import torch
from comfy_api.latest import Types, io
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
    def fingerprint_inputs(cls, name):
        # Tests send other tensors by one name.
        return os.stat(os.path.join(folder_paths.get_input_directory(), name)).st_mtime_ns

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


class AddWords(io.ComfyNode):
    """Adds to a LATENT what JSON says; a list of numbers becomes a tensor."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeAddWords",
            category="probe",
            inputs=[io.Latent.Input("latent"), io.String.Input("words")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent, words):
        added = {key: torch.tensor(v) if isinstance(v, list) else v for key, v in json.loads(words).items()}
        if added.pop("as_video", False):
            return io.NodeOutput({"video": latent["samples"]})
        return io.NodeOutput({**latent, **added})


class Nothing(io.ComfyNode):
    """No image, as nodes give that have nothing to show."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="ProbeNothing", category="probe", inputs=[], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls):
        return io.NodeOutput(None)


class LatentList(io.ComfyNode):
    """Two LATENTs as a list."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeLatentList",
            category="probe",
            inputs=[io.Latent.Input("one"), io.Latent.Input("other")],
            outputs=[io.Latent.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, one, other):
        return io.NodeOutput([one, other])


class EmptyAudio(io.ComfyNode):
    """Sound of no samples."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeEmptyAudio",
            category="probe",
            inputs=[io.Int.Input("channels")],
            outputs=[io.Audio.Output()],
        )

    @classmethod
    def execute(cls, channels):
        return io.NodeOutput({"waveform": torch.zeros(1, channels, 0), "sample_rate": 44100})


class SaveVideo(io.ComfyNode):
    """Saves a VIDEO as other nodes do: under a name of any kind, and to a buffer."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeSaveVideo",
            category="probe",
            is_output_node=True,
            inputs=[io.Video.Input("video"), io.String.Input("name")],
        )

    @classmethod
    def execute(cls, video, name):
        folder = folder_paths.get_output_directory()
        for suffix in (".mp4", ".mov"):
            video.save_to(os.path.join(folder, f"{name}{suffix}"), metadata={"asked": "for"})
        buffer = BytesIO()
        video.save_to(buffer, format=Types.VideoContainer.MP4, metadata={"asked": "for"})
        with open(os.path.join(folder, f"buffer {name}.mp4"), "wb") as file:
            file.write(buffer.getvalue())
        return io.NodeOutput()
