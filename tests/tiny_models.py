"""Tiny random models in Hugging Face directories, complete enough to serve: weights, tokenizer, chat template.

Made from a seed, in well under a second, without a network. `python -m tests.tiny_models DIRECTORY [FAMILY]` writes
one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "An iteration is one pass of the model over one scheduled batch; it is also called an engine step.",
    "system user assistant: once upon a time there was a server that knew what it had done.",
    "0 1 2 3 4 5 6 7 8 9, to be or not to be, that is the question; the rest is silence.",
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
# What sets each family's config.json apart from plain Llama's.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama3": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
    },
}


def write_tiny_llama(  # noqa: PLR0913  the fields of config.json, each by name and with a default
    directory: Path | str,
    *,
    family: str = "llama",
    hidden: int = 64,
    layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate: int = 128,
    vocab_size: int = 512,
    seed: int = 0,
    max_position: int = 2048,
    dtype: torch.dtype = torch.float32,
    tokenizer: tokenizers.Tokenizer | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of one family; `overrides` go into config.json. The same arguments give the same bytes.
    A tokenizer that is given must have `vocab_size` tokens; else one is trained."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or _train_tokenizer(vocab_size)
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "torch_dtype": str(dtype).removeprefix("torch."),
        **FAMILIES[family],
        **overrides,
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": max_position,
        },
    )
    save_file(_random_weights(config, family, seed, dtype), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def _train_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that can write any text; ids that training leaves over get words nobody writes."""
    assert vocab_size >= 300, "256 bytes, two special tokens and some merges"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([f"qzx{number}" for number in range(vocab_size - tokenizer.get_vocab_size())])
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    return tokenizer


def _random_weights(config: dict[str, Any], family: str, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        # Rows this long keep logits some units apart, so that greedy decoding meets few ties.
        drawn: torch.Tensor = torch.randn(rows, columns, generator=generator) * 1.5 * columns**-0.5
        return drawn.to(dtype)

    def vector(size: int, mean: float) -> torch.Tensor:
        return (mean + 0.2 * torch.randn(size, generator=generator)).to(dtype)

    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": vector(hidden, 1.0),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden) * 2
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ):
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns)
            if family == "qwen2" and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                weights[f"{prefix}{name}.bias"] = vector(rows, 0.0)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = vector(hidden, 1.0)
        if family == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[f"{prefix}self_attn.{name}.weight"] = vector(head_dim, 1.0)
    return weights


if __name__ == "__main__":
    print(write_tiny_llama(sys.argv[1], family=sys.argv[2] if len(sys.argv) > 2 else "llama"))
