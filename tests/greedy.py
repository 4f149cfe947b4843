"""Greedy decoding twice, by transformers and by this engine, and what it takes to compare the two.

A difference where the reference's two best logits lie within `TIE` is a tie, not a fault: float32 sums in another
order.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.config import CacheConfig, ModelConfig, SchedulerConfig
from engine.device.runner import TorchRunner
from engine.device.weights.gguf_checkpoint import GGUFCheckpoint
from engine.loop.core import EngineCore
from engine.schedule.batch import Runner
from engine.schedule.block_pool import BlockPool
from engine.schedule.record import Recorder
from engine.schedule.scheduler import Scheduler
from engine.wire import Submit
from engine.wire.sampling import SamplingParams
from metrics.bulkhead import Bulkhead
from metrics.catalogue import ENGINE
from metrics.layout import Shape, build_layout
from metrics.tally import Tally
from tests.fakes import FakeClock

TIE = 0.001
API_SERVER = (0, 1)


@dataclass(frozen=True, slots=True)
class Expected:
    """The reference's continuation of one prompt, and at each position how far the best logit leads the second."""

    token_ids: list[int]
    leads: list[float]


@dataclass
class Comparison:
    """Continuations compared with what was expected of them."""

    num_equal: int = 0
    ties: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, name: str, expected: Expected, actual: Sequence[int]) -> None:
        for position, (want, got) in enumerate(zip(expected.token_ids, actual, strict=True)):
            if want != got:
                lead = expected.leads[position]
                text = f"{name}: position {position}: {got} for {want}, which led by {lead:.6f}"
                (self.ties if lead < TIE else self.faults).append(text)
                return
        self.num_equal += 1


class Reference:
    """transformers on a Hugging Face directory, float32."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM  # seconds, and only tests have it

        self._model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()

    @torch.inference_mode()
    def continue_greedily(self, prompt: Sequence[int], num_tokens: int) -> Expected:
        """Past end tokens too."""
        tokens: list[int] = []
        leads: list[float] = []
        cache = None
        step = list(prompt)
        for _ in range(num_tokens):
            out = self._model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            best = out.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            leads.append(float(best.values[0] - best.values[1]))
            step = tokens[-1:]
        return Expected(tokens, leads)

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """Of every position: (num_tokens, vocab)."""
        logits: torch.Tensor = self._model(input_ids=torch.tensor([list(prompt)])).logits[0]
        return logits


def load_runner(path: Path | str, *, num_blocks: int = 512, block_size: int = 16, **model: object) -> TorchRunner:
    """The engine's side, on the threads that torch has now."""
    return TorchRunner.load(
        ModelConfig(path=str(path), dtype="float32", **model),  # type: ignore[arg-type]
        CacheConfig(block_size=block_size, num_gpu_blocks_override=num_blocks),
        SchedulerConfig(),
        num_threads=torch.get_num_threads(),
    )


class Engine:
    """An EngineCore around a runner that may outlive it; its prefix cache stays warm from call to call."""

    def __init__(
        self,
        runner: TorchRunner,
        scheduler: SchedulerConfig | None = None,
        *,
        caches: bool = False,
        num_blocks: int | None = None,
        stand_in: Runner | None = None,
    ) -> None:
        pool = BlockPool(num_blocks or runner.num_blocks, runner.block_size, caches)
        layout = build_layout(ENGINE, Shape(num_engines=1, num_api_servers=1, max_model_len=runner.max_model_len))
        self.tally = Tally(layout)
        self._scheduler = Scheduler(
            scheduler or SchedulerConfig(),
            pool,
            max_model_len=runner.max_model_len,
            eos_token_ids=runner.eos_token_ids,
            vocab_size=runner.vocab_size,
        )
        recorder = Recorder(self.tally, layout, 1)
        bulkhead = Bulkhead(recorder.faulted, logging.getLogger(__name__))
        self._core = EngineCore(self._scheduler, stand_in or runner, recorder, FakeClock(), bulkhead)
        self._next_id = 0
        self.num_preemptions = 0

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[int]]:
        """All prompts at once; the continuations, in their order."""
        first = self._next_id
        tokens: list[list[int]] = [[] for _ in prompts]
        for prompt in prompts:
            self._core.submit(API_SERVER, Submit(self._next_id, 1, list(prompt), sampling, 0), 0.0)
            self._next_id += 1
        while self._core.has_work:
            for outputs in self._core.step().values():
                for output in outputs.outputs:
                    tokens[output.request_id - first] += output.token_ids
                    if output.start is not None:
                        self.num_preemptions += output.start.num_preemptions > 0
                    if output.finish is not None:
                        assert output.finish.reason in ("length", "stop"), output.finish
        return tokens


def greedily(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(vocab_size) for _ in range(length)] for length in lengths]


def export_gguf(path: Path, directory: Path) -> Path:
    """The same weights, dequantised, as a Hugging Face directory that transformers reads."""
    checkpoint = GGUFCheckpoint(path)
    spec = checkpoint.spec
    hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = {"model.embed_tokens.weight": (spec.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (q, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, q),
            f"{prefix}mlp.gate_proj.weight": (spec.intermediate_size, hidden),
            f"{prefix}mlp.up_proj.weight": (spec.intermediate_size, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, spec.intermediate_size),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
        }
    assert spec.ties_embeddings, "the default model ties its embeddings"
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: checkpoint.tensor(name, shape).contiguous() for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": True,
        "eos_token_id": sorted(spec.eos_token_ids),
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory
