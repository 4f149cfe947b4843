"""Tokenizers small enough to reason about: every byte is a token, and a few words."""

from __future__ import annotations

from typing import Any

from engine.vocabulary.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, gguf_tokenizer
from engine.vocabulary.token_bytes import _byte_level_alphabet
from frontend.text.tokenizer import Tokenizer

ALPHABET = sorted(_byte_level_alphabet(), key=_byte_level_alphabet().__getitem__)
END = 256
START = 257
TEMPLATE = "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}<end>{% endfor %}<start>assistant:"


def byte_level_metadata(pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """Token n is byte n; 256 is <end>, 257 is <start>, both special; 258 is a word, 259 a user's own token."""
    tokens = [*ALPHABET, "<end>", "<start>", "he", "[own]"]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [NORMAL] * 256 + [CONTROL, CONTROL, NORMAL, USER_DEFINED],
        "merges": ["h e"],
        "eos_token_id": END,
        "bos_token_id": START,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": TEMPLATE}


def byte_level_tokenizer(**more: Any) -> Tokenizer:
    return Tokenizer(gguf_tokenizer(byte_level_metadata(**more)))


LETTERS = {"▁": -9.0, "a": -9.0, "b": -9.0, "c": -9.0}
WORDS = LETTERS | {"ab": -2.0, "bc": -1.0, "abc": -3.0, "▁a": -4.0, "▁abc": -5.0}


def sentencepiece_metadata(words: dict[str, float] = WORDS, **more: Any) -> dict[str, Any]:
    """Tokens 3 to 258 are the bytes; then letters and words whose scores say the order of merging."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *words]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + list(words.values()),
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def sentencepiece_tokenizer(**more: Any) -> Tokenizer:
    return Tokenizer(gguf_tokenizer(sentencepiece_metadata(**more)))
