"""The models that both sides of a comparison serve, as Hugging Face directories, which any engine reads.

    python -m tests.benchmarks.export_model DIRECTORY [--tiny]

The default model's own weights, dequantised to float32, with its tokenizer; or with --tiny random ones of one layer and
hidden size 64 under the same tokenizer and vocabulary, which leave next to nothing to compute: so that what is
measured is everything around the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from engine import default_model
from tests.greedy import export_gguf
from tests.tiny_models import write_tiny_llama


def save_tokenizer(directory: Path) -> Tokenizer:
    """Save the default model's tokenizer, with its chat template, out of the GGUF file."""
    from transformers import AutoTokenizer  # seconds, and only this needs it

    source = default_model.fetch()
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(str(directory))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def write_default_model(directory: Path) -> Path:
    """Write the default model in float32."""
    export_gguf(default_model.fetch(), directory)
    save_tokenizer(directory)
    return directory


def write_tiny_model(directory: Path) -> Path:
    """Heads of 32, the smallest that other engines' kernels take."""
    tokenizer = save_tokenizer(directory)
    return write_tiny_llama(
        directory,
        hidden=64,
        layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate=128,
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer=tokenizer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tiny", action="store_true", help="the random model instead of the default one")
    args = parser.parse_args()
    print((write_tiny_model if args.tiny else write_default_model)(args.directory))


if __name__ == "__main__":
    main()
