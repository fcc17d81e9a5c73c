"""Files as people have them: other names, prefixes, dtypes, shards, folders; and what can't be loaded, told rightly."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import logging
import lzma
import os

import numpy
import pytest
import torch
from safetensors.torch import save_file

from tests.oracle import oracle_vae, original_state_dict
from wan_vae_parallel import Architecture, CheckpointError, LatentError, load_vae, vae_from_state_dict
from wan_vae_parallel.files import key_layouts, quantised, tensor_file
from wan_vae_parallel.files.checkpoint import (
    checkpoint_from_state_dict,
    describe_checkpoint,
    read_checkpoint,
    with_statistics,
)
from wan_vae_parallel.files.latents import denormalize, read_latents


@pytest.fixture(scope="module")
def oracle():
    return oracle_vae("wan2.1")


@pytest.fixture(scope="module")
def original(oracle):
    return original_state_dict(oracle)


@pytest.fixture(scope="module")
def layouts(oracle, original):
    return {"original": original, "diffusers": dict(oracle.state_dict())}


def read(tensors):
    return checkpoint_from_state_dict(tensors, source="vae.safetensors")


def assert_same(checkpoint, original):
    """All of the VAE, under its own keys, and as it was."""
    found = {**checkpoint.decoder, **checkpoint.encoder}
    assert found.keys() == original.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, original[key]), key


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: "first_stage_model." + key,
        lambda key: "module." + key,
        lambda key: "vae.model." + key,
        lambda key: "_orig_mod." + key,
        lambda key: "anything.at.all." + key,
        lambda key: "first_stage_model._orig_mod." + key.replace("decoder.", "decoder.module."),
    ],
)
def test_any_prefix_in_either_layout(layouts, original, layout, wrap):
    checkpoint = read({wrap(key): tensor for key, tensor in layouts[layout].items()})
    assert checkpoint.layout == layout
    assert_same(checkpoint, original)


EXTRA = {
    "mean": torch.zeros(16),
    "std": torch.ones(16),
    "scale.0": torch.ones(1),
    "latents_mean": torch.zeros(16),
    "decoder.head.0.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    "model_ema.decay": torch.zeros(()),
}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_what_belongs_to_no_layer_is_left_out_and_said_once(layouts, original, layout, prefix, caplog):
    key_layouts._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            tensors = {**layouts[layout], **EXTRA}
            assert_same(read({prefix + key: tensor for key, tensor in tensors.items()}), original)
    (said,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said.startswith("vae.safetensors: 6 tensors belong to no layer of the VAE")
    assert prefix + "scale.0" in said


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_of_a_checkpoint_with_the_diffusion_model_only_the_vae_is_read(
    layouts, original, layout, tmp_path, monkeypatch
):
    # Twenty times as large as the VAE, on both sides of it.
    others = {f"model.diffusion_model.blocks.{i}.self_attn.q.weight": torch.full((300, 300), i / 1.0) for i in range(9)}
    others |= {"conditioner.embedders.0.weight": torch.zeros(300, 300), "aaa.weight": torch.zeros(300, 300)}
    path = tmp_path / "all_in_one.safetensors"
    save_file({**others, **{f"first_stage_model.{key}": t.contiguous() for key, t in layouts[layout].items()}}, path)
    copied = []
    copy = tensor_file.TensorFile._copy_span
    monkeypatch.setattr(
        tensor_file.TensorFile,
        "_copy_span",
        lambda self, into, start, stop, *rest: (copied.append(stop - start), copy(self, into, start, stop, *rest)),
    )
    assert_same(read_checkpoint(path), original)
    own = sum(tensor.numel() * 4 for tensor in original.values())
    assert sum(copied) <= own + 200_000  # and headers
    assert path.stat().st_size > own + 3_900_000


def test_several_vaes_in_one_file_are_refused_with_their_prefixes(original):
    both = {prefix + key: tensor for prefix in ("vae.", "vae_ema.") for key, tensor in original.items()}
    with pytest.raises(CheckpointError, match=r"has several VAEs, under the prefixes 'vae\.', 'vae_ema\.'; save one"):
        read(both)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_norms_may_be_stored_flat(layouts, original, layout):
    flat = {key: tensor.flatten() if key.endswith("gamma") else tensor for key, tensor in layouts[layout].items()}
    assert_same(read(flat), original)


def test_dtypes_may_be_mixed(original, tmp_path):
    mixed = {key: tensor.to(torch.bfloat16) if tensor.dim() == 5 else tensor for key, tensor in original.items()}
    mixed["decoder.head.2.weight"] = original["decoder.head.2.weight"].half()
    save_file(mixed, tmp_path / "vae.safetensors")
    checkpoint = read_checkpoint(tmp_path / "vae.safetensors")
    assert_same(checkpoint, mixed)
    # On several devices, where weights go to the workers in one block of memory.
    latents = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with load_vae(tmp_path / "vae.safetensors", "cpu") as one, load_vae(tmp_path / "vae.safetensors", "cpu,cpu") as two:
        assert (one.decode(latents) - two.decode(latents)).abs().max() < 1e-5


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_plain_fp8_is_taken_as_it_is(original, dtype, tmp_path, caplog):
    stored = {key: tensor.to(dtype) if tensor.dim() == 5 else tensor for key, tensor in original.items()}
    save_file(stored, tmp_path / "vae.safetensors")
    quantised._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        describe_checkpoint(tmp_path / "vae.safetensors")
        checkpoint = read_checkpoint(tmp_path / "vae.safetensors")
    assert_same(
        checkpoint,
        {key: tensor.float() for key, tensor in stored.items()}
        | {key: tensor.to(torch.bfloat16) for key, tensor in stored.items() if tensor.dtype == dtype},
    )
    assert caplog.text.count("weights in fp8 are taken as the numbers that they stand for") == 1


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("scale_name", "each"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)]
)
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_scaled_fp8_is_multiplied_out(layouts, original, layout, scale_name, each, dtype):
    stored, expected = {}, {}
    for key, tensor in layouts[layout].items():
        if tensor.dim() < 4 or not key.endswith("weight"):
            stored[key] = expected[key] = tensor
            continue
        axes = (1,) * (tensor.dim() - 1)
        largest = tensor.abs().amax(dim=tuple(range(1, tensor.dim()))) if each else tensor.abs().max()
        scale = largest / torch.finfo(dtype).max
        shaped = scale.view(-1, *axes) if each else scale
        stored[key] = (tensor / shaped).to(dtype)
        stored[key.removesuffix("weight") + scale_name] = scale
        stored[key.removesuffix("weight") + "input_scale"] = torch.ones(())
        expected[key] = stored[key].float() * shaped
    checkpoint = read({**stored, "scaled_fp8": torch.zeros(2, dtype=dtype)})
    assert_same(checkpoint, read(expected).decoder | read(expected).encoder)
    # And they are the weights: rounded to two or three bits, not to noise.
    error = (checkpoint.decoder["decoder.conv1.weight"] - original["decoder.conv1.weight"]).abs().max()
    assert error < 0.1 * original["decoder.conv1.weight"].abs().max()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"decoder.conv1.weight_scale_2": torch.ones(())}, "NVFP4, which TensorRT and ModelOpt make"),
        ({"decoder.conv1.weight_scale": torch.ones(8, 2)}, r"scales \(8, 2\) in torch.float32; only fp8 with one"),
        ({"decoder.conv1.weight.absmax": torch.ones(2)}, "weights in bitsandbytes' 4 or 8 bits; take the VAE in bf16"),
        ({"decoder.conv1.qweight": torch.ones(2)}, "weights in GPTQ's or AWQ's 4 bits; take the VAE in bf16"),
        ({"decoder.conv9.weight_scale": torch.ones(())}, r"scales of weights that it lacks: decoder\.conv9\.weight"),
    ],
)
def test_other_quantised_weights_are_refused_by_name(original, extra, words):
    with pytest.raises(CheckpointError, match=words):
        read({**original, **extra})


def test_a_bf16_weight_with_a_scale_is_refused(original):
    with pytest.raises(CheckpointError, match=r"decoder\.conv1\.weight in torch\.float32 with scales"):
        read({**original, "decoder.conv1.weight_scale": torch.ones(())})


def _sharded(folder, tensors, stem="diffusion_pytorch_model", ending=".safetensors", index=True):
    """Writes ``tensors`` in three shards; returns these."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted(tensors)
    names = [f"{stem}-{i:05d}-of-00003{ending}" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        save_file({key: tensors[key].contiguous() for key in keys[i::3]}, folder / name)
    if index:
        places = {key: names[i % 3] for i, key in enumerate(keys)}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [folder / name for name in names]


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_shards_by_their_folder_their_index_or_one_of_them(layouts, original, layout, tmp_path):
    shards = _sharded(tmp_path, layouts[layout])
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors.index.json", shards[1], str(shards[2])):
        assert_same(read_checkpoint(path), original)
        assert describe_checkpoint(path).architecture == read(original).architecture


def test_one_shard_whose_siblings_are_not_there(original, tmp_path):
    shards = _sharded(tmp_path, original)
    shards[0].unlink()
    with pytest.raises(
        CheckpointError,
        match=r"00002-of-00003\.safetensors is shard 2 of 3, and diffusion_.*00001-of.* is not beside it",
    ):
        read_checkpoint(shards[1])
    with pytest.raises(
        CheckpointError, match=r"index\.json names 3 files, and diffusion_.*00001.* is not beside it; fetch all"
    ):
        read_checkpoint(tmp_path)


def test_shards_that_change_are_refused(original, tmp_path):
    shards = _sharded(tmp_path, original)
    version = read_checkpoint(tmp_path).version
    os.utime(shards[2], ns=(1, 1))
    with pytest.raises(CheckpointError, match="was replaced since it was loaded; load the VAE again"):
        read_checkpoint(tmp_path, version)


def test_tensors_in_several_shards_are_refused(original, tmp_path):
    shards = _sharded(tmp_path, original)
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(CheckpointError, match="has tensors in several of its shards: "):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "is no table but a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"names files outside its folder: \.\./x\.safetensors"),
    ],
)
def test_a_bad_index_is_told(tmp_path, content, words):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(index)


