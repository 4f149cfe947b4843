"""Text to token ids and back, by the model's own tokenizer and chat template.

Street: work. Text exists only in the API servers: engines know token ids.
"""

from __future__ import annotations

from frontend.text.chat_template import ChatTemplateError
from frontend.text.control_tokens import Hidden
from frontend.text.detokenizer import SequenceText, Stops, StopStrings
from frontend.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer

__all__ = [
    "ChatTemplateError",
    "Hidden",
    "SequenceText",
    "StopStrings",
    "Stops",
    "Tokenizer",
    "TokenizerError",
    "load_tokenizer",
]
