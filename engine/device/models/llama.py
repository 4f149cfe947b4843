"""The decoder of the Llama family, driven by a `ModelSpec`, over a flat batch of tokens.

Plain functions of tensors: no modules, no autograd. A layer's q, k and v projections are one matrix, so are gate and
up; how a matrix is held is the kernels' affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.device.kernels import Array, Head, Kernels, Linear, make_head
from engine.device.weights import Checkpoint, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Array  # (hidden)
    qkv: Linear  # hidden to (num_heads + 2 * num_kv_heads) * head_dim
    q_norm: Array | None  # (head_dim)
    k_norm: Array | None
    output: Linear  # num_heads * head_dim to hidden
    mlp_norm: Array  # (hidden)
    gate_up: Linear  # hidden to 2 * intermediate
    down: Linear  # intermediate to hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatInput:
    """One iteration's tokens, int64, on the device."""

    token_ids: torch.Tensor  # (num_tokens)
    positions: torch.Tensor  # (num_tokens)
    slots: torch.Tensor  # (num_tokens): where each one's K and V go
    sampled_rows: torch.Tensor | None  # rows that tokens are sampled from; None: all
    plan: Any  # of the kernels


class LlamaModel:
    """Weights on one device, and the pass over them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        progress: Callable[[str], None],
        quantization: str | None = None,
    ) -> None:
        self.spec = spec = checkpoint.spec
        self.dtype = dtype
        self._kernels = kernels
        reader = _WeightReader(checkpoint, kernels, dtype, device, quantization)
        embeddings = reader.tensor("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        self._embeddings = kernels.array(embeddings)
        self._layers = []
        for index in range(spec.num_layers):
            self._layers.append(_read_layer(reader, spec, index))
            if (index + 1) % max(1, spec.num_layers // 5) == 0:
                progress(f"loaded {index + 1} of {spec.num_layers} layers")
        self._norm = reader.vector("model.norm.weight", spec.hidden_size)
        weight = embeddings if spec.ties_embeddings else reader.tensor("lm_head.weight", embeddings.shape)
        self.head = reader.head(weight)
        self._cos, self._sin = (kernels.array(table) for table in _rotary_tables(spec, max_model_len, device))

    @torch.inference_mode()
    def forward(self, inputs: FlatInput, kv_caches: torch.Tensor) -> torch.Tensor:
        """What `head` takes: (sampled rows, hidden). `kv_caches`: (num_layers, *one layer's KV cache*)."""
        kernels, eps = self._kernels, self.spec.rms_norm_eps
        positions, slots = kernels.array(inputs.positions), kernels.array(inputs.slots)
        cos, sin = self._cos[positions], self._sin[positions]
        hidden, more = self._embeddings[kernels.array(inputs.token_ids)], None
        for layer, kv_cache in zip(self._layers, kernels.array(kv_caches), strict=True):
            normed = kernels.add_rms_norm(hidden, more, layer.input_norm, eps)
            qkv = self._queries_keys_values(normed, layer)
            kernels.rotate_and_store(qkv, self.spec.num_heads, cos, sin, kv_cache, slots)
            attended = kernels.attention(qkv, self.spec.num_heads, kv_cache, inputs.plan)
            if inputs.sampled_rows is not None and layer is self._layers[-1]:
                rows = kernels.array(inputs.sampled_rows)  # of the others, all that is wanted is in the cache now
                hidden, attended = hidden[rows], attended[rows]
            normed = kernels.add_rms_norm(hidden, layer.output(attended), layer.mlp_norm, eps)
            more = layer.down(kernels.silu_and_mul(layer.gate_up(normed)))
        return kernels.tensor(kernels.add_rms_norm(hidden, more, self._norm, eps))

    def _queries_keys_values(self, normed: Array, layer: LayerWeights) -> Array:
        spec, kernels = self.spec, self._kernels
        qkv = layer.qkv(normed)
        if layer.q_norm is not None and layer.k_norm is not None:
            kernels.norm_heads(qkv, range(spec.num_heads), layer.q_norm, spec.rms_norm_eps)
            keys = range(spec.num_heads, spec.num_heads + spec.num_kv_heads)
            kernels.norm_heads(qkv, keys, layer.k_norm, spec.rms_norm_eps)
        return qkv


class _WeightReader:
    """Tensors of a checkpoint as the model holds them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._kernels = kernels
        self._dtype = dtype
        self._device = device
        self._quantization = quantization

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read one tensor in the type and on the device of the model."""
        return self._checkpoint.tensor(name, shape).to(self._device, self._dtype).contiguous()

    def vector(self, name: str, size: int) -> Array:
        """Read a vector, such as the weights of a norm."""
        return self._kernels.array(self.tensor(name, (size,)))

    def linear(self, names: list[str], sizes: list[int], num_inputs: int, *, has_bias: bool = False) -> Linear:
        """Projections of the same inputs as one; `sizes`: how many outputs each has."""
        weights = [self.tensor(f"{name}.weight", (size, num_inputs)) for name, size in zip(names, sizes, strict=True)]
        bias = None
        if has_bias:
            bias = torch.cat([self.tensor(f"{name}.bias", (size,)) for name, size in zip(names, sizes, strict=True)])
        return self._kernels.linear(torch.cat(weights), bias, self._quantization)

    def head(self, weight: torch.Tensor) -> Head:
        """Make the head from its `weight`, (vocab, hidden)."""
        kernels, linear = self._kernels, self._kernels.linear(weight, None, self._quantization)
        return make_head(weight, lambda x: kernels.tensor(linear(kernels.array(x))).float(), self._quantization)


def _read_layer(reader: _WeightReader, spec: ModelSpec, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}."
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    hidden, kv_size = spec.hidden_size, spec.num_kv_heads * spec.head_dim
    q_size = spec.num_heads * spec.head_dim
    qkv = [f"{attention}{name}_proj" for name in "qkv"]
    qkv_sizes = [q_size, kv_size, kv_size]
    return LayerWeights(
        input_norm=reader.vector(f"{prefix}input_layernorm.weight", hidden),
        qkv=reader.linear(qkv, qkv_sizes, hidden, has_bias=spec.has_qkv_bias),
        q_norm=reader.vector(f"{attention}q_norm.weight", spec.head_dim) if spec.has_qk_norm else None,
        k_norm=reader.vector(f"{attention}k_norm.weight", spec.head_dim) if spec.has_qk_norm else None,
        output=reader.linear([f"{attention}o_proj"], [hidden], q_size),
        mlp_norm=reader.vector(f"{prefix}post_attention_layernorm.weight", hidden),
        gate_up=reader.linear([f"{mlp}gate_proj", f"{mlp}up_proj"], [spec.intermediate_size] * 2, hidden),
        down=reader.linear([f"{mlp}down_proj"], [hidden], spec.intermediate_size),
    )


def _rotary_tables(spec: ModelSpec, max_model_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (max_model_len, head_dim) float32; the first half of sin is negated, as kernels want it."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    if spec.rope_divisors is not None:
        frequencies /= torch.tensor(spec.rope_divisors, dtype=torch.float32)
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(device), torch.cat((-sin, sin), -1).to(device)
