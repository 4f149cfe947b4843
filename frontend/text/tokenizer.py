"""Text to token ids and back, for one model: a Hugging Face directory or a GGUF file. Pure, but for reading the files.

Encoding is the `tokenizers` library's. Decoding is our own (`token_bytes`), because a stream needs each token's bytes.
The two ways to decode agree on valid UTF-8; where bytes of a SentencePiece model are no UTF-8, the library writes one
U+FFFD per byte of the whole run, which a stream cannot know in time, and we write what a UTF-8 decoder writes.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any, Final

import tokenizers
from tokenizers.decoders import Decoder

from frontend.text.chat_template import ChatTemplate, ChatTemplateError
from frontend.text.detokenizer import Detokenizer
from frontend.text.gguf_metadata import GGUFError, read_metadata
from frontend.text.gguf_tokenizer import SPACE, TokenizerError, TokenizerParts, gguf_tokenizer

__all__ = ["Tokenizer", "TokenizerError", "load_tokenizer"]

MAX_LINE: Final = 500  # characters of an error
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


class Tokenizer:
    """Encodes, decodes and renders conversations; nothing in it changes but a cache bounded by the vocabulary."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._tokenizer = parts.tokenizer
        to_bytes, self._drops_leading_space = _decoding(parts.tokenizer.decoder)
        added = parts.tokenizer.get_added_tokens_decoder()
        # An added token is written as plain text in a byte-level vocabulary, not in its alphabet.
        plain = added if to_bytes is _byte_level_bytes else {}
        own = _TokenBytes(parts.tokenizer.id_to_token, to_bytes)
        own.update({index: token.content.encode() for index, token in plain.items()})
        shown = _TokenBytes(parts.tokenizer.id_to_token, to_bytes)
        shown.update({index: b"" if token.special else own[index] for index, token in added.items()})
        self.token_bytes: Callable[[int], bytes] = own.__getitem__
        """A token's own bytes: maybe only part of a character; none for ids beyond the tokenizer's vocabulary, which
        a model padded for speed may sample."""
        self.shown_bytes: Callable[[int], bytes] = shown.__getitem__
        """`token_bytes`, but none for special tokens."""
        self.vocab_size: int = parts.tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_token_bytes = max(len(token.encode()) for token in parts.tokenizer.get_vocab())
        self.chat_template: ChatTemplate | None = None
        if parts.chat_template is not None:
            self.chat_template = ChatTemplate(parts.chat_template, parts.special_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens that are written out in it are those tokens. Releases the GIL, which the
        library's `encode` of one text holds: another thread waited 2 s for 400,000 characters (measured)."""
        (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """A whole text; bytes that are no UTF-8 become U+FFFD."""
        token_bytes = self.shown_bytes if skip_special_tokens else self.token_bytes
        text = b"".join(map(token_bytes, token_ids)).decode("utf-8", "replace")
        return text[1:] if self._drops_leading_space and text.startswith(" ") else text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """For tokens that continue a prompt, so that no leading space is dropped."""
        return Detokenizer(self.shown_bytes if skip_special_tokens else self.token_bytes)

    def can_fit(self, text: str, max_tokens: int) -> bool:
        """False only if `text` certainly has more tokens than `max_tokens`: no token is longer than the longest.
        A normaliser may shorten text, but not to a quarter."""
        shrinks = 1 if self._tokenizer.normalizer is None else 4
        return len(text) <= shrinks * max_tokens * self.max_token_bytes


def load_tokenizer(path: str) -> Tokenizer:
    """From a Hugging Face directory or a .gguf file. Raises TokenizerError, one line, whatever is wrong with the files:
    to start again would not help."""
    try:
        parts = _from_directory(path) if os.path.isdir(path) else gguf_tokenizer(read_metadata(path))
        return Tokenizer(parts)
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer: {error}") from error
    except (GGUFError, ChatTemplateError, TokenizerError) as error:
        raise TokenizerError(_one_line(error if path in str(error) else f"{path}: {error}")) from error
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise TokenizerError(_one_line(f"{path} has no tokenizer: {type(error).__name__}: {error}")) from error


def _one_line(what: object) -> str:
    """Jinja's errors quote the template, the library's may quote anything."""
    return " ".join(str(what).split())[:MAX_LINE]


def _from_directory(path: str) -> TokenizerParts:
    config = _read_json(os.path.join(path, "tokenizer_config.json"))
    file = os.path.join(path, "tokenizer.json")
    with open(file, "rb") as stream:
        raw = stream.read()
    tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TokenizerParts(
        tokenizer=tokenizer, special_tokens=_special_tokens(config), chat_template=_chat_template(path, config)
    )


def _read_json(path: str) -> dict[str, Any]:
    """An object, empty where the file does not exist."""
    try:
        with open(path, encoding="utf-8") as stream:
            value = json.load(stream)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise TokenizerError(f"{path} is nested too deep") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is no JSON object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; older files write a token as an object with its `content`."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _chat_template(path: str, config: dict[str, Any]) -> str | None:
    """The template's own file, else the configuration's: one text, or named ones of which `default` is meant."""
    file = os.path.join(path, "chat_template.jinja")
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    except FileNotFoundError:
        pass
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict)]
        if len(named) != len(template):
            raise TokenizerError(f"{path}: chat_template is a list of {reprlib.repr(template)}, not of named templates")
        template = next((each.get("template") for each in named if each.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{path}: chat_template is {reprlib.repr(template)}, not a text")
    return template
