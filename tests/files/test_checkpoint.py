"""What is read as a Wan VAE, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save, save_file

from tests.oracle import FAMILIES, oracle_vae, original_state_dict
from wan_vae_parallel import Architecture, CheckpointError
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict, read_checkpoint


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(family):
    return oracle_vae(family)


@pytest.fixture(scope="module")
def original(oracle):
    return original_state_dict(oracle)


@pytest.fixture(scope="module")
def plain():
    """One valid checkpoint, for what does not depend on the family."""
    return original_state_dict(oracle_vae("wan2.1"))


def read(tensors):
    return checkpoint_from_state_dict(tensors, source="vae.safetensors")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.", "vae."])
def test_both_layouts_become_the_original_keys(family, oracle, original, layout, prefix):
    tensors = original if layout == "original" else oracle.state_dict()
    checkpoint = read({prefix + key: tensor for key, tensor in tensors.items()})
    assert checkpoint.layout == layout
    assert checkpoint.architecture == dataclasses.replace(Architecture.published(family, width=8), encoder_width=8)
    # Every tensor under its key, the encoder's aside and as they came.
    decoder = {key for key in original if key.startswith(("decoder.", "conv2."))}
    assert set(checkpoint.decoder) == decoder
    assert set(checkpoint.encoder) == set(original) - decoder
    for key, tensor in (checkpoint.decoder | checkpoint.encoder).items():
        assert torch.equal(tensor, original[key]), key
    assert checkpoint.parameters == sum(original[key].numel() for key in decoder)


def test_a_decoder_alone_is_enough(original):
    checkpoint = read({key: tensor for key, tensor in original.items() if key.startswith(("decoder.", "conv2."))})
    assert checkpoint.encoder == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_files_of_any_float_dtype(plain, tmp_path, dtype):
    path = tmp_path / "vae.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in plain.items()}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.dtype == dtype
    assert checkpoint.source == "vae.safetensors"
    assert torch.equal(checkpoint.decoder["conv2.weight"], plain["conv2.weight"].to(dtype))


@pytest.mark.parametrize("width", [24, 32])  # pruned relatives of the published 96
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_widths(family, width):
    architecture = read(oracle_vae(family, width=width).state_dict()).architecture
    encoder_width = 8 if family == "wan2.2" else width  # the oracle's stays narrow
    assert architecture == dataclasses.replace(Architecture.published(family, width=width), encoder_width=encoder_width)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_latent_channels_and_colours(family):
    architecture = read(oracle_vae(family, z_dim=5, colours=4).state_dict()).architecture
    assert architecture == Architecture(family=family, z_dim=5, width=8, output_channels=4, encoder_width=8)


def test_a_diffusers_folder(oracle, family, tmp_path):
    oracle.save_pretrained(tmp_path / "vae")
    checkpoint = read_checkpoint(str(tmp_path / "vae"))
    assert checkpoint.layout == "diffusers"
    assert checkpoint.architecture.family == family


def test_a_folder_without_weights_is_named_with_the_file_that_it_lacks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"without diffusion_pytorch_model\.safetensors; name the safetensors"):
        read_checkpoint(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors does not exist; name a Wan VAE's"):
        read_checkpoint(tmp_path / "nowhere.safetensors")


class _Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def _pickled(bomb, path, protocol):
    path.write_bytes(pickle.dumps({"decoder.conv1.weight": bomb}, protocol=protocol))


def _torch_saved(bomb, path, protocol):
    torch.save({"decoder.conv1.weight": bomb}, path, _use_new_zipfile_serialization=protocol > 2)


@pytest.mark.parametrize("write", [_pickled, _torch_saved])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["vae.pt", "vae.pth", "vae.CKPT", "vae.bin", "vae.pkl", "vae.safetensors", "vae"])
def test_pickles_are_refused_by_name_and_by_content_and_never_opened(tmp_path, write, protocol, name):
    trace, path = tmp_path / "unpickled", tmp_path / name
    write(_Bomb(trace), path, protocol)
    with pytest.raises(CheckpointError, match=r"is a pickle, .* take the same VAE as \.safetensors"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_pickles_without_a_magic_number_are_not_opened_either(tmp_path, protocol):
    trace, path = tmp_path / "unpickled", tmp_path / "vae.safetensors"
    _pickled(_Bomb(trace), path, protocol)
    with pytest.raises(CheckpointError, match="is a pickle, which can run any code"):
        read_checkpoint(path)
    assert not trace.exists()


def test_the_bomb_would_have_gone_off(tmp_path):
    # That the tests above can fail.
    _pickled(_Bomb(tmp_path / "unpickled"), tmp_path / "vae.pkl", 4)
    pickle.loads((tmp_path / "vae.pkl").read_bytes())
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".sft", ""])
def test_a_safetensors_file_is_one_by_any_name(plain, tmp_path, suffix):
    save_file(plain, tmp_path / f"vae{suffix}")
    assert read_checkpoint(tmp_path / f"vae{suffix}").architecture.family == "wan2.1"


def _with_header(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def _described(*, dtype="F32", shape=(2, 2), offsets=(0, 16)) -> bytes:
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    return json.dumps({"decoder.conv1.weight": entry}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",  # nothing was downloaded
        b"\x10",  # not even a header's length
        _with_header(b"{garbage", bytes(16)),  # no JSON
        _with_header(b"[1, 2]", bytes(16)),  # JSON, but no table
        _with_header(b"\xff\xfe\xfd\xfc", bytes(16)),  # no text
        _with_header(_described(), bytes(16), length=2**40),  # a header of a terabyte: nothing may be allocated for it
        _with_header(_described(), bytes(16), length=2**63),
        _with_header(_described(), bytes(16), length=10_000),  # a header longer than the file
        _with_header(_described(offsets=(0, 64)), bytes(16)),  # offsets beyond the end
        _with_header(_described(offsets=(8, 24)), bytes(24)),  # a gap
        _with_header(_described(offsets=(16, 0)), bytes(16)),  # backwards
        _with_header(_described(offsets=(-16, 0)), bytes(16)),  # before the beginning
        _with_header(_described(shape=(2, 3)), bytes(16)),  # a shape of more bytes than the offsets span
        _with_header(_described(shape=(2**40, 2**40)), bytes(16)),  # and of more than can be counted
        _with_header(_described(shape=(-2, -2)), bytes(16)),  # negative sizes
        _with_header(_described(dtype="F33"), bytes(16)),  # no such dtype
        _with_header(_described(), bytes(16) + b"more"),  # bytes that no tensor owns
    ],
)
def test_damaged_files_are_refused_with_the_advice_to_fetch_them_again(tmp_path, content):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"vae\.safetensors can't be read, as it is damaged .*: fetch it again \("
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_truncated_files_are_refused(plain, tmp_path, kept):
    path, content = tmp_path / "vae.safetensors", save(plain)
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match="not downloaded in full: fetch it again"):
        read_checkpoint(path)


# Lengths whose bytes read like a zip's or a pickle's first two. Wan 2.1's header is about 20,000 bytes long.
@pytest.mark.parametrize("length", [0x4B50, 0x0280 + 0x10000, 0x0480 + 0x10000])
def test_a_header_may_be_of_any_length(plain, tmp_path, length):
    content = save({key: tensor for key, tensor in plain.items() if key.startswith(("decoder.", "conv2."))})
    (was,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + was].rstrip()
    assert len(header) <= length
    path = tmp_path / "vae.safetensors"
    # The format lets writers pad the header with spaces.
    path.write_bytes(_with_header(header.ljust(length), content[8 + was :]))
    assert read_checkpoint(path).architecture.family == "wan2.1"


def test_another_models_file_is_told_from_a_wan_vae_by_its_first_keys():
    tensors = {f"transformer.blocks.{i}.weight": torch.zeros(1) for i in range(8)}
    with pytest.raises(CheckpointError) as error:
        read(tensors)
    text = str(error.value)
    assert text.startswith("vae.safetensors is not a Wan VAE: it has neither decoder.conv1.weight nor decoder.conv_in")
    assert "transformer.blocks.0.weight" in text
    assert "transformer.blocks.4.weight and 3 more" in text
    assert "transformer.blocks.5" not in text
    assert text.endswith("take the VAE that came with the Wan model")


def test_an_empty_file_is_not_a_wan_vae():
    with pytest.raises(CheckpointError, match="no tensors at all"):
        read({})


@pytest.mark.parametrize(
    "tensors",
    [
        {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3), "decoder.norm_out.weight": torch.zeros(8)},  # Flux's
        {
            "decoder.conv_in.weight": torch.zeros(8, 4, 3, 3),
            "decoder.conv_norm_out.weight": torch.zeros(8),
        },  # diffusers
        {"vae.decoder.conv_in.weight": torch.zeros(8, 4, 3, 3), "vae.decoder.norm_out.gamma": torch.zeros(8)},
        {"first_stage_model.decoder.conv_in.weight": torch.zeros(8, 4, 3, 3), "cond_stage_model.x": torch.zeros(8)},
    ],
)
def test_an_image_vae_is_called_one(tensors):
    with pytest.raises(CheckpointError) as error:
        read(tensors)
    text = str(error.value)
    assert "decoder.conv_in.weight has four axes (8, 4, 3, 3), where a video VAE's has five" in text
    assert "so it is an image VAE" in text
    assert "neither" not in text
    assert text.endswith("take the VAE that came with the Wan model")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3, 3)},
            "but lacks decoder.norm_out.gamma, so it is incomplete",
        ),
        ({"decoder.conv_in.weight": torch.zeros(8)}, "decoder.conv_in.weight has 1 axes (8,), where five belong"),
        ({"decoder.conv_in.conv.weight": torch.zeros(8, 4, 3, 3, 3)}, "weight: the VAE of another video model"),
        ({"blocks.0.self_attn.q.weight": torch.zeros(8, 8)}, "q.weight: a diffusion model, not its VAE"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(8, 8)}, "lora_A.weight: a LoRA"),
        ({"decoder.1.weight": torch.zeros(8, 16, 3, 3)}, "decoder.1.weight: a small VAE for previews"),
        (
            {"net.decoder.conv1.weight": torch.zeros(8, 4, 3, 3, 3)},
            "it lacks decoder.head.0.gamma",
        ),
    ],
)
def test_what_is_known_of_another_file_is_said(tensors, words):
    with pytest.raises(CheckpointError) as error:
        read(tensors)
    assert words in str(error.value)


def test_a_wan_vae_with_a_convolution_of_four_axes_is_refused(plain):
    with pytest.raises(CheckpointError, match=r"is not a Wan VAE: its convolutions see different numbers"):
        read({**plain, "decoder.conv1.weight": torch.zeros(8, 4, 3, 3)})


WRAPPED = {
    "the decoder compiled": lambda key: key.replace("decoder.", "decoder._orig_mod."),
    "all compiled": lambda key: "_orig_mod." + key,
    "a layer compiled": lambda key: key.replace("middle.0.", "middle.0._orig_mod.").replace(
        "resnets.0.", "resnets.0._orig_mod."
    ),
    "trained on several GPUs and compiled": lambda key: "module._orig_mod." + key,
    "within a prefix": lambda key: "vae." + key.replace("decoder.", "decoder._orig_mod."),
    "sharded": lambda key: "_fsdp_wrapped_module." + key.replace("conv1.", "conv1._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_read_through_wrappers(plain, original, wrap):
    for tensors in (plain, original):
        wrapped = {wrap(key): tensor for key, tensor in tensors.items()}
        assert wrapped.keys() != tensors.keys()
        checkpoint, expected = read(wrapped), read(tensors)
        assert checkpoint.architecture == expected.architecture
        assert checkpoint.decoder.keys() == expected.decoder.keys()
        assert all(torch.equal(tensor, expected.decoder[key]) for key, tensor in checkpoint.decoder.items())


def test_one_tensor_with_and_without_its_wrapper_is_refused(plain):
    with pytest.raises(CheckpointError, match=r"both (\S+) and _orig_mod\.\1, which are the same tensor"):
        read({**plain, **{f"_orig_mod.{key}": tensor for key, tensor in plain.items()}})


def test_weights_that_were_moved_away_are_refused(plain):
    away = {key: tensor.to("meta") if "head" in key or "conv_out" in key else tensor for key, tensor in plain.items()}
    with pytest.raises(CheckpointError, match=r"weights without values \(on the meta device\): decoder\."):
        read(away)


def test_missing_keys_are_named_five_and_the_rest_counted(original):
    missing = [key for key in original if "middle.2" in key and key.startswith("decoder.")]
    assert len(missing) == 6
    with pytest.raises(CheckpointError) as error:
        read({key: tensor for key, tensor in original.items() if key not in missing})
    text = str(error.value)
    assert sum(key in text for key in missing) == 5
    assert "lacks decoder.middle.2" in text
    assert "and 1 more; take the VAE as it was published" in text


def test_unexpected_keys_are_named_five_and_the_rest_counted(original, family):
    surplus = {f"decoder.surplus.{i}": torch.zeros(1) for i in range(7)}
    with pytest.raises(CheckpointError) as error:
        read({**original, **surplus})
    named = ", ".join(list(surplus)[:5])
    name = family.replace("wan", "Wan ")
    assert f"read as a {name} VAE of width 8, has unexpected {named} and 2 more; take the VAE" in str(error.value)


def test_misshapen_tensors_are_named_with_both_shapes(original):
    wrong = {key: tensor[:-1] for key, tensor in original.items() if key.startswith("decoder.middle.1")}
    assert len(wrong) == 5
    with pytest.raises(CheckpointError) as error:
        read({**original, **wrong})
    text = str(error.value)
    assert "has misshapen decoder.middle.1.norm.gamma (31, 1, 1) instead of (32, 1, 1)" in text
    assert all(key in text for key in wrong)


def test_all_kinds_of_problems_are_told_at_once(plain):
    tensors = {**plain, "decoder.surplus": torch.zeros(1), "decoder.conv1.bias": torch.zeros(3)}
    del tensors["conv2.bias"]
    with pytest.raises(CheckpointError, match=r"lacks conv2\.bias; has unexpected .*surplus; has misshapen .*conv1"):
        read(tensors)


def test_diffusers_keys_that_nobody_knows_are_named_as_they_came(oracle):
    with pytest.raises(CheckpointError, match=r"has unexpected decoder\.up_blocks\.0\.surplus\.weight"):
        read({**oracle.state_dict(), "decoder.up_blocks.0.surplus.weight": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32], ids=str)
def test_whole_numbers_are_refused(plain, tmp_path, dtype):
    # Their scales lie elsewhere: cast alone, they would decode to noise.
    path = tmp_path / "vae.safetensors"
    save_file({key: tensor.to(dtype) if tensor.dim() == 5 else tensor for key, tensor in plain.items()}, path)
    with pytest.raises(
        CheckpointError, match=rf"no fp32, bf16, fp16 or fp8: .*{dtype}.* and \d+ more; take the VAE in"
    ):
        read_checkpoint(path)


def test_a_head_that_makes_no_whole_patches_is_refused():
    tensors = original_state_dict(oracle_vae("wan2.2"))
    tensors["decoder.head.2.weight"] = tensors["decoder.head.2.weight"][:11]
    with pytest.raises(CheckpointError, match=r"makes 11 channels; a Wan 2\.2 VAE's are a multiple of 4"):
        read(tensors)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        # two names of one layer: which one is meant?
        ("conv2.weight", "which are the same layer"),
        # a block that there is not, whose number would run into the next stage
        ("decoder.up_blocks.0.resnets.4.conv1.weight", "unexpected decoder.up_blocks.0.resnets.4"),
        ("encoder.bogus", "unexpected encoder.bogus"),
        ("quant_conv.scale", "unexpected conv1.scale"),
    ],
)
def test_no_key_is_dropped_or_overwrites_another(extra, words):
    tensors = oracle_vae("wan2.1").state_dict()
    like = tensors.get("post_quant_conv.weight") if extra == "conv2.weight" else torch.zeros(3)
    with pytest.raises(CheckpointError, match=words):
        read({**tensors, extra: like})


def test_an_encoder_comes_whole_or_not_at_all(plain):
    some = {key: tensor for key, tensor in plain.items() if not key.startswith("encoder.middle.")}
    with pytest.raises(CheckpointError, match=r"lacks encoder\.middle\.0.* and \d+ more"):
        read(some)
    with pytest.raises(CheckpointError, match=r"misshapen encoder\.conv1\.bias"):
        read({**plain, "encoder.conv1.bias": torch.zeros(1)})


@pytest.mark.parametrize("key", ["decoder.head.0.gamma", "decoder.head.2.weight"])
def test_a_telling_key_that_is_missing_is_named(plain, key):
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        read({k: tensor for k, tensor in plain.items() if k != key})
    with pytest.raises(CheckpointError, match=f"its {key} has the shape"):
        read({**plain, key: plain[key][:0]})


@pytest.mark.parametrize("nonsense", [None, [1, 2], {"a": 1}, {3: torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(nonsense):
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        read(nonsense)


def test_a_name_that_is_too_long_is_told_in_words(tmp_path):
    with pytest.raises(CheckpointError, match="can't be opened"):
        read_checkpoint(tmp_path / ("x" * 300))
