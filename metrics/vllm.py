"""Where vLLM's processes meet: a directory with one tally a process, which every API server reads when it is scraped.

The launcher makes the directory and names it in the environment. A process's tally has the layout of our own engine or
API server, so that the same code writes and exposes it; what it depends on, the core's facts, lie beside it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from metrics.bulkhead import Bulkhead
from metrics.catalogue import VLLM_API_SERVER, VLLM_ENGINE, parse_overrides
from metrics.files import TallyStore, tally_path
from metrics.layout import Layout, Shape, build_layout
from metrics.tally import Tally

DIRECTORY_VARIABLE: Final = "WHOLEBATCH_VLLM_DIRECTORY"
MAX_SERVERS: Final = 1024
_FACTS: Final = re.compile(rf"{VLLM_ENGINE}-(\d+)\.json")


class HookError(RuntimeError):
    """Our part cannot work in this process; the text says why, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreFacts:
    """What an engine core's series depend on: the label model_name, and the operator's histogram bounds as vLLM's
    --custom-histogram-buckets writes them."""

    model_name: str
    custom_buckets: Mapping[str, list[float]]

    def layout(self) -> Layout:
        """Raises BucketError."""
        overrides = parse_overrides(json.dumps({"iteration_tokens": self.custom_buckets["iteration_tokens"]}))
        return build_layout(VLLM_ENGINE, _shape(overrides))

    @classmethod
    def of(cls, model_name: str, custom_buckets: Mapping[str, Any], defaults: list[float]) -> CoreFacts:
        """`defaults` are vLLM's bounds of iteration_tokens, where the operator gave none."""
        return cls(
            model_name=model_name,
            custom_buckets={"iteration_tokens": list(custom_buckets.get("iteration_tokens") or defaults)},
        )


def _shape(overrides: Any = ()) -> Shape:
    return Shape(num_engines=1, num_api_servers=1, max_model_len=1, bucket_overrides=overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """One engine core that counts, as an API server finds it."""

    index: int
    facts: CoreFacts


def directory() -> str:
    """The directory of this vLLM; raises HookError where nobody made one."""
    found = os.environ.get(DIRECTORY_VARIABLE, "")
    if not os.path.isdir(found):
        raise HookError(f"{DIRECTORY_VARIABLE} names no directory: start vLLM by `wholebatch-vllm serve`")
    return found


def open_core(index: int, facts: CoreFacts) -> TallyStore:
    """The tally of this engine core, its facts beside it. Raises StoreError, OSError, BucketError, HookError."""
    place = directory()
    store = _open(tally_path(place, VLLM_ENGINE, index), facts.layout())
    unfinished = Path(place, f"{VLLM_ENGINE}-{index}.json.new")
    unfinished.write_text(json.dumps(asdict(facts)))
    unfinished.replace(unfinished.with_suffix(""))
    return store


def claim_server() -> tuple[int, TallyStore]:
    """The first index that no other API server has, and its tally. Raises StoreError, OSError, HookError."""
    place = directory()
    for index in range(MAX_SERVERS):
        try:
            os.close(os.open(f"{place}/{VLLM_API_SERVER}-{index}.claim", os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            continue
        return index, _open(tally_path(place, VLLM_API_SERVER, index), server_layout())
    raise HookError(f"{place} holds {MAX_SERVERS} API servers already")


def server_layout() -> Layout:
    """The layout of every API server's tally."""
    return build_layout(VLLM_API_SERVER, _shape())


def _open(path: str, layout: Layout) -> TallyStore:
    """A core that starts again with the same index goes on counting: the wall clock orders its incarnations."""
    now = time.time()
    return TallyStore.open(path, layout, incarnation=int(now * 1000), now_unix=now)


def find_cores() -> Iterator[Core]:
    """Every engine core that counts, by index. Raises OSError, HookError, ValueError."""
    place = directory()
    for index in sorted(int(found[1]) for name in os.listdir(place) if (found := _FACTS.fullmatch(name))):
        facts = json.loads(Path(place, f"{VLLM_ENGINE}-{index}.json").read_text())
        yield Core(index=index, facts=CoreFacts(**facts))


def find_servers() -> list[int]:
    """Every API server's index. Raises OSError, HookError."""
    suffix = ".tally"
    names = [name for name in os.listdir(directory()) if name.startswith(VLLM_API_SERVER) and name.endswith(suffix)]
    return sorted(int(name.removeprefix(f"{VLLM_API_SERVER}-").removesuffix(suffix)) for name in names)


def hook_bulkhead(tally: Tally, logger: logging.Logger) -> Bulkhead:
    """Counts the faults of our part in this process's tally."""

    def count(where: str) -> None:
        tally.inc(tally.layout.cell("wholebatch:vllm_hook_errors_total", where=where))

    return Bulkhead(count, logger)
