"""VAEs as other packs and newer models make them, or change them."""

import copy

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_management as model_management
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io
from safetensors.torch import load_file


class FastNorm(torch.nn.Module):
    """As packs with kernels of their own put it in the place of core's norms: other names, same values."""

    def __init__(self, norm):
        super().__init__()
        self.scaled_weight = torch.nn.Parameter(norm.gamma.detach() * norm.scale)

    def forward(self, x):
        return torch.nn.functional.normalize(x, dim=1) * self.scaled_weight


class Holder(torch.nn.Module):
    """Calls the module that it holds, as packs do that time or offload it."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, *args, **kwargs):
        return self.held(*args, **kwargs)


class AlterVAE(io.ComfyNode):
    """Does to a copy of a VAE what other packs do."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeAlterVAE",
            category="probe",
            inputs=[io.Vae.Input("vae"), io.String.Input("how")],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae, how):
        altered = copy.deepcopy(vae)
        engine = getattr(vae, "_engine", None)
        assert getattr(altered, "_engine", None) is engine
        model = altered.first_stage_model
        if how == "compile parts":
            model.encoder, model.decoder = torch.compile(model.encoder), torch.compile(model.decoder)
        elif how == "compile layers":
            model.decoder.middle[0] = torch.compile(model.decoder.middle[0])
        elif how == "compile all":
            altered.first_stage_model = torch.compile(model)
        elif how == "hold":
            model.decoder.middle[1] = Holder(Holder(model.decoder.middle[1]))
            model.decoder = Holder(model.decoder)
        elif how == "patch objects":
            cls.patch_norms(altered)
            altered.patcher.patch_model(altered.patcher.load_device)
        elif how == "patch objects later":
            cls.patch_norms(altered)
        elif how == "replace norms":
            model.decoder.head[0] = FastNorm(model.decoder.head[0])
        elif how == "normalise weights":
            torch.nn.utils.parametrizations.weight_norm(model.decoder.conv1)
        elif how in ("lora", "lora of the encoder"):
            part = "decoder" if how == "lora" else "encoder"
            shape = getattr(model, part).conv1.weight.shape
            diff = torch.randn(shape, generator=torch.Generator().manual_seed(9)) / shape[1:].numel() ** 0.5
            altered.patcher = altered.patcher.clone()
            assert altered.patcher.add_patches({f"{part}.conv1.weight": ("diff", (diff,))}, 0.5)
        elif how == "bf16":
            model.to(torch.bfloat16)
        elif how == "circular":
            for module in model.modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                    module.padding_mode = "circular"
        elif how == "tile asymmetrically":
            for module in model.modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                    module._conv_forward = module._conv_forward  # in its own attributes, whatever it does
        elif how == "select gpu:1":
            altered = cls.select(altered, torch.device("cuda", 1))
        elif how == "put on cuda:1":
            altered.device = torch.device("cuda", 1)
        elif how == "put on the cpu":
            altered.device, altered._select_base_device = torch.device("cpu"), torch.device("cuda", 0)
        else:
            assert how == "copy", how
        if engine is not None:
            engine.release()  # as /free does: the weights are read once more
        return io.NodeOutput(altered)

    @staticmethod
    def select(vae, device):
        """What core's SelectVAEDevice makes of it on a machine with that device."""
        from comfy_extras.nodes_multigpu import SelectVAEDeviceNode

        was = model_management.resolve_gpu_device_option
        model_management.resolve_gpu_device_option = lambda _: device
        try:
            return SelectVAEDeviceNode.execute(vae, f"gpu:{device.index}").result[0]
        finally:
            model_management.resolve_gpu_device_option = was

    @staticmethod
    def patch_norms(vae):
        vae.patcher = vae.patcher.clone()
        blocks = vae.first_stage_model.decoder.middle
        for index in (0, 2):
            norm = FastNorm(blocks[index].residual[0])
            vae.patcher.add_object_patch(f"decoder.middle.{index}.residual.0", norm)


class SmallCoreVAE(io.ComfyNode):
    """Core's own VAE of a Wan 2.2 file of any width: core knows the published ones alone."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeSmallCoreVAE",
            category="probe",
            inputs=[io.String.Input("vae_name")],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae_name):
        weights = load_file(folder_paths.get_full_path_or_raise("vae", vae_name))
        widths = {
            "dim": weights["encoder.conv1.weight"].shape[0],
            "dec_dim": weights["decoder.head.0.gamma"].shape[0],
        }
        was = comfy.ldm.wan.vae2_2.WanVAE
        comfy.ldm.wan.vae2_2.WanVAE = lambda **options: was(**{**options, **widths})
        try:
            return io.NodeOutput(comfy.sd.VAE(sd=weights))
        finally:
            comfy.ldm.wan.vae2_2.WanVAE = was


class WanVideoVAE(torch.nn.Module):
    """What WanVideoWrapper's loader returns, as far as its nodes look at it: the model, and latents' statistics."""

    def __init__(self, weights):
        super().__init__()
        self.model = comfy.ldm.wan.vae.WanVAE(
            dim=weights["decoder.head.0.gamma"].shape[0], z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
            attn_scales=[], temperal_downsample=[False, True, True], dropout=0.0,
        )  # fmt: skip
        self.model.load_state_dict(weights)
        statistics = comfy.latent_formats.Wan21()
        self.mean, self.std = statistics.latents_mean.flatten(), statistics.latents_std.flatten()
        self.dtype, self.upsampling_factor = torch.float32, 8


class TAEHV(torch.nn.Module):
    """The wrapper's network for previews."""


class WrapperVAE(io.ComfyNode):
    """A VAE as WanVideoWrapper's loader makes it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeWrapperVAE",
            category="probe",
            inputs=[io.String.Input("vae_name")],
            outputs=[io.Custom("WANVAE").Output()],
        )

    @classmethod
    def execute(cls, vae_name):
        if vae_name == "taew2_1":
            return io.NodeOutput(TAEHV())
        return io.NodeOutput(WanVideoVAE(load_file(folder_paths.get_full_path_or_raise("vae", vae_name))))
