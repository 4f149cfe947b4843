"""Hostile and odd model files: each ends in a model, or in one line that names the file, never in anything else."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig, ModelConfig, SchedulerConfig
from engine.device.models import decoder_for
from engine.device.runner import TorchRunner
from engine.device.weights import Checkpoint, ModelError, open_checkpoint
from engine.device.weights.families import FAMILIES, Family
from engine.device.weights.values import REAL, WHOLE
from tests.engine.device.test_weights import write_gguf
from tests.tiny_models import write_tiny_llama

HUGE = 2**63


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> bytes:
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / "m.gguf", arch="llama").read_bytes()


def refusal(path: Path) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        open_checkpoint(str(path))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    assert str(path) in line
    return line


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("general.alignment", 0, Kind.UINT32),
        ("general.alignment", [32], Kind.ARRAY),
        ("general.alignment", 33, Kind.UINT32),
        ("general.alignment", "32", Kind.STRING),
        ("general.architecture", ["llama"], Kind.ARRAY),
        ("llama.attention.head_count", 0, Kind.UINT32),
        ("llama.attention.head_count", -4, Kind.INT32),
        ("llama.attention.head_count", [4, 4], Kind.ARRAY),
        ("llama.attention.head_count", True, Kind.BOOL),
        ("llama.attention.head_count_kv", 0, Kind.UINT32),
        ("llama.attention.head_count_kv", 3, Kind.UINT32),
        ("llama.attention.key_length", 15, Kind.UINT32),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), Kind.FLOAT32),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, Kind.FLOAT32),
        ("llama.attention.sliding_window", 1, Kind.UINT32),
        ("llama.attention.sliding_window", -1, Kind.INT32),
        ("llama.block_count", 0, Kind.UINT32),
        ("llama.block_count", -1, Kind.INT32),
        ("llama.context_length", 0, Kind.UINT32),
        ("llama.context_length", 1, Kind.UINT32),
        ("llama.context_length", -1, Kind.INT32),
        ("llama.context_length", HUGE, Kind.UINT64),
        ("llama.context_length", "many", Kind.STRING),
        ("llama.embedding_length", 0, Kind.UINT32),
        ("llama.embedding_length", HUGE, Kind.UINT64),
        ("llama.feed_forward_length", [128, 128], Kind.ARRAY),
        ("llama.rope.freq_base", 0.0, Kind.FLOAT32),
        ("llama.rope.freq_base", float("inf"), Kind.FLOAT32),
        ("llama.rope.scaling.type", ["linear"], Kind.ARRAY),
        ("llama.rope.scale_linear", 0.0, Kind.FLOAT32),
        ("llama.vocab_size", 513, Kind.UINT32),
        ("tokenizer.ggml.eot_token_id", -1, Kind.INT32),
        ("tokenizer.ggml.eot_token_id", "<|im_end|>", Kind.STRING),
    ],
)
def test_metadata_that_cannot_be_is_one_line(tmp_path: Path, llama: Path, key: str, value: Any, kind: Kind):
    path = write_gguf(llama, tmp_path / "m.gguf", arch="llama", replaced={key: (value, kind)})
    refusal(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", 2),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("rope_scaling", {"type": ["linear"], "factor": 2}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 0}),
        (
            "rope_scaling",
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 256,
            },
        ),
        ("rope_parameters", [1]),
        ("rope_theta", "10000"),
        ("rope_theta", 0),
        ("rope_theta", 10**400),
        ("rope_theta", float("nan")),
        ("partial_rotary_factor", "1.0"),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", 10**400),
        ("rms_norm_eps", -1e-5),
        ("head_dim", "16"),
        ("head_dim", HUGE),
        ("head_dim", 16.0),
        ("num_key_value_heads", "2"),
        ("num_key_value_heads", HUGE),
        ("num_key_value_heads", 0),
        ("sliding_window", "4096"),
        ("sliding_window", -1),
        ("hidden_size", True),
        ("hidden_size", 2**20),
        ("num_hidden_layers", 0),
        ("vocab_size", HUGE),
        ("max_position_embeddings", 1),
        ("model_type", ["llama"]),
        ("model_type", "x" * 10**5),
        ("hidden_act", ["silu"]),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", {}),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line(tmp_path: Path, llama: Path, key: str, value: Any):
    config = json.loads((llama / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 5_000, b"null", b""])
def test_json_that_is_none_is_one_line(tmp_path: Path, llama: Path, name: str, content: bytes):
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    (tmp_path / name).write_bytes(content)
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("max_positions", [2**24, 2**31])
def test_a_context_that_the_cache_cannot_hold_is_refused_before_it_costs_memory(llama: Path, max_positions: int):
    path = llama.parent / f"long-{max_positions}.gguf"
    write_gguf(llama, path, arch="llama", replaced={"llama.context_length": (max_positions, Kind.UINT32)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="lower --max-model-len"):
        TorchRunner.load(
            ModelConfig(path=str(path), device="cpu"),
            CacheConfig(num_gpu_blocks_override=64),
            SchedulerConfig(),
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_hidden_size_that_no_tensor_has_costs_no_memory_with_int8(tmp_path: Path, llama: Path):
    config = json.loads((llama / "config.json").read_text()) | {"hidden_size": 2**17, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    model = ModelConfig(path=str(tmp_path), device="cpu", quantization="int8")
    with pytest.raises(ModelError, match="has shape"):
        TorchRunner.load(model, CacheConfig(num_gpu_blocks_override=256), SchedulerConfig())


def test_a_quantised_tensor_whose_rows_are_no_whole_blocks_is_one_line(tmp_path: Path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    blocks = gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("x", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes().replace(struct.pack("<QQ", 64, 2), struct.pack("<QQ", 63, 2)))
    assert "Q8_0 with the shape (2, 63)" in refusal(path)


def test_every_bound_lets_something_in():
    assert all(least < greatest for least, greatest in (*WHOLE.values(), *REAL.values()))


# --- the end of a turn ---


def with_tokens(llama: Path, path: Path, texts: dict[int, str], **replaced: tuple[Any, Kind]) -> Checkpoint:
    tokens = [texts.get(number, f"t{number}") for number in range(512)]
    values = {"tokenizer.ggml.tokens": (tokens, Kind.ARRAY)}
    values |= {f"tokenizer.ggml.{name}": value for name, value in replaced.items()}
    return open_checkpoint(str(write_gguf(llama, path, arch="llama", replaced=values)))


@pytest.mark.parametrize("text", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"])
def test_a_file_that_names_no_end_of_turn_has_it_found_by_its_text(tmp_path: Path, llama: Path, text: str):
    model = with_tokens(llama, tmp_path / "m.gguf", {300: text}, eos_token_id=(7, Kind.UINT32))
    assert model.spec.eos_token_ids == {7, 300}


def test_an_end_of_turn_that_a_file_names_is_taken_at_its_word(tmp_path: Path, llama: Path):
    ends = {"eos_token_id": (7, Kind.UINT32), "eot_token_id": (9, Kind.UINT32), "eom_token_id": (11, Kind.UINT32)}
    model = with_tokens(llama, tmp_path / "m.gguf", {300: "<|im_end|>"}, **ends)
    assert model.spec.eos_token_ids == {7, 9, 11}


def test_a_text_that_only_contains_the_words_ends_no_turn(tmp_path: Path, llama: Path):
    texts = {300: "<|im_end|>x", 301: "x<|im_end|>"}
    model = with_tokens(llama, tmp_path / "m.gguf", texts, eos_token_id=(7, Kind.UINT32))
    assert model.spec.eos_token_ids == {7}


# --- families ---


def test_a_row_of_the_table_is_all_that_a_family_with_a_known_decoder_needs(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = (*FAMILIES, Family(name="cousin", gguf="cousin"))
    for reader in ("huggingface", "gguf_checkpoint"):
        monkeypatch.setattr(f"engine.device.weights.{reader}.FAMILIES", rows)
    directory = write_tiny_llama(tmp_path / "model", model_type="cousin")
    file = write_gguf(directory, tmp_path / "m.gguf", arch="cousin")
    for path in (directory, file):
        assert decoder_for(open_checkpoint(str(path)).spec)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_of_the_table_has_a_decoder(tmp_path: Path, family: Family):
    spec = open_checkpoint(str(write_tiny_llama(tmp_path, family=family.name))).spec
    assert spec.decoder == family.decoder
    assert decoder_for(spec)


# --- fuzzing ---


def read(path: Path) -> str:
    """Open a model and read tensors of it; the line with which it is refused, if it is. Nothing else may be raised."""
    try:
        checkpoint = open_checkpoint(str(path))
        spec = checkpoint.spec
        checkpoint.tensor("model.norm.weight", (spec.hidden_size,))
        checkpoint.tensor("model.layers.0.self_attn.q_proj.weight", (spec.num_heads * spec.head_dim, spec.hidden_size))
    except ModelError as error:
        return str(error)
    return ""


def is_a_model_or_one_line(path: Path) -> bool:
    line = read(path)
    return not line or (str(path) in line and "\n" not in line)


bytes_of_words = st.sampled_from([0, 1, 2, 8, 9, 127, 128, 255])
edits = st.lists(st.tuples(st.integers(0, 2**16), bytes_of_words), min_size=1, max_size=4)


@given(data=st.data())
@settings(deadline=None)
def test_a_gguf_file_with_any_bytes_changed_is_a_model_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, whole_gguf: bytes, data: st.DataObject
):
    header = whole_gguf.index(b"token_embd.weight") + 2_000  # metadata, and what is said of tensors
    raw = bytearray(whole_gguf)
    for at, value in data.draw(edits):
        raw[at % header] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, header, header // 2]))])
    assert is_a_model_or_one_line(path)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**31, HUGE, 10**400, -HUGE]),
    st.floats(),
    st.text(max_size=5),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
)
scalings = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "default", "yarn"])},
    optional={
        "factor": values,
        "low_freq_factor": values,
        "high_freq_factor": values,
        "original_max_position_embeddings": values,
    },
)


@given(data=st.data())
@settings(deadline=None)
def test_a_configuration_with_any_values_is_a_model_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, data: st.DataObject
):
    config = json.loads((llama / "config.json").read_text())
    names = [*config, "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "dtype", "hidden_act"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        config[name] = data.draw(scalings | values if name.startswith("rope_") else values)
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    directory.mkdir(exist_ok=True)
    if not (directory / "model.safetensors").exists():
        (directory / "model.safetensors").symlink_to(llama / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    assert is_a_model_or_one_line(directory)
