"""The bytes that each token stands for. Pure.

A byte-level vocabulary writes bytes in an alphabet of its own, a SentencePiece one spaces as a sign and single bytes as
`<0x0A>`. The bytes are what a stream is decoded from, and what a constraint looks at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import tokenizers
from tokenizers.decoders import Decoder

from engine.vocabulary.gguf_tokenizer import SPACE, TokenizerError

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: itself where it is one, else the next from U+0100.
    Source: GPT-2's encoder."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_ALPHABET: Final = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()  # not written in the alphabet: a token added as plain text


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def _decoding(decoder: Decoder | None) -> tuple[Callable[[str], bytes], bool]:
    """(a token's bytes from its text, whether a leading space of a whole text is dropped)."""
    state: dict[str, Any] = {} if decoder is None else json.loads(decoder.__getstate__())
    steps = {step["type"]: step for step in state.get("decoders", [state]) if step}
    if "ByteLevel" in steps:
        return _byte_level_bytes, False
    if "Metaspace" in steps:
        return _sentencepiece_bytes, steps["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in steps:
        return _sentencepiece_bytes, steps.get("Strip", {}).get("start", 0) > 0
    raise TokenizerError(f"the tokenizer's decoder is {list(steps) or None}, known are byte level and SentencePiece")


class _TokenBytes(dict[int, bytes]):
    """Each token's bytes, found when it is first asked for; bounded by the vocabulary."""

    def __init__(self, id_to_token: Callable[[int], str | None], to_bytes: Callable[[str], bytes]) -> None:
        super().__init__()
        self._id_to_token = id_to_token
        self._to_bytes = to_bytes

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id)
        found = self[token_id] = b"" if token is None else self._to_bytes(token)
        return found


def token_bytes_of(tokenizer: tokenizers.Tokenizer) -> tuple[dict[int, bytes], dict[int, bytes], bool]:
    """Of each token the bytes that it stands for, and those that are shown, none for a special token: both found when
    they are first asked for, none for ids beyond the vocabulary. And whether a leading space of a whole text is
    dropped. Raises TokenizerError."""
    to_bytes, drops_leading_space = _decoding(tokenizer.decoder)
    added = tokenizer.get_added_tokens_decoder()
    # An added token is written as plain text in a byte-level vocabulary, not in its alphabet.
    plain = added if to_bytes is _byte_level_bytes else {}
    own = _TokenBytes(tokenizer.id_to_token, to_bytes)
    own.update({index: token.content.encode() for index, token in plain.items()})
    shown = _TokenBytes(tokenizer.id_to_token, to_bytes)
    shown.update({index: b"" if token.special else own[index] for index, token in added.items()})
    return own, shown, drops_leading_space
