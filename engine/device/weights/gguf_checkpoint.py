"""A GGUF file as a `Checkpoint`: metadata as a `ModelSpec`, tensors under Hugging Face names."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Final

import torch

from engine.device.weights.families import FAMILIES, GGUF_IN_LAYER, GGUF_TOP_LEVEL, Family
from engine.device.weights.gguf_file import Array, GGUFFile
from engine.device.weights.spec import ModelSpec, linear_divisors
from engine.device.weights.values import ModelError, Values

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_TOKENS = "tokenizer.ggml.tokens"
# The end of a turn, where a file does not name it. Source: llama.cpp, which looks for these.
_END_OF_TURN: Final = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
    "<｜end▁of▁sentence｜>",
)


class GGUFCheckpoint:
    """Tensors dequantised when asked for."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        family = _family(self._file)
        self._permutes_qk = family.permutes_gguf_qk
        self.spec = _spec(self._file, family)
        self.spec.check(str(path))

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
        return GGUF_TOP_LEVEL[name]
    layer, part, kind = match.groups()
    return f"blk.{layer}.{GGUF_IN_LAYER[part]}.{kind}"


def _family(file: GGUFFile) -> Family:
    architecture = file.metadata.get("general.architecture")
    family = next((family for family in FAMILIES if family.gguf == architecture and architecture is not None), None)
    if family is None:
        known = ", ".join(family.gguf for family in FAMILIES if family.gguf)
        raise ModelError(f"{file.path}: unsupported: architecture {reprlib.repr(architecture)}; known are {known}")
    return family


def _spec(file: GGUFFile, family: Family) -> ModelSpec:
    prefix = f"{family.gguf}."
    stated = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    values = Values(str(file.path), stated)
    hidden_size = values.whole("hidden_size", "embedding_length")
    num_heads = values.whole("num_heads", "attention.head_count")
    head_dim = values.whole("head_dim", "attention.key_length", hidden_size // num_heads)
    if values.whole("rope_dimensions", "rope.dimension_count", head_dim) != head_dim:
        raise values.error("unsupported: rotary embedding of a part of each head")
    if values.whole("head_dim", "attention.value_length", head_dim) != head_dim:
        raise values.error("unsupported: values of another size than keys")
    if values.whole("num_experts", "expert_count", 0):
        raise values.error("unsupported: a mixture of experts")
    is_windowed = values.get("attention.sliding_window") not in (None, 0)
    return ModelSpec(
        num_layers=values.whole("num_layers", "block_count"),
        hidden_size=hidden_size,
        intermediate_size=values.whole("intermediate_size", "feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=values.whole("num_kv_heads", "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=_vocab_size(file, values),
        max_positions=values.whole("max_positions", "context_length"),
        rms_norm_eps=values.real("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        rope_theta=values.real("rope_theta", "rope.freq_base", 10000.0),
        rope_divisors=_rope_divisors(file, values, head_dim),
        has_qkv_bias="blk.0.attn_q.bias" in file.tensors,
        has_qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        ties_embeddings="output.weight" not in file.tensors,
        sliding_window=values.whole("sliding_window", "attention.sliding_window") if is_windowed else None,
        eos_token_ids=_eos_token_ids(file),
        dtype=torch.float32,
        decoder=family.decoder,
    )


def _vocab_size(file: GGUFFile, values: Values) -> int:
    """The embedding's rows: files made by older converters say nothing else."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or not embedding.shape:
        raise values.error("tensor token_embd.weight is missing")
    rows = embedding.shape[0]
    tokens = file.metadata.get(_TOKENS)
    stated = values.whole("vocab_size", "vocab_size", tokens.length if isinstance(tokens, Array) else rows)
    if stated > rows:
        raise values.error(f"a vocabulary of {stated} tokens with {rows} embeddings")
    return rows


def _rope_divisors(file: GGUFFile, values: Values, head_dim: int) -> tuple[float, ...] | None:
    """Llama 3's scaling comes as a tensor of divisors, linear scaling as a factor."""
    if _ROPE_FACTORS in file.tensors:
        return tuple(file.tensor(_ROPE_FACTORS).float().flatten().tolist())
    is_older = values.get("rope.scaling.factor") is None and values.get("rope.scale_linear") is not None
    kind = values.text("rope.scaling.type", "linear" if is_older else "none")
    if kind == "none":
        return None
    if kind == "linear":
        key = "rope.scale_linear" if is_older else "rope.scaling.factor"
        return linear_divisors(values.real("rope_factor", key), head_dim)
    raise values.error(f"unsupported: rope scaling {reprlib.repr(kind)}; known are none, linear, llama3's factors")


def _eos_token_ids(file: GGUFFile) -> frozenset[int]:
    """The end of a sequence, and of a turn or message where the model has tokens of their own for these. Many files
    name no end of a turn; it is found by its text then."""
    values = Values(str(file.path), file.metadata)
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = frozenset[int]().union(*(values.token_ids(f"tokenizer.ggml.{name}") for name in names))
    tokens = file.metadata.get(_TOKENS)
    if "tokenizer.ggml.eot_token_id" in file.metadata or not isinstance(tokens, Array):
        return found
    return found | file.find_strings(tokens, _END_OF_TURN)
