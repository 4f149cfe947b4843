"""What this machine allows: its matrix products and its memory, measured, and the tokens a second that follow.

A load of requests that all have P prompt tokens and G output tokens, so many at a time, can be no faster than its
products, and in each decode iteration no faster than the weights can be read. Attention, the KV cache and everything
outside the model are left out, so no engine reaches the limit; in float32, as long as every weight is read in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.device.weights.spec import ModelSpec

ROWS = 512
READ_BYTES = 512 * 2**20
REPEATS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine's limits, measured on all cores."""

    flops: float  # floating-point operations a second in float32 products of the model's shapes
    bytes_per_s: float  # read from memory

    def best_of(self, other: Machine) -> Machine:
        return Machine(flops=max(self.flops, other.flops), bytes_per_s=max(self.bytes_per_s, other.bytes_per_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a model asks of the machine, in float32."""

    layer_parameters: int  # of the matrices of all layers
    head_parameters: int  # multiplied for sampled tokens only

    @property
    def weight_bytes(self) -> int:
        return 4 * (self.layer_parameters + self.head_parameters)


def layer_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(outputs, inputs) of one layer's matrices; products of the same input in one."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return [
        (q + 2 * kv, spec.hidden_size),
        (spec.hidden_size, q),
        (2 * spec.intermediate_size, spec.hidden_size),
        (spec.hidden_size, spec.intermediate_size),
    ]


def work_of(spec: ModelSpec) -> Work:
    layer = sum(outputs * inputs for outputs, inputs in layer_shapes(spec))
    return Work(layer_parameters=spec.num_layers * layer, head_parameters=spec.vocab_size * spec.hidden_size)


def measure(spec: ModelSpec) -> Machine:
    """The best of some tries, about a second, on all cores: whatever else the machine does makes it look slower."""
    pairs = [(torch.randn(ROWS, inputs), torch.randn(outputs, inputs)) for outputs, inputs in layer_shapes(spec)]
    operations = sum(2 * ROWS * weight.numel() for _, weight in pairs)
    large = torch.ones(READ_BYTES // 4)
    with torch.inference_mode():
        products_s = _best_s(lambda: [torch.nn.functional.linear(x, weight) for x, weight in pairs])
        read_s = _best_s(large.sum)
    return Machine(flops=operations / products_s, bytes_per_s=READ_BYTES / read_s)


def _best_s(action: Callable[[], object]) -> float:
    action()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def limit_tokens_per_s(
    machine: Machine, work: Work, *, prompt_tokens: float, output_tokens: int, concurrency: int
) -> float:
    """Output tokens a second, prefill included: all prompts, then iterations with one token of each request."""

    def seconds(layer_tokens: float, head_tokens: float) -> float:
        products = 2 * (work.layer_parameters * layer_tokens + work.head_parameters * head_tokens) / machine.flops
        return max(products, work.weight_bytes / machine.bytes_per_s)

    prefill = seconds(concurrency * prompt_tokens, concurrency)
    decode = (output_tokens - 1) * seconds(concurrency, concurrency)
    return concurrency * output_tokens / (prefill + decode)
