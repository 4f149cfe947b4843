"""llama.cpp on the default model's GGUF file: sequences of 167 prompt and 64 generated tokens, without HTTP.

It runs in an environment of its own, which nothing of ours depends on:

    python3 -m venv DIRECTORY
    DIRECTORY/bin/pip install llama-cpp-python==0.3.36 psutil      # compiles llama.cpp for this processor
    DIRECTORY/bin/python -m tests.benchmarks.llama_cpp MODEL.gguf

Low-level batch calls, as a server would make them: all prompts in batches of 2048 tokens, logits of their last tokens
only; then one token of every sequence at a time, the likeliest next. The weights stay in the file's 4 bits.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from tests.benchmarks.report import document, table

PROMPT_TOKENS, OUTPUT_TOKENS = 167, 64
BATCH_TOKENS = 2048


class Context:
    """A model with room for so many sequences."""

    def __init__(self, model: Any, num_sequences: int, num_threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = num_sequences
        params.n_ctx = num_sequences * 256
        params.n_batch, params.n_ubatch = BATCH_TOKENS, 512
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def run(self, tokens: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, are logits wanted) of at most a batch -> the likeliest next tokens."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, (token, position, sequence, is_wanted) in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = is_wanted
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: {status}"
        wanted = (place for place, token in enumerate(tokens) if token[3])
        return [int(self._logits(place).argmax()) for place in wanted]

    def _logits(self, place: int) -> np.ndarray:
        found = llama_cpp.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(found, shape=(self._vocab_size,))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


def measure(context: Context, num_sequences: int, seed: int) -> dict[str, float]:
    """Measure one round."""
    source = random.Random(seed)
    prompts = [[source.randrange(300, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(num_sequences)]
    queue = [
        (token, position, sequence, position == PROMPT_TOKENS - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    context.clear()
    began = time.perf_counter()
    newest: list[int] = []
    for start in range(0, len(queue), BATCH_TOKENS):
        newest += context.run(queue[start : start + BATCH_TOKENS])
    prefilled = time.perf_counter()
    for position in range(PROMPT_TOKENS, PROMPT_TOKENS + OUTPUT_TOKENS - 1):
        newest = context.run([(token, position, sequence, True) for sequence, token in enumerate(newest)])
    ended = time.perf_counter()
    return {
        "tokens_per_s": num_sequences * OUTPUT_TOKENS / (ended - began),
        "decode_tokens_per_s": num_sequences * (OUTPUT_TOKENS - 1) / (ended - prefilled),
        "prefill_tokens_per_s": len(queue) / (prefilled - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 32], help="(1 8 32)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(all cores)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    params = llama_cpp.llama_model_default_params()
    # NOTE: with them, its AMX products of two rows and more end in a fault (llama.cpp issue 20824, met with 0.3.36).
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(args.model).encode(), params)
    rows = []
    for number in args.sequences:
        context = Context(model, number, args.threads)
        context.run([(1, position, 0, position == 7) for position in range(8)])  # a warm-up
        rounds = [measure(context, number, seed) for seed in range(args.rounds)]
        context.close()
        medians = {figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]}
        rows.append({"sequences": number, **medians})
    table(
        f"llama.cpp ({llama_cpp.__version__} of its Python binding), {args.threads} threads; median of {args.rounds}",
        ("sequences", "output tokens/s", "decode alone, tokens/s", "prefill alone, tokens/s"),
        [(row["sequences"], *(f"{value:.1f}" for value in list(row.values())[1:])) for row in rows],
    )
    document("llama_cpp", rows)


if __name__ == "__main__":
    main()
