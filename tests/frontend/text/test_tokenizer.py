"""Text to token ids and back, from GGUF metadata and from Hugging Face directories."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from engine.vocabulary.files import MAX_LINE
from engine.vocabulary.gguf_metadata import GGUFError, read_metadata
from engine.vocabulary.gguf_tokenizer import TokenizerError, gguf_tokenizer
from engine.vocabulary.pre_tokenizers import PRE_TOKENIZERS
from frontend.text.tokenizer import Tokenizer, load_tokenizer
from tests.frontend.small_tokenizers import (
    ALPHABET,
    END,
    LETTERS,
    START,
    TEMPLATE,
    byte_level_metadata,
    byte_level_tokenizer,
    sentencepiece_metadata,
    sentencepiece_tokenizer,
)

TEXTS = [
    "Hello, world!",
    "In 1984 there were 31,536,000 seconds; ½ of them ٣ more.",
    "emoji 😀 family 👩‍👩‍👧‍👦 flag 🇨🇭 skin 👍🏽",
    "中文字符，日本語のテキスト、한국어",
    "def f(x):\n\treturn [i ** 2 for i in range(x)]  # ok\n\n\n",
    "  leading, trailing and   many spaces   ",
    "it's they'll WE'RE don't \r\n crlf",
    "é e\u0301 ﬁ \u200b zero width \ufffd",
    "<|im_start|>user\nHi<|im_end|>\n",
]


# --- the default model ---


@pytest.fixture(scope="module")
def smollm(default_model: Path) -> Tokenizer:
    return load_tokenizer(str(default_model))


@pytest.fixture(scope="module")
def reference(default_model: Path) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer as its published tokenizer.json describes it, put together by hand from the token lists."""
    metadata = read_metadata(str(default_model))
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(tokens[:17])
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_the_default_model_tokenises_like_its_published_tokenizer(
    smollm: Tokenizer, reference: tokenizers.Tokenizer, text: str
):
    token_ids = smollm.encode(text)
    assert token_ids == reference.encode(text).ids
    assert smollm.decode(token_ids, skip_special_tokens=False) == text
    assert smollm.decode(token_ids) == reference.decode(token_ids)


@given(text=st.text(max_size=60))
def test_any_text_survives_the_default_models_tokens(smollm: Tokenizer, reference: tokenizers.Tokenizer, text: str):
    """Its vocabulary has no token for some bytes that only rare planes and no UTF-8 use: those are lost."""
    token_ids = smollm.encode(text)
    assert token_ids == reference.encode(text).ids
    if all(smollm._tokenizer.token_to_id(ALPHABET[byte]) is not None for byte in text.encode()):
        assert smollm.decode(token_ids, skip_special_tokens=False) == text


@given(token_ids=st.lists(st.integers(0, 49151), max_size=30))
def test_any_tokens_decode_like_the_library(smollm: Tokenizer, reference: tokenizers.Tokenizer, token_ids: list[int]):
    assert smollm.decode(token_ids) == reference.decode(token_ids)
    assert smollm.decode(token_ids, skip_special_tokens=False) == reference.decode(token_ids, skip_special_tokens=False)


def test_the_default_models_special_tokens_and_digits_are_what_is_known(smollm: Tokenizer):
    assert smollm.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert smollm.encode("1234") == [33, 34, 35, 36]  # one by one
    assert smollm.decode([1, 33, 2]) == "1"
    assert smollm.vocab_size == 49152


def test_the_default_models_tokenizer_loads_in_half_a_second(default_model: Path):
    started = time.process_time()
    load_tokenizer(str(default_model))
    assert time.process_time() - started < 0.5


def test_the_metadata_equals_what_the_gguf_library_reads(default_model: Path):
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(str(default_model)).fields
    ours = read_metadata(str(default_model))
    assert set(ours) == {name for name in fields if not name.startswith("GGUF.")}
    assert all(ours[name] == fields[name].contents() for name in ours)


# --- pre-tokenizers ---


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@given(text=st.text(max_size=40))
def test_every_pre_tokenizer_loses_no_character(pre: str, text: str):
    tokenizer = byte_level_tokenizer(pre=pre)
    text = tokenizer._tokenizer.normalizer.normalize_str(text) if tokenizer._tokenizer.normalizer else text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "a Ġ123456 Ġ Ġ' Re"),
        ("smollm", "a Ġ 1 2 3 4 5 6 Ġ Ġ' Re"),
        ("llama-bpe", "a Ġ 123 456 Ġ Ġ' Re"),
        ("qwen2", "a Ġ 1 2 3 4 5 6 Ġ Ġ' Re"),
    ],
)
def test_a_pre_tokenizer_cuts_words_as_its_family_does(pre: str, words: str):
    assert [word for word, _ in PRE_TOKENIZERS[pre].make().pre_tokenize_str("a 123456  'Re")] == words.split()


