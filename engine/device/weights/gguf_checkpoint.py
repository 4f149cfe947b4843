"""A GGUF file of the Llama family as a `Checkpoint`: metadata as a `ModelSpec`, tensors under Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.device.weights.gguf_file import GGUFFile, StringArray
from engine.device.weights.spec import ModelError, ModelSpec, linear_divisors

# `llama` (Mistral too) stores q and k rows in pairs, as its rotary embedding turns (x0, x1); the others in halves.
_PERMUTES_QK = {"llama": True, "qwen2": False, "qwen3": False}

_TOP_LEVEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
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
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFCheckpoint:
    """Tensors dequantised when asked for."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._permutes_qk = _PERMUTES_QK.get(str(self._file.metadata.get("general.architecture")), False)
        self.spec = _read_spec(self._file)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stored_name = _stored_name(name)
        info = self._file.tensors.get(stored_name)
        if info is None:
            raise ModelError(f"{self._file.path}: tensor {stored_name} is missing")
        if info.shape != shape:
            raise ModelError(f"{self._file.path}: tensor {stored_name} has shape {info.shape}, not {shape}")
        tensor = self._file.tensor(stored_name)
        if self._permutes_qk and (".q_proj." in name or ".k_proj." in name):
            num_heads = shape[0] // self.spec.head_dim
            tensor = tensor.view(num_heads, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)
        return tensor


def _stored_name(name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return _TOP_LEVEL[name]
    layer, part, kind = match.groups()
    return f"blk.{layer}.{_IN_LAYER[part]}.{kind}"


def _read_spec(file: GGUFFile) -> ModelSpec:
    architecture = file.metadata.get("general.architecture")
    if architecture not in _PERMUTES_QK:
        known = ", ".join(_PERMUTES_QK)
        raise ModelError(f"{file.path}: unsupported: architecture {architecture!r}; known are {known}")
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    try:
        spec = _spec(file, values)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file.path}: metadata is missing or malformed: {error}") from error
    spec.check(str(file.path))
    return spec


def _spec(file: GGUFFile, values: Mapping[str, Any]) -> ModelSpec:
    hidden_size, num_heads = int(values["embedding_length"]), int(values["attention.head_count"])
    head_dim = int(values.get("attention.key_length", hidden_size // num_heads))
    if int(values.get("rope.dimension_count", head_dim)) != head_dim:
        raise ModelError(f"{file.path}: unsupported: rotary embedding of a part of each head")
    if int(values.get("attention.value_length", head_dim)) != head_dim:
        raise ModelError(f"{file.path}: unsupported: values of another size than keys")
    if int(values.get("expert_count", 0)) > 0:
        raise ModelError(f"{file.path}: unsupported: a mixture of experts")
    return ModelSpec(
        num_layers=int(values["block_count"]),
        hidden_size=hidden_size,
        intermediate_size=int(values["feed_forward_length"]),
        num_heads=num_heads,
        num_kv_heads=int(values.get("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        vocab_size=_vocab_size(file, values),
        max_positions=int(values["context_length"]),
        rms_norm_eps=float(values["attention.layer_norm_rms_epsilon"]),
        rope_theta=float(values.get("rope.freq_base", 10000.0)),
        rope_divisors=_rope_divisors(file, values, head_dim),
        has_qkv_bias="blk.0.attn_q.bias" in file.tensors,
        has_qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        ties_embeddings="output.weight" not in file.tensors,
        sliding_window=int(values.get("attention.sliding_window", 0)) or None,
        eos_token_ids=_eos_token_ids(file.metadata),
        dtype=torch.float32,
    )


def _vocab_size(file: GGUFFile, values: Mapping[str, Any]) -> int:
    """The embedding's rows: files made by older converters say nothing else."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path}: tensor token_embd.weight is missing")
    rows = embedding.shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    stated = int(values.get("vocab_size", tokens.length if isinstance(tokens, StringArray) else rows))
    if stated > rows:
        raise ModelError(f"{file.path}: a vocabulary of {stated} tokens with {rows} embeddings")
    return rows


def _rope_divisors(file: GGUFFile, values: Mapping[str, Any], head_dim: int) -> tuple[float, ...] | None:
    """Llama 3's scaling comes as a tensor of divisors, linear scaling as a factor."""
    if _ROPE_FACTORS in file.tensors:
        return tuple(file.tensor(_ROPE_FACTORS).float().flatten().tolist())
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    if kind == "none":
        return None
    if kind == "linear":
        return linear_divisors(float(values.get("rope.scaling.factor", values.get("rope.scale_linear"))), head_dim)
    raise ModelError(f"{file.path}: unsupported: rope scaling {kind!r}; known are none, linear, llama3's factors")


def _eos_token_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """End of sequence, and end of turn where the model has its own token for it."""
    names = ("eos_token_id", "eot_token_id")
    found = (metadata.get(f"tokenizer.ggml.{name}") for name in names)
    return frozenset(token for token in found if isinstance(token, int))