def test_a_pipelines_folder_is_its_vaes(oracle, original, tmp_path):
    oracle.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert_same(read_checkpoint(tmp_path / "pipeline"), original)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_variants_file_is_taken(layouts, original, variant, tmp_path):
    save_file(layouts["diffusers"], tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    assert_same(read_checkpoint(tmp_path), original)


def test_of_several_variants_the_user_names_one(layouts, original, tmp_path):
    for variant in ("fp16", "bf16"):
        save_file(layouts["diffusers"], tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    with pytest.raises(CheckpointError, match=r"several files of weights: .*bf16\.safetensors, .*fp16.*; name one"):
        read_checkpoint(tmp_path)
    assert_same(read_checkpoint(tmp_path / "diffusion_pytorch_model.fp16.safetensors"), original)


def test_of_a_models_folder_the_vae_is_taken(original, tmp_path):
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.bf16.safetensors")
    save_file(original, tmp_path / "Wan2.1_VAE.safetensors")
    assert_same(read_checkpoint(tmp_path), original)


def test_a_folder_of_pickles_is_told_from_an_empty_one(tmp_path):
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"without safetensors, and Wan2\.1_VAE\.pth can run any code"):
        read_checkpoint(tmp_path)


def test_a_tilde_is_the_home_folder(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(original, tmp_path / "vae.safetensors")
    assert_same(read_checkpoint("~/vae.safetensors"), original)
    with load_vae("~/vae.safetensors", "cpu") as vae:
        assert vae.architecture.width == 8
    with pytest.raises(CheckpointError, match=r"nothing.safetensors does not exist"):
        load_vae("~/nothing.safetensors", "cpu")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "the path is None, a NoneType; it must be a str or a pathlib.Path: name a Wan VAE's safetensors file"),
        (3, "the path is 3, a int"),
        ("", "the path is empty; name a Wan VAE's safetensors file"),
        ("a\0b", r"the path is 'a\\x00b', and no name has a NUL; name a Wan VAE's safetensors file"),
        (
            "https://huggingface.co/x/vae.safetensors",
            "an address is no file on this machine: https://hug.*; download the file",
        ),
        (b"vae.safetensors", r"the path is b'vae.safetensors', a bytes; .*: os.fsdecode makes a str of it"),
    ],
)
def test_what_is_no_path_is_told(path, words):
    with pytest.raises(CheckpointError, match=words):
        load_vae(path, "cpu")
    with pytest.raises(LatentError, match=r"the path is |an address is no file"):
        read_latents(path)