def test_an_unknown_pre_tokenizer_is_named():
    with pytest.raises(TokenizerError, match="'chameleon'"):
        gguf_tokenizer(byte_level_metadata(pre="chameleon"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "bert"}, "'bert'"),
        ({"tokens": []}, "tokens is no list"),
        ({"token_type": [1]}, "1 token types"),
        ({"merges": ["h q"]}, "'h q'"),
        ({"merges": ["he"]}, "'he'"),
        ({"eos_token_id": 10**6}, "1000000"),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_named(change: dict[str, Any], words: str):
    with pytest.raises(TokenizerError, match=words):
        gguf_tokenizer(byte_level_metadata(**change))


# --- special tokens ---


def test_control_and_user_defined_tokens_are_tokens_in_text_but_only_control_is_hidden():
    tokenizer = byte_level_tokenizer()
    token_ids = tokenizer.encode("<start>h[own]<end>")
    assert token_ids == [START, ord("h"), 259, END]
    assert tokenizer.decode(token_ids) == "h[own]"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<start>h[own]<end>"


def test_a_beginning_token_is_added_where_the_file_says_so():
    tokenizer = byte_level_tokenizer(add_bos_token=True, add_eos_token=True)
    assert tokenizer.encode("a") == [START, ord("a"), END]
    assert tokenizer.encode("a", add_special_tokens=False) == [ord("a")]
    assert byte_level_tokenizer().encode("a") == [ord("a")]


def test_an_id_beyond_the_vocabulary_has_no_text():
    assert byte_level_tokenizer().decode([ord("a"), 5000, ord("b")]) == "ab"


# --- SentencePiece ---


