"""Nodes that only the tests use: they bring tensors in and out of a real server, exactly."""

from comfy_api.latest import ComfyExtension

from .calls import ChosenDevices, DecodeAsLaterCores, DecodeWithoutRoom, EncodeAsLaterCores, EncodePictures, EngineState
from .compare import CompareNodes
from .vaes import AlterVAE, SmallCoreVAE, WrapperVAE
from .values import AddWords, EmptyAudio, LatentList, LoadTensor, Nothing, SaveTensor, SaveVideo


class ProbeExtension(ComfyExtension):
    """Lists the nodes."""

    async def get_node_list(self):
        return [
            LoadTensor,
            SaveTensor,
            EngineState,
            AlterVAE,
            DecodeWithoutRoom,
            ChosenDevices,
            DecodeAsLaterCores,
            EncodeAsLaterCores,
            EncodePictures,
            SmallCoreVAE,
            WrapperVAE,
            AddWords,
            Nothing,
            LatentList,
            EmptyAudio,
            SaveVideo,
            CompareNodes,
        ]


async def comfy_entrypoint():
    """ComfyUI's way in."""
    return ProbeExtension()
