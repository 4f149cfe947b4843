"""The table of model families: what their files leave unsaid, and the decoder that computes them. Pure.

A new family is a row here. If it computes something new, it has a decoder of its own as well, a module of
`engine.device.models` that is named there in one line. Its spec is read from config.json (`huggingface`) or from GGUF
metadata (`gguf_checkpoint`) by these rows. How a GGUF file's text is cut into words is no matter of families: files
name that themselves, and `engine/vocabulary/pre_tokenizers.py` has the table, since API servers load no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is peculiar to one family."""

    name: str  # model_type in config.json
    gguf: str | None = None  # general.architecture in GGUF files; None: they go by another family's
    decoder: str = "llama"  # a key of engine.device.models.DECODERS
    has_qkv_bias: bool = False  # config.json does not say; a GGUF file has the tensors or not
    has_qk_norm: bool = False  # the same
    switches_window: bool = False  # sliding_window in config.json counts only beside use_sliding_window
    permutes_gguf_qk: bool = False  # stores q and k rows in pairs, as it turns (x0, x1); otherwise in halves


FAMILIES: Final = (
    Family(name="llama", gguf="llama", permutes_gguf_qk=True),
    Family(name="mistral"),
    Family(name="qwen2", gguf="qwen2", has_qkv_bias=True, switches_window=True),
    Family(name="qwen3", gguf="qwen3", has_qk_norm=True, switches_window=True),
)

# Hugging Face's names of tensors -> GGUF's; the same in all families, as far as a family has them.
GGUF_TOP_LEVEL: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_IN_LAYER: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
