"""Core's nodes with one VAE and with another."""

import copy
import json
import logging

import torch
from comfy_api.latest import io

import nodes


class CompareNodes(io.ComfyNode):
    """Runs core's nodes that encode and need no model with two VAEs; tells how far their results are apart."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeCompareNodes",
            category="probe",
            is_output_node=True,
            inputs=[io.Vae.Input("vae"), io.Vae.Input("other"), io.String.Input("only", optional=True, default="")],
        )

    @classmethod
    def execute(cls, vae, other, only=""):
        found = {}
        for name, node in sorted(nodes.NODE_CLASS_MAPPINGS.items()):
            module = getattr(node, "RELATIVE_PYTHON_MODULE", "nodes") or "nodes"
            if module.startswith("custom_nodes") or getattr(node, "OUTPUT_NODE", False):
                continue
            if (only and name not in only.split(",")) or "Decode" in name:
                continue
            for frames in (5, 1):  # some take one picture alone
                if (inputs := cls.inputs(node, frames)) is None:
                    break
                try:
                    expected, calls = cls.run(node, inputs, vae)
                except Exception as error:  # noqa: BLE001 (not a node for this VAE)
                    logging.info("%s: %s", name, error)
                    continue
                if calls:
                    found[name] = [cls.distance(expected, cls.run(node, inputs, other)[0]), calls]
                    break
        return io.NodeOutput(ui={"found": [json.dumps(found)]})

    @staticmethod
    def inputs(node, frames):
        """Something for each input, or None if there is nothing for one of them, or no VAE among them."""
        generator = torch.Generator().manual_seed(3)
        described = node.INPUT_TYPES()
        required = described.get("required", {})
        given = {}
        for name, (kind, *options) in {**required, **described.get("optional", {})}.items():
            options = options[0] if options else {}
            if kind == "VAE":
                given[name] = None
            elif kind == "CONDITIONING":
                given[name] = [[torch.rand(1, 4, 8, generator=generator), {}]]
            elif kind == "IMAGE":
                given[name] = torch.rand(frames, 36, 50, 3, generator=generator)
            elif kind == "MASK":
                given[name] = torch.rand(frames, 36, 50, generator=generator).round()
            elif kind == "LATENT":
                given[name] = {"samples": torch.rand(1, 16, 2, 4, 6, generator=generator)}
            elif name in ("width", "height", "length"):
                given[name] = {"width": 48, "height": 32, "length": 5}[name]
            elif "default" in options:
                given[name] = options["default"]
            elif name in required:
                choices = kind if isinstance(kind, list) else options.get("options")
                if not choices:
                    return None
                given[name] = choices[0]
        return given if any(value is None for value in given.values()) else None

    @staticmethod
    def run(node, inputs, vae):
        """The node's results, and how often it encoded."""
        vae, calls = copy.copy(vae), []

        def counted(encode):
            def call(*args, **kwargs):
                calls.append(1)
                return encode(*args, **kwargs)

            return call

        vae.encode, vae.encode_tiled = counted(vae.encode), counted(vae.encode_tiled)
        given = {name: vae if value is None else copy.deepcopy(value) for name, value in inputs.items()}
        torch.manual_seed(0)
        call = node.execute if issubclass(node, io.ComfyNode) else getattr(node(), node.FUNCTION)
        result = call(**given)
        return getattr(result, "args", result), len(calls)

    @classmethod
    def distance(cls, one, other):
        """The largest difference of two results' tensors; infinite where shapes, dtypes or anything else differ."""
        if isinstance(one, torch.Tensor):
            if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
                return 1e9
            return (one.double() - other.double()).abs().max().item()
        if isinstance(one, dict):
            return 1e9 if one.keys() != other.keys() else cls.distance(list(one.values()), list(other.values()))
        if isinstance(one, (list, tuple)):
            if len(one) != len(other):
                return 1e9
            return max((cls.distance(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
        return 0.0 if one == other else 1e9
