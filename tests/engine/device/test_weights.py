"""Checkpoints: the same model from both formats, and one clear line for whatever is missing, broken or unsupported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.device.weights.gguf_checkpoint import GGUFCheckpoint
from engine.device.weights.gguf_file import GGUFFile
from engine.device.weights.huggingface import HuggingFaceCheckpoint
from engine.device.weights.load import open_checkpoint
from engine.device.weights.values import ModelError
from tests.tiny_models import write_tiny_llama

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def in_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head as llama-architecture files store them: halves interleaved."""
    return np.concatenate(
        [np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in np.split(weight, num_heads)]
    )


def write_gguf(
    directory: Path,
    path: Path,
    *,
    arch: str,
    extra: dict[str, Any] | None = None,
    replaced: dict[str, tuple[Any, gguf.GGUFValueType]] | None = None,
) -> Path:
    """A tiny model's directory as a GGUF file, float32; `replaced` takes the place of what it would say."""
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    for key, value in (extra or {}).items():
        writer.add_key_value(f"{arch}.{key}", value[0], value[1])
    for name, tensor in load_file(directory / "model.safetensors").items():
        values = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = in_pairs(values, heads)
        writer.add_tensor(gguf_name(name), values)
    for key, (value, kind) in (replaced or {}).items():
        writer.kv_data[0][key] = gguf.GGUFValue(value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("family", "arch"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_a_gguf_file_and_a_directory_hold_the_same_model(tmp_path: Path, family: str, arch: str):
    directory = write_tiny_llama(tmp_path / "model", family=family)
    ours, theirs = (
        HuggingFaceCheckpoint(directory),
        GGUFCheckpoint(write_gguf(directory, tmp_path / "m.gguf", arch=arch)),
    )
    for field in ours.spec.__slots__:
        mine, other = getattr(ours.spec, field), getattr(theirs.spec, field)
        assert mine == (pytest.approx(other) if isinstance(mine, float) else other), field
    for name, tensor in load_file(directory / "model.safetensors").items():
        shape = tuple(tensor.shape)
        assert torch.equal(theirs.tensor(name, shape), tensor), name
        assert torch.equal(ours.tensor(name, shape), tensor), name


KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    "kind",
    [
        KINDS.F32,
        KINDS.F16,
        KINDS.BF16,
        KINDS.Q8_0,
        KINDS.Q4_0,
        KINDS.Q4_1,
        KINDS.Q2_K,
        KINDS.Q3_K,
        KINDS.Q4_K,
        KINDS.Q5_K,
        KINDS.Q6_K,
    ],
    ids=lambda kind: kind.name,
)
def test_every_kind_of_tensor_reads_as_the_gguf_library_reads_it(tmp_path: Path, kind: KINDS):
    rows, columns = 6, 512
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    small = np.random.default_rng(0).integers(0, 60, (rows, columns // block_size * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("padding", np.zeros(3, np.float32))  # so that alignment matters
    writer.add_tensor("x", small, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (stored,) = (t for t in gguf.GGUFReader(tmp_path / "one.gguf").tensors if t.name == "x")
    expected = gguf.dequantize(np.asarray(stored.data), kind).reshape(rows, columns)
    tensor = GGUFFile(tmp_path / "one.gguf").tensor("x")
    np.testing.assert_array_equal(tensor.float().numpy(), expected.astype(np.float32))


def test_of_metadata_arrays_the_place_is_kept(tmp_path: Path, llama: Path):
    path = write_gguf(
        llama, tmp_path / "m.gguf", arch="llama", extra={"numbers": ([1, 2, 3], gguf.GGUFValueType.ARRAY)}
    )
    metadata = GGUFFile(path).metadata
    assert metadata["llama.numbers"].length == 3
    assert metadata["tokenizer.ggml.tokens"].length == 512


def test_a_checkpoint_may_be_sharded(tmp_path: Path, llama: Path):
    tensors = load_file(llama / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(str(tmp_path))
    for name in names:
        assert torch.equal(checkpoint.tensor(name, tuple(tensors[name].shape)), tensors[name])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1.safetensors: no such file"):
        open_checkpoint(str(tmp_path))


def test_end_tokens_come_from_both_configurations(tmp_path: Path):
    directory = write_tiny_llama(tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert open_checkpoint(str(directory)).spec.eos_token_ids == {1, 7, 9}


def test_rope_parameters_are_read_under_their_newer_name(tmp_path: Path):
    old = write_tiny_llama(tmp_path / "old", family="llama3")
    config = json.loads((old / "config.json").read_text())
    scaling = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    new = write_tiny_llama(tmp_path / "new")
    (new / "config.json").write_text(json.dumps({**config, "rope_parameters": scaling}))
    assert open_checkpoint(str(new)).spec == open_checkpoint(str(old)).spec


UNSUPPORTED = {
    "model_type": "gpt2",
    "hidden_act": "gelu",
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "quantization_config": {"quant_method": "awq"},
    "attention_bias": True,
    "mlp_bias": True,
    "partial_rotary_factor": 0.5,
    "num_key_value_heads": 3,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, llama: Path, name: str):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: UNSUPPORTED[name]}))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="unsupported") as caught:
        open_checkpoint(str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json: No such file"),
        ("config.json", b"{", "config.json: not JSON"),
        ("config.json", b"[]", "config.json: not a JSON object"),
        ("config.json", b'{"model_type": "llama"}', "config.json: hidden_size is missing"),
        ("model.safetensors", None, "no .*safetensors file"),
        ("model.safetensors", b"x" * 100, "model.safetensors: not a readable safetensors file"),
    ],
)
def test_a_broken_directory_is_one_clear_line(
    tmp_path: Path, llama: Path, file: str, content: bytes | None, message: str
):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(str(tmp_path))


def test_missing_and_misshapen_tensors_are_named(llama: Path):
    checkpoint = open_checkpoint(str(llama))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.9"):
        checkpoint.tensor("model.layers.9.mlp.up_proj.weight", (1, 1))
    with pytest.raises(ModelError, match=r"model.norm.weight has shape \(64,\), not \(65,\)"):
        checkpoint.tensor("model.norm.weight", (65,))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf", "model.bin"])
def test_a_path_that_is_no_model_is_refused(tmp_path: Path, name: str):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=name):
        open_checkpoint(str(tmp_path / name))


def test_a_gguf_file_cut_anywhere_or_foreign_is_refused(tmp_path: Path, llama: Path):
    whole = write_gguf(llama, tmp_path / "m.gguf", arch="llama").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 7, 20, 100, 1000, 3000, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut.gguf"):
            open_checkpoint(str(path))
    for raw, message in (
        (b"GGML" + whole[4:], "not a GGUF file"),
        (b"GGUF" + b"\x09" + whole[5:], "GGUF version 9"),
        (b"GGUF" + whole[4:8] + b"\xff" * 16 + whole[24:], "damaged"),
    ):
        path.write_bytes(raw)
        with pytest.raises(ModelError, match=message):
            open_checkpoint(str(path))


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path, llama: Path):
    path = write_gguf(llama, tmp_path / "m.gguf", arch="gemma")
    with pytest.raises(ModelError, match="architecture 'gemma'"):
        open_checkpoint(str(path))
