"""The kernels for a processor with AVX2 alone, on whatever processor the tests run on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.device.kernels.compiled import INSTRUCTION_SET
from tests.instruction_sets import as_avx2

FOLDER = Path(__file__).parent


@pytest.mark.skipif(INSTRUCTION_SET != "avx512", reason="the other tests have tested it, or it cannot run here")
@pytest.mark.timeout(600)
def test_all_of_it_holds_with_avx2_alone(tmp_path: Path):
    environment = as_avx2(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", "from engine.device.kernels import compiled, packed\n"
         "print(compiled.INSTRUCTION_SET, packed.INT8_LEVELS)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["avx2", "63"]
    files = [str(FOLDER / name) for name in ("test_linear.py", "test_models.py", "test_head.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
