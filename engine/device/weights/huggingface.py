"""A Hugging Face directory as a `Checkpoint`: config.json, generation_config.json and *.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.device.weights.spec import ModelError, ModelSpec, linear_divisors, llama3_divisors

# What the families differ in, where their config.json does not say it.
_HAS_QKV_BIAS = {"llama": False, "mistral": False, "qwen2": True, "qwen3": False}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNSUPPORTED = ("mlp_bias", "quantization_config")


class HuggingFaceCheckpoint:
    """Tensors read through memory maps, one file open at a time for each shard."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.spec = read_spec(directory)
        self._files: dict[Path, Any] = {}
        self._shards = _find_shards(directory)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        path = self._shards.get(name)
        if path is None:
            raise ModelError(f"{self._directory}: tensor {name} is missing")
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot read tensor {name}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, not {shape}")
        return tensor


def _find_shards(directory: Path) -> dict[str, Path]:
    """Tensor name to file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index}: no weight_map")
        shards = {name: directory / str(file) for name, file in weight_map.items()}
        for path in set(shards.values()):
            if not path.exists():
                raise ModelError(f"{path}: no such file, though {index.name} names it")
        return shards
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{directory}: no *.safetensors file in this directory")
    shards = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shards.update(dict.fromkeys(file.keys(), path))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def read_spec(directory: Path) -> ModelSpec:
    """What config.json says, checked."""
    path = directory / "config.json"
    config = _read_json(path)
    try:
        spec = _spec(config, path)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: missing or malformed: {error}") from error
    generation = directory / "generation_config.json"
    if generation.exists():
        extra = _token_ids(_read_json(generation).get("eos_token_id"))
        spec = _with_eos(spec, extra)
    spec.check(str(path))
    return spec


def _spec(config: Mapping[str, Any], path: Path) -> ModelSpec:
    family = config.get("model_type")
    if family not in _HAS_QKV_BIAS:
        raise ModelError(f"{path}: unsupported: model_type {family!r}; known are {', '.join(_HAS_QKV_BIAS)}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ModelError(f"{path}: unsupported: {name}")
    if config.get("attention_bias"):
        raise ModelError(f"{path}: unsupported: attention_bias in a {family} model")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: unsupported: hidden_act {config['hidden_act']!r}")
    hidden_size, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = int(config.get("head_dim") or hidden_size // num_heads)
    theta, divisors = _rope(config, head_dim, path)
    return ModelSpec(
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size"),
        max_positions=_size(config, "max_position_embeddings"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_divisors=divisors,
        has_qkv_bias=_HAS_QKV_BIAS[family],
        has_qk_norm=family == "qwen3",
        ties_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_window=_sliding_window(config, family),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
        dtype=_DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32),
    )


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if not isinstance(value, int) or value < 1:
        raise TypeError(f"{name} is {value!r}")
    return value


def _rope(config: Mapping[str, Any], head_dim: int, path: Path) -> tuple[float, tuple[float, ...] | None]:
    """Base and divisors. Newer files hold both in `rope_parameters`, older ones apart."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if float(config.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ModelError(f"{path}: unsupported: partial_rotary_factor")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, linear_divisors(float(scaling["factor"]), head_dim)
    if kind == "llama3":
        return theta, llama3_divisors(scaling, theta, head_dim)
    raise ModelError(f"{path}: unsupported: rope scaling {kind!r}; known are default, linear, llama3")


def _sliding_window(config: Mapping[str, Any], family: str) -> int | None:
    """The window, if any layer uses one."""
    is_used = config.get("use_sliding_window", False) if family.startswith("qwen") else True
    window = config.get("sliding_window")
    return int(window) if is_used and window else None


def _token_ids(value: object) -> frozenset[int]:
    """One id, several, or none."""
    ids = value if isinstance(value, list) else [value]
    return frozenset(token for token in ids if isinstance(token, int))


def _with_eos(spec: ModelSpec, extra: frozenset[int]) -> ModelSpec:
    return replace(spec, eos_token_ids=spec.eos_token_ids | extra)
