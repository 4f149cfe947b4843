"""What a model's files say about its text, whichever format they have: its tokenizer, special tokens, chat template."""

from __future__ import annotations

import json
import os
import reprlib
from typing import Any, Final

import tokenizers

from engine.vocabulary.gguf_metadata import GGUFError, read_metadata
from engine.vocabulary.gguf_tokenizer import TokenizerError, TokenizerParts, gguf_tokenizer

MAX_LINE: Final = 500  # characters of an error


def load_parts(path: str) -> TokenizerParts:
    """From a Hugging Face directory or a .gguf file. Raises TokenizerError, one line, whatever is wrong with the files:
    to start again would not help."""
    try:
        return _from_directory(path) if os.path.isdir(path) else gguf_tokenizer(read_metadata(path))
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer: {error}") from error
    except (GGUFError, TokenizerError) as error:
        raise TokenizerError(one_line(error if path in str(error) else f"{path}: {error}")) from error
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise TokenizerError(one_line(f"{path} has no tokenizer: {type(error).__name__}: {error}")) from error


def one_line(what: object) -> str:
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
