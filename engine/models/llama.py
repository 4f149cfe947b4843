"""The decoder of the Llama family, driven by a `ModelSpec`, over a flat batch of tokens.

Plain functions of tensors: no modules, no autograd. A layer's q, k and v projections are one matrix, so are gate and
up; every weight is stored transposed, (inputs, outputs), so that a product is `x @ w`.
Measured: float32, 2 cores, 4 to 8 rows: 77 to 90 us for a 576 x 1536 product that takes 91 to 120 us the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels.interface import Kernels
from engine.weights.spec import Checkpoint, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: torch.Tensor  # (hidden)
    qkv: torch.Tensor  # (hidden, (num_heads + 2 * num_kv_heads) * head_dim)
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # (head_dim)
    k_norm: torch.Tensor | None
    output: torch.Tensor  # (num_heads * head_dim, hidden)
    mlp_norm: torch.Tensor  # (hidden)
    gate_up: torch.Tensor  # (hidden, 2 * intermediate)
    down: torch.Tensor  # (intermediate, hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatInput:
    """One iteration's tokens on the device."""

    token_ids: torch.Tensor  # (num_tokens)
    positions: torch.Tensor  # (num_tokens)
    slots: torch.Tensor  # (num_tokens): where each one's K and V go
    sampled_rows: torch.Tensor | None  # rows whose logits are wanted; None: all
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
    ) -> None:
        self.spec = spec = checkpoint.spec
        self.dtype = dtype
        self._kernels = kernels
        reader = _WeightReader(checkpoint, dtype, device)
        self._embeddings = reader.vector("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        self._layers = []
        for index in range(spec.num_layers):
            self._layers.append(_read_layer(reader, spec, index))
            if (index + 1) % max(1, spec.num_layers // 5) == 0:
                progress(f"loaded {index + 1} of {spec.num_layers} layers")
        self._norm = reader.vector("model.norm.weight", (spec.hidden_size,))
        if spec.ties_embeddings:
            self._head = self._embeddings.t()
        else:
            self._head = reader.matrix(["lm_head.weight"], [spec.vocab_size], spec.hidden_size)
        self._cos, self._sin = _rotary_tables(spec, max_model_len, device)

    @torch.inference_mode()
    def forward(self, inputs: FlatInput, kv_caches: torch.Tensor) -> torch.Tensor:
        """Logits (sampled rows, vocab), float32. `kv_caches`: (num_layers, *one layer's KV cache*)."""
        cos, sin = self._cos[inputs.positions].unsqueeze(1), self._sin[inputs.positions].unsqueeze(1)
        hidden = self._embeddings[inputs.token_ids]
        for layer, kv_cache in zip(self._layers, kv_caches, strict=True):
            hidden = hidden + self._attend(hidden, layer, kv_cache, cos, sin, inputs)
            normed = self._kernels.rms_norm(hidden, layer.mlp_norm, self.spec.rms_norm_eps)
            hidden = hidden + self._kernels.silu_and_mul(normed @ layer.gate_up) @ layer.down
        if inputs.sampled_rows is not None:
            hidden = hidden[inputs.sampled_rows]
        logits = self._kernels.rms_norm(hidden, self._norm, self.spec.rms_norm_eps) @ self._head
        return logits.float()

    def _attend(
        self,
        hidden: torch.Tensor,
        layer: LayerWeights,
        kv_cache: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        inputs: FlatInput,
    ) -> torch.Tensor:
        spec, kernels = self.spec, self._kernels
        normed = kernels.rms_norm(hidden, layer.input_norm, spec.rms_norm_eps)
        qkv = normed @ layer.qkv if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, normed, layer.qkv)
        num_qk = spec.num_heads + spec.num_kv_heads
        qk = qkv[:, : num_qk * spec.head_dim].view(-1, num_qk, spec.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            qk[:, : spec.num_heads] = kernels.rms_norm(qk[:, : spec.num_heads], layer.q_norm, spec.rms_norm_eps)
            qk[:, spec.num_heads :] = kernels.rms_norm(qk[:, spec.num_heads :], layer.k_norm, spec.rms_norm_eps)
        qk.copy_(kernels.rotary(qk, cos, sin))
        kv = qkv[:, spec.num_heads * spec.head_dim :]
        kernels.store_kv(kv, kv_cache, inputs.slots)
        attended = kernels.attention(qk[:, : spec.num_heads], kv, kv_cache, inputs.plan)
        return attended.reshape(len(qkv), -1) @ layer.output


class _WeightReader:
    """Tensors of a checkpoint as the model holds them."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device

    def vector(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor as it is."""
        return self._checkpoint.tensor(name, shape).to(self._device, self._dtype).contiguous()

    def vectors(self, names: list[str], sizes: list[int]) -> torch.Tensor:
        return torch.cat([self.vector(name, (size,)) for name, size in zip(names, sizes, strict=True)])

    def matrix(self, names: list[str], num_outputs: list[int], num_inputs: int) -> torch.Tensor:
        """Projections of the same inputs as one: (num_inputs, sum of num_outputs)."""
        parts = [
            self._checkpoint.tensor(name, (rows, num_inputs)).to(self._device, self._dtype)
            for name, rows in zip(names, num_outputs, strict=True)
        ]
        return torch.cat(parts).t().contiguous()


def _read_layer(reader: _WeightReader, spec: ModelSpec, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}."
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    hidden, kv_size = spec.hidden_size, spec.num_kv_heads * spec.head_dim
    q_size = spec.num_heads * spec.head_dim
    qkv = [f"{attention}{name}_proj" for name in "qkv"]
    qkv_sizes = [q_size, kv_size, kv_size]
    head = (spec.head_dim,)
    return LayerWeights(
        input_norm=reader.vector(f"{prefix}input_layernorm.weight", (hidden,)),
        qkv=reader.matrix([f"{name}.weight" for name in qkv], qkv_sizes, hidden),
        qkv_bias=reader.vectors([f"{name}.bias" for name in qkv], qkv_sizes) if spec.has_qkv_bias else None,
        q_norm=reader.vector(f"{attention}q_norm.weight", head) if spec.has_qk_norm else None,
        k_norm=reader.vector(f"{attention}k_norm.weight", head) if spec.has_qk_norm else None,
        output=reader.matrix([f"{attention}o_proj.weight"], [hidden], q_size),
        mlp_norm=reader.vector(f"{prefix}post_attention_layernorm.weight", (hidden,)),
        gate_up=reader.matrix([f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"], [spec.intermediate_size] * 2, hidden),
        down=reader.matrix([f"{mlp}down_proj.weight"], [hidden], spec.intermediate_size),
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
