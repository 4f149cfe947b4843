"""vLLM's own scheduler classes, driven without a model: the test says what is sampled, and when a batch has run."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine.vllm import make_scheduler
from metrics.catalogue import VLLM_ENGINE
from metrics.files import TallyReader, tally_path
from metrics.vllm import CoreFacts

BLOCK_SIZE = 16
TOKEN = 7


@dataclass
class InFlight:
    """A batch that was scheduled, and which of its requests sample a token."""

    output: SchedulerOutput
    sampling: frozenset[str]


@dataclass
class Core:
    """An engine core without a model: schedules, and later says what came of it."""

    scheduler: Any
    directory: Path
    in_flight: deque[InFlight] = field(default_factory=deque)
    scheduled: list[int] = field(default_factory=list)  # tokens of each batch that had any: an independent witness
    num_generated: int = 0
    num_run: int = 0  # batches with tokens

    def add(self, request_id: str, num_prompt: int, max_tokens: int, *, first_token: int = 3, **options: Any) -> None:
        params = SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **options})
        params.update_from_generation_config({}, 1)
        prompt = [first_token + position for position in range(num_prompt)]
        self.scheduler.add_request(Request(request_id, prompt, params, None, block_hasher=self.block_hasher))

    block_hasher: Any = None

    def schedule(self) -> SchedulerOutput:
        output: SchedulerOutput = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self.scheduled.append(output.total_num_scheduled_tokens)
        requests = self.scheduler.requests
        sampling = {name for name in output.num_scheduled_tokens if not requests[name].is_prefill_chunk}
        self.in_flight.append(InFlight(output, frozenset(sampling)))
        return output

    def update(self, accepted: int = 0, drafts: int = 0, token: int = TOKEN) -> None:
        """The oldest batch has run: of each sequence's drafts so many were accepted, and so many are drafted next."""
        batch = self.in_flight.popleft()
        names = list(batch.output.num_scheduled_tokens)
        self.num_run += bool(names)
        sampled = [
            [token] * (1 + min(accepted, len(batch.output.scheduled_spec_decode_tokens.get(name, ()))))
            if name in batch.sampling
            else []
            for name in names
        ]
        answers = self.scheduler.update_from_output(
            batch.output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        self.num_generated += sum(len(one.new_token_ids) for answer in answers.values() for one in answer.outputs)
        if drafts:
            going = [name for name in names if name in self.scheduler.requests]
            self.scheduler.update_draft_token_ids(DraftTokenIds(going, [[TOKEN] * drafts for _ in going]))

    def step(self, **kwargs: int) -> None:
        self.schedule()
        self.update(**kwargs)

    def run(self, **kwargs: int) -> None:
        while self.scheduler.has_unfinished_requests():
            self.step(**kwargs)

    def drain(self) -> None:
        while self.in_flight:
            self.update()

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def figures(self) -> dict[str, float]:
        """What the file says."""
        layout = CoreFacts(model_name="m", custom_buckets={"iteration_tokens": BOUNDS}).layout()
        cells = TallyReader(tally_path(str(self.directory), VLLM_ENGINE, 0), layout).read().cells

        def histogram(name: str) -> tuple[float, float]:
            found = layout.histogram(name)
            end = found.offset + len(found.bounds) + 1
            return float(cells[found.offset : end].sum()), float(cells[end])

        count, tokens = histogram("vllm:iteration_tokens_total")
        errors = [s for s in layout.series if s.metric.name == "wholebatch:vllm_hook_errors_total"]
        return {
            "iterations": count,
            "tokens": tokens,
            "scheduled": histogram("wholebatch:iteration_scheduled_tokens")[1],
            "prefill": histogram("wholebatch:iteration_prefill_tokens")[1],
            "decode": histogram("wholebatch:iteration_decode_tokens")[1],
            "preemptions": histogram("wholebatch:iteration_preemptions")[1],
            "computed": cells[layout.cell("wholebatch:prompt_tokens_computed_total")],
            "recomputed": cells[layout.cell("wholebatch:recomputed_tokens_total")],
            "generated": cells[layout.cell("vllm:generation_tokens_total")],
            "errors": sum(float(cells[s.offset]) for s in errors),
        }

    def check(self) -> dict[str, float]:
        """What holds at any time, against what the driver saw itself; returns the figures."""
        found = self.figures()
        assert found["errors"] == 0
        assert found["iterations"] == self.num_run
        assert found["scheduled"] == sum(self.scheduled[: self.num_run])
        assert found["generated"] == self.num_generated
        assert found["scheduled"] == found["prefill"] + found["decode"]
        assert found["prefill"] == found["computed"] + found["recomputed"]
        assert found["tokens"] == found["computed"] + found["recomputed"] + found["generated"]
        return found


BOUNDS = [1.0, 8.0, 64.0]


def make_core(  # noqa: PLR0913  the ways to run it, each by name
    model: Path,
    directory: Path,
    *,
    is_async: bool = False,
    budget: int = 512,
    num_blocks: int = 1000,
    stages: int = 1,
    speculative: dict[str, Any] | None = None,
    prefix_caching: bool = False,
) -> Core:
    """`directory` is where the processes of this vLLM meet; it stands in the environment."""
    model_config = ModelConfig(model=str(model), dtype="float32", seed=0, served_model_name="m", max_model_len=2048)
    config = VllmConfig(
        model_config=model_config,
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=prefix_caching),
        scheduler_config=SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=budget,
            max_model_len=2048,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=is_async,
            scheduler_cls="engine.vllm.make_scheduler",
        ),
        parallel_config=ParallelConfig(pipeline_parallel_size=stages),
        device_config=DeviceConfig("cpu"),
        speculative_config=speculative,
    )
    config.observability_config.custom_histogram_buckets = {"iteration_tokens": BOUNDS}
    config.cache_config.num_gpu_blocks = num_blocks
    config.scheduler_config.async_scheduling = is_async  # which the CPU's platform takes back
    hasher = None
    if prefix_caching:
        init_none_hash(sha256)
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.float32)
    scheduler = make_scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=True,
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )
    return Core(scheduler, directory, block_hasher=hasher)
