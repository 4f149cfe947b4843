"""What `--quantization int8` costs in quality: the same text read with float32 and with int8 weights.

    python -m tests.benchmarks.quantization [--model PATH] [--num-tokens 4096]

The text is always the same, an early README of this project, in windows of 512 tokens. Each position is told the true
tokens before it; *agreement* is the share of positions where both find the same token most probable.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from engine import default_model
from engine.device.kernels import kernels_for
from engine.device.kernels.interface import FlatBatch
from engine.device.models.llama import FlatInput, LlamaModel
from engine.device.weights.load import open_checkpoint
from engine.device.weights.rotation import RotatedCheckpoint
from frontend.text.tokenizer import load_tokenizer
from tests.benchmarks.report import document, table

TEXT = Path(__file__).parent.parent / "data" / "prose.md"
WINDOW = 512
BLOCK_SIZE = 16
CPU = torch.device("cpu")


def load(path: str, quantization: str | None) -> LlamaModel:
    checkpoint = open_checkpoint(path)
    return LlamaModel(
        RotatedCheckpoint(checkpoint) if quantization else checkpoint,
        kernels_for(CPU, torch.float32),
        dtype=torch.float32,
        device=CPU,
        max_model_len=WINDOW,
        progress=lambda line: None,
        quantization=quantization,
    )


def logits_of(model: LlamaModel, tokens: list[int]) -> torch.Tensor:
    """The logits of every position: (num_tokens, vocab)."""
    spec, length = model.spec, len(tokens)
    blocks = list(range(-(-length // BLOCK_SIZE)))
    batch = FlatBatch(query_starts=[0, length], lengths=[length], block_tables=[blocks])
    inputs = FlatInput(
        token_ids=torch.tensor(tokens),
        positions=torch.arange(length),
        slots=torch.arange(length),
        sampled_rows=None,
        plan=kernels_for(CPU, torch.float32).plan(batch, BLOCK_SIZE),
    )
    caches = torch.zeros(spec.num_layers, len(blocks), BLOCK_SIZE, 2, spec.num_kv_heads, spec.head_dim)
    return model.head.logits(model.forward(inputs, caches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="(the default model)")
    parser.add_argument("--num-tokens", type=int, default=4096)
    args = parser.parse_args()
    path = args.model or str(default_model.fetch())
    tokens = load_tokenizer(path).encode(TEXT.read_text(), add_special_tokens=False)[: args.num_tokens]
    windows = [tokens[i : i + WINDOW] for i in range(0, len(tokens), WINDOW)]
    models = {"float32": load(path, None), "int8": load(path, "int8")}
    losses = dict.fromkeys(models, 0.0)
    num_equal = num_positions = 0
    for window in windows:
        best = []
        for name, model in models.items():
            logits = logits_of(model, window)[:-1]
            losses[name] += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
            best.append(logits.argmax(-1))
        num_equal += int((best[0] == best[1]).sum())
        num_positions += len(window) - 1
    perplexities = {name: math.exp(loss / num_positions) for name, loss in losses.items()}
    agreement = num_equal / num_positions
    rows = [
        ("float32", f"{perplexities['float32']:.3f}", ""),
        ("int8", f"{perplexities['int8']:.3f}", f"{agreement:.2%}"),
    ]
    table(f"{num_positions} predicted tokens", ("weights", "perplexity", "agreement of the best token"), rows)
    document("quantization", {"positions": num_positions, "perplexity": perplexities, "agreement": agreement})


if __name__ == "__main__":
    main()
