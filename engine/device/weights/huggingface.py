"""A Hugging Face directory as a `Checkpoint`: config.json, generation_config.json and *.safetensors."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.device.weights.families import FAMILIES, Family
from engine.device.weights.spec import ModelSpec, linear_divisors, llama3_divisors
from engine.device.weights.values import ModelError, Values

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_JSON_BYTES = 64 * 2**20  # the index of the largest models has some
_UNSUPPORTED = ("mlp_bias", "quantization_config")


class HuggingFaceCheckpoint:
    """Tensors read through memory maps, one file open at a time for each shard."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.spec = _spec(directory)
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
    """Which file has which tensor, by the tensor's name."""
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
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON_BYTES + 1)
        value = json.loads(raw) if len(raw) <= _MAX_JSON_BYTES else None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise ModelError(f"{path}: nested too deep") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def _spec(directory: Path) -> ModelSpec:
    """What config.json says, checked."""
    path = directory / "config.json"
    values = Values(str(path), _read_json(path))
    family = _family(values)
    hidden_size, num_heads = (
        values.whole("hidden_size", "hidden_size"),
        values.whole("num_heads", "num_attention_heads"),
    )
    head_dim = values.whole("head_dim", "head_dim", hidden_size // num_heads)
    theta, divisors = _rope(values, head_dim)
    spec = ModelSpec(
        num_layers=values.whole("num_layers", "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=values.whole("intermediate_size", "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=values.whole("num_kv_heads", "num_key_value_heads", num_heads),
        head_dim=head_dim,
        vocab_size=values.whole("vocab_size", "vocab_size"),
        max_positions=values.whole("max_positions", "max_position_embeddings"),
        rms_norm_eps=values.real("rms_norm_eps", "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_divisors=divisors,
        has_qkv_bias=family.has_qkv_bias,
        has_qk_norm=family.has_qk_norm,
        ties_embeddings=bool(values.get("tie_word_embeddings")),
        sliding_window=_sliding_window(values, family),
        eos_token_ids=values.token_ids("eos_token_id") | _more_end_tokens(directory),
        dtype=_DTYPES.get(str(values.get("dtype") or values.get("torch_dtype")), torch.float32),
        decoder=family.decoder,
    )
    spec.check(str(path))
    return spec


def _family(values: Values) -> Family:
    """The row of `model_type`; what no family here has is refused."""
    name = values.get("model_type")
    family = next((family for family in FAMILIES if family.name == name), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise values.error(f"unsupported: model_type {reprlib.repr(name)}; known are {known}")
    for key in _UNSUPPORTED:
        if values.get(key):
            raise values.error(f"unsupported: {key}")
    if values.get("attention_bias"):
        raise values.error(f"unsupported: attention_bias in a {family.name} model")
    if values.text("hidden_act", "silu") != "silu":
        raise values.error(f"unsupported: hidden_act {reprlib.repr(values.get('hidden_act'))}")
    return family


def _rope(values: Values, head_dim: int) -> tuple[float, tuple[float, ...] | None]:
    """The rotary embedding's base and divisors. Newer files hold both in `rope_parameters`, older ones apart."""
    scaling = values.inner("rope_parameters") or values.inner("rope_scaling") or Values(values.source, {})
    theta = scaling.real("rope_theta", "rope_theta", values.real("rope_theta", "rope_theta", 10000.0))
    partial = scaling.real("partial_rotary_factor", "partial_rotary_factor", 1.0)
    if values.real("partial_rotary_factor", "partial_rotary_factor", partial) != 1.0:
        raise values.error("unsupported: partial_rotary_factor")
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, linear_divisors(scaling.real("rope_factor", "factor"), head_dim)
    if kind == "llama3":
        return theta, llama3_divisors(scaling, theta, head_dim)
    raise values.error(f"unsupported: rope scaling {reprlib.repr(kind)}; known are default, linear, llama3")


def _sliding_window(values: Values, family: Family) -> int | None:
    """The window, if any layer uses one."""
    is_used = values.get("sliding_window") not in (None, 0) and (
        not family.switches_window or bool(values.get("use_sliding_window"))
    )
    return values.whole("sliding_window", "sliding_window") if is_used else None


def _more_end_tokens(directory: Path) -> frozenset[int]:
    """End tokens that only generation_config.json names, if there is one."""
    path = directory / "generation_config.json"
    return Values(str(path), _read_json(path)).token_ids("eos_token_id") if path.exists() else frozenset()
