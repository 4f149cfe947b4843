"""Models for whole deployments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two small layers with a byte-level tokenizer: fast, and wrong about everything."""
    directory = tmp_path_factory.mktemp("model") / "tiny-llama"
    write_tiny_llama(directory)
    return directory
