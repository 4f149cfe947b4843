"""A scheduled batch to sampled tokens: owns the model, the KV cache and the sampler. Knows no protocol, counts nothing.

`TorchRunner` implements `engine.schedule.batch.Runner`. The KV cache is one tensor,

    (num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim)     K at index 0, V at 1

reserved at start and, on a CPU, backed by memory only where it has been written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from engine.config import CacheConfig, ModelConfig, SchedulerConfig
from engine.device.constraints import Constraints
from engine.device.kernels import HAS_INT8, FlatBatch, Kernels, kernels_for
from engine.device.models import Decoder, FlatInput, decoder_for
from engine.device.sampler import Sampler
from engine.device.weights import ModelError, ModelSpec, RotatedCheckpoint, open_checkpoint
from engine.host import Share, share
from engine.schedule import Batch, SampledToken, SamplingParams, ScheduledSequence
from engine.vocabulary import load_parts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GIB = 2**30
_WARM_UP_TOKENS, _WARM_UP_SEQUENCES = 256, 64
# Tokens of one iteration. A CPU computes no faster from about 128 on, and every sequence waits for the whole of them:
# measured with 32 at once, 2048 and 512: 227 and 226 tokens/s, half of the first tokens within 2.9 and 1.2 s.
_SUITED_BUDGET = {"cpu": 512, "cuda": 2048}
# Of an iteration in which some decode, who wait for all of it.
_SUITED_ITERATION_S = {"cpu": 0.1, "cuda": None}
# With fewer, threads wait for one another longer than they compute, beside a busy API server. Measured, 64 streams on 2
# cores, one thread and two: 3.2 million 24,351 and 20,197 tokens/s, 10.2 million 7,112 and 8,679.
_FEW_WEIGHTS = 6_000_000
_GPU_CACHE_SHARE = 0.85  # of the GPU memory that is free once the weights are there; the rest is for activations


class TorchRunner:
    """One model on one device."""

    def __init__(
        self, model: Decoder, kernels: Kernels, kv_caches: torch.Tensor, sampler: Sampler, *, max_model_len: int
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._kv_caches = kv_caches
        self._sampler = sampler
        self._device = kv_caches.device
        self.num_blocks = kv_caches.shape[1]
        self.block_size = kv_caches.shape[2]
        self.max_model_len = max_model_len
        self.vocab_size = model.spec.vocab_size
        self.eos_token_ids = sampler.eos_token_ids
        self.cache_dtype = str(kv_caches.dtype).removeprefix("torch.")
        self.suited_budget = _SUITED_BUDGET[self._device.type]
        self.suited_iteration_s = _SUITED_ITERATION_S[self._device.type]

    @classmethod
    def load(  # noqa: PLR0913  what to load, then one option a way of starting
        cls,
        model: ModelConfig,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        *,
        max_model_len_fixed: int | None = None,
        num_blocks_fixed: int | None = None,
        num_threads: int | None = None,
        host_share: Share | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> TorchRunner:
        """Read the weights and reserve the cache. What an earlier engine of the deployment fixed is taken as it is.
        Threads on a CPU are `num_threads`, or else as many as suit the model, of `host_share` (None: all there is).

        Raises ModelError, one line for the operator.
        """
        host_share = host_share or share()
        device = _device(model.device)
        if device.type == "cpu":
            torch.set_num_threads(num_threads or host_share.num_cores)
        progress(f"loading {model.path}")
        checkpoint = open_checkpoint(model.path)
        spec = checkpoint.spec
        if device.type == "cpu" and num_threads is None and spec.num_matrix_weights < _FEW_WEIGHTS:
            torch.set_num_threads(1)
        max_model_len = _max_model_len(spec, model, max_model_len_fixed, progress)
        dtype = _dtype(model.dtype, spec, device)
        _check_quantization(model.quantization, dtype, device)
        progress(f"dtype {dtype}, quantization {model.quantization or 'none'}, on {device}".replace("torch.", ""))
        kernels = kernels_for(device, dtype)
        shape = (cache.block_size, 2, spec.num_kv_heads, spec.head_dim)
        block_bytes = spec.num_layers * math.prod(shape) * dtype.itemsize
        fit = partial(_fitting_blocks, cache, scheduler, max_model_len, block_bytes, num_blocks_fixed)
        fit(_cache_bytes(device, host_share))  # first, since what is made next grows with a context that a file states
        decoder = decoder_for(spec)(
            RotatedCheckpoint(checkpoint) if model.quantization else checkpoint,
            kernels,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            progress=progress,
            quantization=model.quantization,
        )
        num_blocks = fit(_cache_bytes(device, host_share))  # on a GPU fewer than before: the weights are there now
        kv_caches = _reserve((spec.num_layers, num_blocks, *shape), dtype, device)
        size = f"{num_blocks * block_bytes / _GIB:.2f} GiB"
        progress(f"KV cache: {num_blocks} blocks of {cache.block_size} tokens, {size}")
        known_ends = frozenset(token for token in spec.eos_token_ids if 0 <= token < spec.vocab_size)
        if known_ends != spec.eos_token_ids:
            progress(f"end tokens {sorted(spec.eos_token_ids - known_ends)} are beyond the vocabulary: ignored")
        constraints = Constraints(partial(load_parts, model.path), spec.vocab_size, known_ends)
        sampler = Sampler(decoder.head, seed=model.seed or 0, eos_token_ids=known_ends, constraints=constraints)
        runner = cls(decoder, kernels, kv_caches, sampler, max_model_len=max_model_len)
        progress("computing first batches; on a first start that compiles kernels, for some seconds")
        runner._warm_up()
        return runner

    def run(self, batch: Batch) -> list[SampledToken]:
        """Compute the batch. One sampled token per sequence with `samples`, in the batch's order."""
        sampled = [sequence for sequence in batch.sequences if sequence.samples]
        inputs = self._flatten(batch.sequences, len(sampled))
        if not sampled:
            self._model.forward(inputs, self._kv_caches)
            return []
        return self._sampler.sample(self._model.forward(inputs, self._kv_caches), sampled, batch.caught.append)

    def _warm_up(self) -> None:
        """Compile and load now what the first requests would wait for. It leaves traces in blocks that nobody owns."""
        longest = min(self.max_model_len, _WARM_UP_TOKENS)
        # A prefill, a long and a short decode, and so many at once that threads share what they do to the head.
        for start, length, count in ((0, longest, 1), (longest - 1, longest, 1), (1, 2, 1), (1, 2, _WARM_UP_SEQUENCES)):
            part = ScheduledSequence(
                sequence_id=0,
                token_ids=[0] * length,
                num_prompt_tokens=length,
                start=start,
                num_tokens=length - start,
                block_table=list(range(-(-length // self.block_size))),
                sampling=SamplingParams(max_tokens=1, temperature=0.0),
            )
            self.run(Batch([part] * count))

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget what is kept of these sequences, which have ended: their constraints."""
        self._sampler.release(sequence_ids)

    # --- from lists to tensors ---

    def _flatten(self, sequences: Sequence[ScheduledSequence], num_sampled: int) -> FlatInput:
        block_size = self.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for s in sequences:
            start, end, table = s.start, s.start + s.num_tokens, s.block_table
            if s.num_tokens == 1:
                token_ids.append(s.token_ids[start])
                positions.append(start)
                slots.append(table[start // block_size] * block_size + start % block_size)
            else:
                token_ids.extend(s.token_ids[start:end])
                positions.extend(range(start, end))
                slots.extend(_slots(table, start, end, block_size))
        query_starts = list(accumulate((s.num_tokens for s in sequences), initial=0))
        lengths = [s.start + s.num_tokens for s in sequences]
        flat = FlatBatch(query_starts=query_starts, lengths=lengths, block_tables=[s.block_table for s in sequences])
        rows = None
        if num_sampled != len(token_ids):
            rows = [query_starts[i + 1] - 1 for i, s in enumerate(sequences) if s.samples]
        return FlatInput(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            sampled_rows=None if rows is None else self._tensor(rows),
            plan=self._kernels.plan(flat, block_size),
        )

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.array(values, np.int64)).to(self._device)


def _slots(table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """The cache slots of positions [start, end)."""
    blocks = np.array(table[start // block_size : -(-end // block_size)])
    slots = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
    first = start % block_size
    found: list[int] = slots[first : first + end - start].tolist()
    return found


# --- what is decided once, at start ---


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda: there is no CUDA device here")
    if name not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r}: known are auto, cpu, cuda")
    return torch.device(name)


def _dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """`auto`: float32 on a CPU; on a GPU the published type, bfloat16 for float32."""
    if name != "auto":
        if name not in _DTYPES:
            raise ModelError(f"dtype {name!r}: known are auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if spec.dtype == torch.float32 else spec.dtype


def _check_quantization(name: str | None, dtype: torch.dtype, device: torch.device) -> None:
    if name is None:
        return
    if name != "int8":
        raise ModelError(f"quantization {name!r}: known is int8")
    if device.type != "cpu" or not HAS_INT8:
        raise ModelError("quantization int8: only on an x86 CPU with AVX2 for now (--device cpu)")
    if dtype != torch.float32:
        raise ModelError(f"quantization int8: not with dtype {str(dtype).removeprefix('torch.')}, only with float32")


def _max_model_len(spec: ModelSpec, model: ModelConfig, fixed: int | None, progress: Callable[[str], None]) -> int:
    """The longest sequence: what was fixed or asked for, if the model can do it, else all that it can.

    Attention here is always over the whole sequence. A model with a sliding window attends so too, up to the window.
    """
    wanted = model.max_model_len if fixed is None else fixed
    limit, reason = spec.max_positions, f"its {spec.max_positions} positions"
    if spec.sliding_window is not None and spec.sliding_window < limit:
        limit, reason = spec.sliding_window, f"its sliding window of {spec.sliding_window}, which is not supported"
    if wanted is None:
        if limit < spec.max_positions:
            progress(f"max_model_len is {limit}: {model.path} is held to {reason}")
        return limit
    if not 1 < wanted <= limit:
        raise ModelError(f"{model.path}: max_model_len {wanted} is not within 2 and {reason}")
    return wanted


def _num_blocks(
    cache: CacheConfig, scheduler: SchedulerConfig, max_model_len: int, block_bytes: int, cache_bytes: int
) -> int:
    """As many as were asked for; else those that `cache_bytes` hold, but no more than can be used."""
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes // block_bytes
    usable = scheduler.max_num_seqs * -(-max_model_len // cache.block_size)
    return min(cache_bytes // block_bytes, usable)


def _cache_bytes(device: torch.device, host_share: Share) -> int:
    """Memory for a KV cache whose size nobody chose."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_CACHE_SHARE)
    return min(4 * _GIB, host_share.num_bytes // 4)


def _fitting_blocks(
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    max_model_len: int,
    block_bytes: int,
    fixed: int | None,
    cache_bytes: int,
) -> int:
    """How many blocks the cache has; raises ModelError where they do not hold the longest sequence."""
    num_blocks = fixed or _num_blocks(cache, scheduler, max_model_len, block_bytes, cache_bytes)
    if num_blocks * cache.block_size >= max_model_len:
        return num_blocks
    block_size, needed = cache.block_size, -(-max_model_len // cache.block_size)
    raise ModelError(
        f"the KV cache holds {num_blocks * block_size} tokens ({num_blocks} blocks of {block_size}), less than one"
        f" sequence of max_model_len {max_model_len}: lower --max-model-len, or give it {needed} blocks"
        f" (--num-gpu-blocks-override {needed} or --kv-cache-memory-bytes {needed * block_bytes})"
    )


def _reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU from calloc, whose pages cost nothing until they are written; torch.zeros writes them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