@pytest.mark.parametrize(
    ("words", "text", "tokens"),
    [
        ({"ab": -2.0, "bc": -1.0}, "abc", "▁ a bc"),
        ({"ab": -1.0, "bc": -2.0}, "abc", "▁ ab c"),
        ({"ab": -2.0, "bc": -1.0, "abc": -3.0, "▁abc": -5.0}, "abcab", "▁abc ab"),
    ],
)
def test_sentencepiece_merges_the_best_score_first(words: dict[str, float], text: str, tokens: str):
    tokenizer = sentencepiece_tokenizer(words=LETTERS | words)
    names = [tokenizer._tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert names == tokens.split()


def test_sentencepiece_writes_what_it_does_not_know_as_bytes():
    tokenizer = sentencepiece_tokenizer()
    token_ids = tokenizer.encode("é", add_special_tokens=False)
    assert [tokenizer._tokenizer.id_to_token(i) for i in token_ids] == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(token_ids) == "é"


def test_sentencepiece_begins_with_its_token_and_a_space():
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.encode("a") == [1, tokenizer._tokenizer.token_to_id("▁a")]
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert sentencepiece_tokenizer(add_space_prefix=False, add_bos_token=False).encode("a") == [260]


@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_sentencepiece(text: str):
    tokenizer = sentencepiece_tokenizer()
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode(token_ids) == tokenizer._tokenizer.decode(token_ids)


def test_an_added_token_of_sentencepiece_writes_its_spaces_like_the_others():
    parts = gguf_tokenizer(sentencepiece_metadata())
    parts.tokenizer.add_tokens(["▁▁q"])
    token_ids = parts.tokenizer.encode("a▁▁q").ids
    assert Tokenizer(parts).decode(token_ids) == parts.tokenizer.decode(token_ids) == "a  q"


def test_an_added_token_of_a_byte_level_vocabulary_is_plain_text():
    parts = gguf_tokenizer(byte_level_metadata())
    parts.tokenizer.add_tokens(["[Ġé]"])
    assert Tokenizer(parts).decode(parts.tokenizer.encode("[Ġé]").ids) == "[Ġé]"


def test_sentencepiece_without_scores_is_named():
    with pytest.raises(TokenizerError, match="scores"):
        gguf_tokenizer(sentencepiece_metadata(scores=[0.5]))


# --- files ---


def _pack(value: Any) -> bytes:
    """A string, an unsigned number or a list of strings, as GGUF writes it after its key."""
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    items = b"".join(struct.pack("<Q", len(item.encode())) + item.encode() for item in value)
    return struct.pack("<IIQ", 9, 8, len(value)) + items


def _gguf(pairs: dict[str, Any]) -> bytes:
    body = b"".join(struct.pack("<Q", len(key)) + key.encode() + _pack(value) for key, value in pairs.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body


def test_metadata_is_read_back(tmp_path: Path):
    pairs = {"a.text": "héllo", "a.number": 7, "a.list": ["x", "", "世界"]}
    path = tmp_path / "small.gguf"
    path.write_bytes(_gguf(pairs))
    assert read_metadata(str(path)) == pairs


@given(data=st.data())
def test_a_damaged_file_is_an_error_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    whole = _gguf({"a.text": "hello", "a.list": ["x", "yy"], "a.number": 7})
    end = data.draw(st.integers(0, len(whole)))
    position, byte = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    damaged = bytearray(whole)
    damaged[position] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(damaged[:end]))
    try:
        read_metadata(str(path))
    except GGUFError:
        return
    assert end == len(whole)  # a changed byte may still be a file; a missing one never


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    gguf_tokenizer(byte_level_metadata()).tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<end>", "bos_token": {"content": "<start>"}, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_hugging_face_directory_gives_the_same_tokens(directory: Path):
    ours, same = load_tokenizer(str(directory)), byte_level_tokenizer()
    text = "<start>héllo 12<end>"
    assert ours.encode(text) == same.encode(text)
    assert ours.decode(ours.encode(text)) == "héllo 12"
    assert ours.chat_template is not None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "has no tokenizer: ValueError: Cannot instantiate"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "is no JSON object"),
        ("chat_template.jinja", "{% for %}", "chat template is broken"),
    ],
)
def test_a_broken_directory_is_named(directory: Path, name: str, content: str, words: str):
    (directory / name).write_text(content)
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(str(directory))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"[" * 100_000, "has no tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "has no tokenizer"),
        ("tokenizer_config.json", b"[" * 100_000, "nested too deep"),
        ("tokenizer_config.json", b"\xff\xfe", "not JSON"),
        ("tokenizer_config.json", b'{"chat_template": [1]}', "chat_template is a list"),
        ("tokenizer_config.json", b'{"chat_template": 1}', "chat_template is 1, not a text"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": {}}]}', "not a text"),
        ("chat_template.jinja", b"{{ '\xff' }}", "not UTF-8"),
        ("chat_template.jinja", b"{% for a in x %}" * 60 + b"{% endfor %}" * 60, "chat template is broken"),
        ("chat_template.jinja", b"{{ " + b"(" * 3_000 + b"1" + b")" * 3_000 + b" }}", "chat template is broken"),
    ],
)
def test_an_odd_file_is_one_line(directory: Path, name: str, content: bytes, words: str):
    (directory / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=words) as caught:
        load_tokenizer(str(directory))
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("name", ["tokenizer.ggml.model", "tokenizer.ggml.pre"])
@pytest.mark.parametrize("value", [["gpt2"], {}, 1, None, "x" * 10_000])
def test_an_odd_name_in_a_gguf_file_is_one_short_line(name: str, value: object):
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": ["a a"]}
    with pytest.raises(TokenizerError) as caught:
        gguf_tokenizer(metadata | {name: value})
    assert len(str(caught.value)) < 1_000


odd_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70_000)
    | st.floats()
    | st.text(max_size=6)
    | st.just("{% for a in b %}"),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@given(
    make=st.sampled_from([byte_level_metadata, sentencepiece_metadata]),
    odd=st.dictionaries(
        st.sampled_from(
            ["model", "pre", "tokens", "token_type", "merges", "scores", "chat_template", "add_bos_token"]
            + [f"{name}_token_id" for name in ("bos", "eos", "unknown", "padding")]
        ).map(lambda name: f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}"),
        odd_values,
        min_size=1,
        max_size=2,
    ),
)
def test_whatever_a_gguf_file_says_of_its_tokenizer_it_is_one_or_one_line(
    make: Callable[[], dict[str, Any]], odd: dict[str, Any]
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.vocabulary.files.read_metadata", lambda path: make() | odd)
        try:
            tokenizer = load_tokenizer("model.gguf")
        except TokenizerError as error:
            line = str(error)
        else:
            line = ""
            tokenizer.decode(tokenizer.encode("hello 12"))
    assert "\n" not in line
    assert len(line) <= MAX_LINE


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(TokenizerError, match="GGUF"):
        load_tokenizer(str(tmp_path / "model.gguf"))


def test_a_tokenizer_whose_decoding_is_unknown_is_named(directory: Path):
    made = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    made.decoder = decoders.WordPiece()
    made.save(str(directory / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="WordPiece"):
        load_tokenizer(str(directory))


def test_a_text_that_cannot_fit_is_known_without_encoding_it():
    tokenizer = byte_level_tokenizer()  # the longest token, <start>, has 7 bytes
    assert tokenizer.can_fit("x" * 70, 10)
    assert not tokenizer.can_fit("x" * 71, 10)
