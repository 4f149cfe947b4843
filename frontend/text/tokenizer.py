"""Text to token ids and back, for one model: a Hugging Face directory or a GGUF file. Pure, but for reading the files.

Encoding is the `tokenizers` library's. Decoding is our own (`token_bytes`), because a stream needs each token's bytes.
The two ways to decode agree on valid UTF-8; where bytes of a SentencePiece model are no UTF-8, the library writes one
U+FFFD per byte of the whole run, which a stream cannot know in time, and we write what a UTF-8 decoder writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import tokenizers

from engine.vocabulary import TokenizerError, TokenizerParts, load_parts, one_line, token_bytes_of
from frontend.text.chat_template import ChatTemplate, ChatTemplateError
from frontend.text.control_tokens import ControlTokens, Hidden
from frontend.text.detokenizer import Detokenizer

__all__ = ["Tokenizer", "TokenizerError", "load_tokenizer"]


class Tokenizer:
    """Encodes, decodes and renders conversations; nothing in it changes but a cache bounded by the vocabulary."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._tokenizer = parts.tokenizer
        own, shown, self._drops_leading_space = token_bytes_of(parts.tokenizer)
        self.token_bytes: Callable[[int], bytes] = own.__getitem__
        """A token's own bytes: maybe only part of a character; none for ids beyond the tokenizer's vocabulary, which
        a model padded for speed may sample."""
        self.shown_bytes: Callable[[int], bytes] = shown.__getitem__
        """`token_bytes`, but none for special tokens."""
        self.vocab_size: int = parts.tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_token_bytes = max(len(token.encode()) for token in parts.tokenizer.get_vocab())
        added = parts.tokenizer.get_added_tokens_decoder().values()
        self.control_tokens = ControlTokens(token.content for token in added if token.special)
        self.chat_template: ChatTemplate | None = None
        if parts.chat_template is not None:
            self.chat_template = ChatTemplate(parts.chat_template, parts.special_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens that are written out in it are those tokens. Releases the GIL, which the
        library's `encode` of one text holds: another thread waited 2 s for 400,000 characters (measured)."""
        (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        return ids

    def encode_rendered(self, text: str, hidden: Hidden) -> list[int]:
        """Token ids of a rendered conversation, of which some texts are hidden: these are plain text whatever they look
        like. The first call takes some tenths of a second."""
        parts = self.control_tokens.cut(text)
        plain = [hidden.restore(part) for part, is_control in parts if not is_control]
        encoded = iter(self._plain_tokenizer.encode_batch_fast(plain, add_special_tokens=False))
        ids: list[int] = []
        for part, is_control in parts:
            token = self._tokenizer.token_to_id(part) if is_control else None
            ids += next(encoded).ids if token is None else [token]
        return ids

    @functools.cached_property
    def _plain_tokenizer(self) -> tokenizers.Tokenizer:
        """To which no text is a control token."""
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

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
    parts = load_parts(path)
    try:
        return Tokenizer(parts)
    except (ChatTemplateError, TokenizerError) as error:
        raise TokenizerError(one_line(error if path in str(error) else f"{path}: {error}")) from error