KINDS = {
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file, .*; take the same VAE as .safetensors"),
    "ggml": (b"lmgg" + bytes(64), "is a GGML file, .*; take the same VAE as .safetensors"),
    "ggjt": (b"tjgg\x03\x00\x00\x00" + bytes(64), "is a GGML file, .*; take the same VAE as .safetensors"),
    # By its manual, of a download by HTTP and of a torrent's.
    "aria2": (
        b"\0\1" + bytes(8) + b"\0\x10\0\0" + b"\0\0\0\0\x1e\x4c\x1a\x2b" + bytes(8) + b"\0\0\0\x3d" + b"\xff" * 61,
        "is aria2's control file, .*; let aria2 finish it .* and name the file itself",
    ),
    "aria2 of a torrent": (
        b"\0\1\0\0\0\1\0\0\0\x14" + bytes(range(20)) + b"\0\x10\0\0" + bytes(20),
        "is aria2's control file",
    ),
    "torrent": (b"d8:announce35:udp://tracker.example", "is a torrent, and not the file that it leads to"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "is a PDF; take the same VAE as .safetensors"),
    "text in UTF-16": ("Entry not found\r\n".encode("utf-16"), 'is a text, "Entry not found", .* the file itself'),
    "text in UTF-16 the other way": (
        b"\xfe\xff" + "Entry not found".encode("utf-16-be"),
        'is a text, "Entry not found"',
    ),
    "text in UTF-16 without a mark": ("Entry not found".encode("utf-16-le"), 'is a text, "Entry not found"'),
    "text in UTF-32": ("Entry not found".encode("utf-32"), 'is a text, "Entry not found"'),
    "text of an older encoding": ("Zugriff verweigert für wan".encode("cp1252"), 'is a text, "Zugriff verweigert für'),
    "page in UTF-16": ("<!DOCTYPE html><html></html>".encode("utf-16"), "is a web page that was saved .*itself"),
    "lfs in UTF-16": ("version https://git-lfs.github.com/spec/v1\n".encode("utf-16"), "is a Git LFS pointer"),
    "json in UTF-16": ('{"_class_name": "AutoencoderKLWan"}'.encode("utf-16"), "is JSON, and holds no tensors"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer, .*lfs pull"),
    "page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "is a web page that was saved .*itself"),
    "page without a doctype": (b"\n <html lang='en'>", "is a web page that was saved under the file's name"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "is the index of files with tensors, .*name their folder"),
    "json": (b'{"_class_name": "AutoencoderKLWan"}', "is JSON, and holds no tensors"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00{'descr'", "is a NumPy array; take the same VAE as .safetensors"),
    "zip": (b"PK\x03\x04" + bytes(26) + b"vae.safetensors", "is a zip archive; unpack it"),
    "gzip": (gzip.compress(b"vae"), "is a gzip archive; unpack it"),
    "xz": (lzma.compress(b"vae"), "is an xz archive; unpack it"),
    "bzip2": (bz2.compress(b"vae"), "is a bzip2 archive; unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(9), "is a zstd archive; unpack it"),
    "tar": (b"wan/vae.safetensors".ljust(257, b"\0") + b"ustar\x0000", "is a tar archive; unpack it"),
    "numpy archive": (b"PK\x03\x04" + bytes(26) + b"a.npy", "is a NumPy archive; take the same VAE"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(9), "is a picture; take the same VAE as .safetensors"),
    "video": (b"\x00\x00\x00\x20ftypisom" + bytes(9), "is a video; take the same VAE as .safetensors"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file; take the same VAE as .safetensors"),
    "answer": (b"Entry not found", 'is a text, "Entry not found", as sites answer .*; download the file itself'),
    "long answer": (
        b"Access to this model is restricted and you are not in the list\n",
        'is a text, "Access to .*\\.\\.\\.",',
    ),
    "not written": (bytes(5000), "begins with zeros alone, as a file whose download was not finished; download"),
}


@pytest.mark.parametrize(("content", "words"), KINDS.values(), ids=KINDS)
def test_files_of_other_kinds_are_called_what_they_are(tmp_path, content, words):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(path)
    assert "damaged" not in str(error.value)
    with pytest.raises(LatentError, match=words.replace("same VAE", "same latents")):
        read_latents(path)


def test_a_file_that_aria2_has_not_finished_is_not_read(original, tmp_path):
    # It has its size from the start, so that what is not there yet would be weights of zeros.
    path = tmp_path / "vae.safetensors"
    save_file(original, path)
    control = tmp_path / "vae.safetensors.aria2"
    control.write_bytes(KINDS["aria2"][0])
    words = r"is not downloaded in full, as vae\.safetensors\.aria2 is beside it, .*; run the same download again"
    for read_it in (read_checkpoint, describe_checkpoint):
        with pytest.raises(CheckpointError, match=words):
            read_it(path)
    with pytest.raises(CheckpointError, match=r"is aria2's control file"):
        read_checkpoint(control)
    control.unlink()
    assert_same(read_checkpoint(path), original)


@pytest.mark.parametrize("suffix", [".part", ".crdownload", ".incomplete"])
def test_a_name_of_what_is_being_downloaded_is_told(tmp_path, suffix):
    path = tmp_path / f"vae.safetensors{suffix}"
    path.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(CheckpointError, match=rf"is not downloaded in full, as its name ends in \{suffix}; download"):
        read_checkpoint(path)


def test_random_bytes_are_damaged(tmp_path):
    (tmp_path / "vae.safetensors").write_bytes(bytes(range(1, 256)))
    with pytest.raises(CheckpointError, match="can't be read, as it is damaged or not downloaded in full"):
        read_checkpoint(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
def test_of_a_configuration_the_folder_is_to_be_named(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="is a configuration, and holds no tensors; name its folder, or take"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(("suffix", "words"), [(".onnx", "is an ONNX model"), (".engine", "is a TensorRT engine")])
def test_what_is_built_for_other_runtimes_is_called_by_its_name(tmp_path, suffix, words):
    (tmp_path / f"vae{suffix}").write_bytes(b"\x08\x07\x12\x07pytorch")
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / f"vae{suffix}")


def test_latents_in_torchs_and_numpys_files_are_told(tmp_path):
    torch.save(torch.zeros(1, 16, 1, 2, 2), tmp_path / "latents.pt")
    numpy.save(tmp_path / "latents.npy", numpy.zeros((1, 16, 1, 2, 2)))
    with pytest.raises(LatentError, match=r"is a pickle, .*; take the same latents as \.safetensors"):
        read_latents(tmp_path / "latents.pt")
    with pytest.raises(
        LatentError, match=r"is a NumPy array; take the same latents as \.safetensors, as by safetensors"
    ):
        read_latents(tmp_path / "latents.npy")


def test_vaes_of_other_structures_are_named(original):
    other = {
        key: tensor[:2] if key.startswith("decoder.upsamples") and key.endswith("weight") else tensor
        for key, tensor in original.items()
    }
    with pytest.raises(CheckpointError, match=r"it is built otherwise, as LightVAE Pro and Lite are, .* Wan's own VAE"):
        read(other)
    with pytest.raises(
        CheckpointError, match=r"a small VAE for previews \(TAE, as taew2_1, taew2_2 and lighttaew2_1\)"
    ):
        read({"decoder.1.weight": torch.zeros(64, 16, 3, 3), "decoder.22.bias": torch.zeros(3)})


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("taehv.decoder.22.bias", "a small VAE for previews"),
        ("decoder.layers.0.weight", "a small VAE for previews"),
        ("encoder.downsamples.0.residual.0.gamma", "an encoder alone, without its decoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a text encoder, not the VAE"),
        ("token_embedding.weight", "a text encoder, not the VAE"),
        ("model.embed_tokens.weight", "a text encoder, not the VAE"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "an image encoder"),
        ("model.diffusion_model.blocks.0.weight", "a diffusion model, not its VAE"),
        ("latent_tensor", "latents, which a VAE decodes"),
        ("samples", "latents, which a VAE decodes"),
        ("vocoder.conv_pre.weight", "the VAE of sound"),
        ("decoder.project_in.main.conv.weight", "the VAE of another model"),
        ("model.0.weight", "a model that enlarges pictures"),
    ],
)
def test_other_models_are_named(key, what):
    with pytest.raises(CheckpointError, match=f"but {key}: {what}.*; take the VAE that came with the Wan model"):
        read({key: torch.zeros(2, 2)})


def test_nvfp4_is_told_by_its_configuration(layouts, tmp_path):
    save_file(layouts["diffusers"], tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"quant_algo": "NVFP4"}')
    with pytest.raises(CheckpointError, match=r"has weights in NVFP4, as its .*config.json says"):
        read_checkpoint(tmp_path)


def _with_config(folder, tensors, file="diffusion_pytorch_model.safetensors", **settings):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_statistics_of_the_files_own_are_taken(layouts, tmp_path):
    mean, std = [0.1 * i for i in range(16)], [1.0 + i for i in range(16)]
    folder = _with_config(tmp_path / "own", layouts["diffusers"], latents_mean=mean, latents_std=std)
    latents = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = latents * torch.tensor(std).view(1, -1, 1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1, 1)
    with load_vae(folder, "cpu") as vae:
        torch.testing.assert_close(denormalize(latents, vae.architecture), expected)
        # And used: the same frames as of latents that were de-normalised before.
        assert torch.equal(vae.decode(latents, normalized=True), vae.decode(expected))
        frames = torch.rand(1, 1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
        again = denormalize(vae.encode(frames, normalized=True), vae.architecture)
        torch.testing.assert_close(again, vae.encode(frames))


OWN = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}


@pytest.mark.parametrize("name", OWN)
def test_one_statistic_alone_goes_with_the_published_other(layouts, tmp_path, name):
    given = {name: OWN[name]}
    architecture = read_checkpoint(_with_config(tmp_path / "one", layouts["diffusers"], **given)).architecture
    published = {other: getattr(Architecture.published("wan2.1"), other) for other in OWN}
    assert {other: list(getattr(architecture, other)) for other in OWN} == {
        other: list({**published, **given}[other]) for other in OWN
    }


@pytest.mark.parametrize("name", OWN)
def test_one_statistic_alone_is_refused_where_no_other_is_published(name):
    unknown = dataclasses.replace(Architecture.published("wan2.1"), z_dim=5)
    with pytest.raises(CheckpointError, match=f"has {name} and no latents_"):
        with_statistics(unknown, {name: [1.0] * 5}, "config.json")


def test_statistics_are_taken_beside_a_file_of_another_name_if_they_are_its_own(layouts, tmp_path):
    tensors, file = layouts["diffusers"], "model.safetensors"
    own = _with_config(tmp_path / "own", tensors, file, _class_name="AutoencoderKLWan", **OWN)
    for path in (own, own / file):
        assert read_checkpoint(path).architecture.mean == tuple(OWN["latents_mean"])
    _sharded(tmp_path / "shards", tensors, stem="model")
    (tmp_path / "shards" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **OWN}))
    assert read_checkpoint(tmp_path / "shards").architecture.mean == tuple(OWN["latents_mean"])
    # Another model's, and one of which it is not known whose it is.
    other = _with_config(tmp_path / "other", tensors, file, _class_name="WanModel", **OWN)
    assert read_checkpoint(other).architecture.mean is None
    save_file({"a": torch.zeros(1)}, own / "another.safetensors")
    assert read_checkpoint(own / file).architecture.mean is None


def test_published_statistics_are_no_files_own(oracle, layouts, tmp_path):
    config = oracle.config
    folder = _with_config(
        tmp_path / "same", layouts["diffusers"], latents_mean=config.latents_mean, latents_std=config.latents_std
    )
    assert read_checkpoint(folder).architecture == Architecture.published("wan2.1", width=8)
    # Of another number of channels they are what diffusers' class says where nobody said otherwise.
    folder = _with_config(tmp_path / "few", layouts["diffusers"], latents_mean=[1.0] * 4, latents_std=[1.0] * 4)
    assert read_checkpoint(folder).architecture == Architecture.published("wan2.1", width=8)


@pytest.mark.parametrize("std", [[0.0] * 16, [1e999] * 16, ["x"] * 16])
def test_statistics_that_cant_be_are_refused(layouts, tmp_path, std):
    folder = _with_config(tmp_path, layouts["diffusers"], latents_mean=[0.0] * 16, latents_std=std)
    with pytest.raises(CheckpointError, match=r"config.json has statistics of latents that"):
        read_checkpoint(folder)


def test_weights_of_memory_load_alike(layouts):
    """The same of a state dict: what was said of files holds for tensors."""
    with vae_from_state_dict({f"first_stage_model.{k}": t for k, t in layouts["diffusers"].items()}, "cpu") as vae:
        assert vae.architecture == Architecture.published("wan2.1", width=8)
