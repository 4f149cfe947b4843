"""A model's vocabulary, read from its files: its tokenizer, and the bytes that each token stands for.

Street: work. API servers turn text into tokens and back with it, engines constrain what may be sampled. No tensors.
"""

from __future__ import annotations

from engine.vocabulary.files import load_parts, one_line
from engine.vocabulary.gguf_tokenizer import TokenizerError, TokenizerParts
from engine.vocabulary.token_bytes import token_bytes_of

__all__ = [
    "TokenizerError",
    "TokenizerParts",
    "load_parts",
    "one_line",
    "token_bytes_of",
]
