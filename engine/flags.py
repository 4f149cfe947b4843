"""The command line of `python -m engine.serve`: flags in, one checked `DeploymentConfig` out.

`engine.config` declares the flags; here is what only several of them together say, or the machine. Flags that vLLM has
under the same meaning have vLLM's names. Whatever is wrong with one raises `FlagError`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any, Final, NoReturn

from engine import default_model
from engine.config import API_KEY_VARIABLE, DeploymentConfig
from engine.options import add_flags, make, text
from engine.supervisor import default_runtime_directory

GGUF_MAGIC = b"GGUF"
THREADS_VARIABLE: Final = "OMP_NUM_THREADS"
MAX_THREADS: Final = 1024  # more than the cores of a machine, and no more than it can start


class FlagError(ValueError):
    """A command line that cannot be served; one line for the operator."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message} (--help lists the flags)")


def make_parser() -> argparse.ArgumentParser:
    """Every flag, with its help."""
    parser = _Parser(
        prog="python -m engine.serve",
        usage="python -m engine.serve [flags]",
        description="Serve a model over the OpenAI API: one supervisor, some engines, some API servers.",
        allow_abbrev=False,
    )
    add_flags(parser, DeploymentConfig)
    return parser


def parse(arguments: list[str], environment: dict[str, str]) -> DeploymentConfig:
    """Raises FlagError; fetches the default model when no other is named."""
    found = vars(make_parser().parse_args(arguments))
    _check_threads(environment.get(THREADS_VARIABLE, ""))
    path, name = _model(found["model.path"])
    found["model.path"] = str(path)
    found["model.served_model_names"] = found["model.served_model_names"] or [name]
    if not (found["model.served_model_names"][0] and found["model.served_model_names"][0].isprintable()):
        raise FlagError(f"--model {str(path)!r}: not a name for clients, give one with --served-model-name")
    found["num_api_servers"] = found["num_api_servers"] or found["num_engines"]
    found["runtime_directory"] = str(Path(found["runtime_directory"] or default_runtime_directory()).absolute())
    # Stripped: a key that was read from a file ends with a line end, which no header can hold.
    found["http.api_keys"] = [key.strip() for key in (*found["http.api_keys"], *_keys(environment))]
    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        found[f"http.{name}"] = _listed(f"--{name.replace('_', '-')}", found[f"http.{name}"])
    config = make(DeploymentConfig, found)
    _check(config)
    return config


def _check(config: DeploymentConfig) -> None:
    """What no single flag says; raises FlagError."""
    scheduler, http, stats, model = config.scheduler, config.http, config.stats, config.model
    if scheduler.max_num_batched_tokens and scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
        raise FlagError(
            f"--max-num-batched-tokens {scheduler.max_num_batched_tokens} is less than --max-num-seqs"
            f" {scheduler.max_num_seqs}: an iteration must have room for one token of every sequence"
        )
    if http.admin_port and http.admin_port + config.num_api_servers > 65536:
        raise FlagError(f"--admin-port {http.admin_port} and the {config.num_api_servers - 1} after it go beyond 65535")
    if "" in http.api_keys:
        raise FlagError("--api-key: an empty key lets everybody in")
    if http.allow_credentials and "*" in http.allowed_origins:
        raise FlagError("--allow-credentials: browsers want origins by name then, not --allowed-origins *")
    if stats.is_traced and not _has_otlp():
        raise FlagError("--otlp-traces-endpoint and --otlp-metrics-endpoint need: pip install 'wholebatch[otel]'")
    if stats.publish_interval_s * 4 > stats.lease_s:
        raise FlagError(
            f"--lease {stats.lease_s:g} is less than four publish intervals of {stats.publish_interval_s:g}"
        )
    if model.quantization and (model.device == "cuda" or model.dtype not in ("auto", "float32")):
        raise FlagError(f"--quantization {model.quantization} is for a CPU and float32 alone")


def _check_threads(said: str) -> None:
    """What OpenMP would complain of in its own words, and torch would fail with; raises FlagError."""
    numbers = [word.strip() for word in said.split(",")]  # of each level of nesting
    if said.strip() and not all(re.fullmatch("[0-9]{1,9}", n) and 1 <= int(n) <= MAX_THREADS for n in numbers):
        raise FlagError(f"{THREADS_VARIABLE} is {said[:40]!r}, not a number of threads from 1 to {MAX_THREADS}")


def _keys(environment: dict[str, str]) -> list[str]:
    key = environment.get(API_KEY_VARIABLE)
    try:
        return [text(key)] if key else []
    except UnicodeEncodeError as error:
        raise FlagError(f"{API_KEY_VARIABLE} is not UTF-8") from error


def _listed(flag: str, words: list[str]) -> list[str]:
    """Words that an HTTP header can hold, given one by one or as a JSON list."""
    found: list[Any] = []
    for word in words:
        try:
            found += json.loads(word) if word.startswith("[") else [word]
        except (ValueError, RecursionError) as error:
            raise FlagError(f"{flag} {word[:80]!r}: not a JSON list: {error}") from error
    for word in found:
        if not (isinstance(word, str) and word and word.isascii() and word.isprintable()):
            raise FlagError(f"{flag}: {word!r} cannot be said in a header")
    return found


def _has_otlp() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def _model(named: str | None) -> tuple[Path, str]:
    """(path, name), as far as it can be checked without reading the weights."""
    if named is not None:
        path = Path(named).absolute()
        _check_model(path, f"--model {named}")
        return path, path.name
    try:
        path = default_model.fetch()
    except default_model.FetchError as error:
        raise FlagError(str(error)) from error
    _check_model(path, f"the default model, {path}")
    return path, default_model.NAME


def _check_model(path: Path, called: str) -> None:
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise FlagError(f"{called}: no config.json in this directory")
        elif path.is_file():
            with path.open("rb") as file:
                if file.read(4) != GGUF_MAGIC:
                    raise FlagError(f"{called}: not a GGUF file")
        else:
            raise FlagError(f"{called}: no such file or directory (models are not downloaded)")
    except OSError as error:
        raise FlagError(f"{called}: {error.strerror or error}") from error
