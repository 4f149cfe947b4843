"""A tokenizer out of a GGUF file's metadata: token texts, types, merges or scores, and the pre-tokenizer's name. Pure.

Two models: `gpt2` is byte-level BPE with the file's merges; `llama` is SentencePiece BPE, whose merges follow from the
scores, with single bytes for what has no token.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from engine.vocabulary.pre_tokenizers import PRE_TOKENIZERS

# Values of tokenizer.ggml.token_type. Source: the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE: Final = "▁"  # how SentencePiece writes a space


class TokenizerError(ValueError):
    """No tokenizer can be made of what the model's files say; the text names what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a model's files say about text, whichever format they have."""

    tokenizer: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # "bos_token" and the like, as chat templates know them
    chat_template: str | None


def gguf_tokenizer(metadata: dict[str, Any]) -> TokenizerParts:
    """Build the tokenizer that a GGUF file describes; raises TokenizerError."""
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in makers:
        raise TokenizerError(f"the GGUF tokenizer model is {reprlib.repr(kind)}, known are {', '.join(makers)}")
    vocabulary = _Vocabulary(metadata)
    tokenizer = makers[kind](metadata, vocabulary)
    tokenizer.add_special_tokens(vocabulary.added(CONTROL, special=True))
    tokenizer.add_tokens(vocabulary.added(USER_DEFINED, special=False))
    _add_template(tokenizer, metadata, vocabulary, adds_bos=kind == "llama")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"tokenizer.chat_template is no text but {type(template).__name__}")
    return TokenizerParts(tokenizer=tokenizer, special_tokens=vocabulary.special_tokens(), chat_template=template)


class _Vocabulary:
    """The file's token lists, checked."""

    __slots__ = ("ids", "metadata", "tokens", "types")

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self.tokens: list[str] = self.list_of("tokens", str)
        self.types: list[int] = (
            self.list_of("token_type", int) if "tokenizer.ggml.token_type" in metadata else [NORMAL] * len(self.tokens)
        )
        if len(self.types) != len(self.tokens):
            raise TokenizerError(f"{len(self.tokens)} tokens but {len(self.types)} token types")
        self.ids = {token: index for index, token in reversed(list(enumerate(self.tokens)))}

    def list_of(self, name: str, kind: type) -> list[Any]:
        values = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(values, list) or not values or type(values[0]) is not kind:
            raise TokenizerError(f"tokenizer.ggml.{name} is no list of {kind.__name__}")
        return values

    def added(self, kind: int, *, special: bool) -> list[AddedToken]:
        texts = (token for token, its in zip(self.tokens, self.types, strict=True) if its == kind and token)
        return [AddedToken(text, special=special, normalized=False) for text in texts]

    def special(self, name: str) -> str | None:
        """The text of the token that the metadata calls `name` (bos, eos, unknown, padding)."""
        index = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens):
            raise TokenizerError(f"tokenizer.ggml.{name}_token_id is no token: {reprlib.repr(index)}")
        return self.tokens[index]

    def special_tokens(self) -> dict[str, str]:
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        texts = {key: self.special(name) for key, name in names.items()}
        return {key: text for key, text in texts.items() if text is not None}


def _byte_level(metadata: dict[str, Any], vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise TokenizerError(f"the GGUF pre-tokenizer is {reprlib.repr(name)}, known are {known}")
    pre = PRE_TOKENIZERS[name]
    merges = [_merge(text, vocabulary.ids) for text in vocabulary.list_of("merges", str)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre.make()
    tokenizer.decoder = decoders.ByteLevel()
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer()
    return tokenizer


def _merge(text: str, ids: dict[str, int]) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if left not in ids or right not in ids or left + right not in ids:
        raise TokenizerError(f"tokenizer.ggml.merges joins what are no tokens: {reprlib.repr(text)}")
    return left, right


def _sentencepiece(metadata: dict[str, Any], vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    scores = vocabulary.list_of("scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise TokenizerError(f"{len(vocabulary.tokens)} tokens but {len(scores)} scores")
    model = models.BPE(
        vocabulary.ids,
        _merges_from_scores(vocabulary, scores),
        unk_token=vocabulary.special("unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix: list[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins, of all neighbours that make a token, those whose token has the best score; so each way
    to cut a token in two is a merge, in the order of the token's score."""
    ids = vocabulary.ids
    mergeable = {
        token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in (NORMAL, USER_DEFINED)
    }
    found = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                found.append((-scores[ids[token]], ids[token], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_template(
    tokenizer: tokenizers.Tokenizer, metadata: dict[str, Any], vocabulary: _Vocabulary, *, adds_bos: bool
) -> None:
    """What `add_special_tokens` adds around a text; `adds_bos` holds where the file does not say."""
    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    before = bos if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    after = eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    added = [text for text in (before, after) if text is not None]
    if added:
        single = [text for text in (before, "$A", after) if text is not None]
        special = [(text, vocabulary.ids[text]) for text in dict.fromkeys(added)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
