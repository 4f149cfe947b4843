"""The shape of the project, enforced: who may import whom, sizes, and that the pages' maps are the tree."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "frontend", "metrics")
WINGS = (  # folders with one door: outsiders import what the folder's `__init__` offers
    "engine.wire",
    "engine.supervisor",
    "engine.loop",
    "engine.schedule",
    "engine.device",
    "engine.device.kernels",
    "engine.device.models",
    "engine.device.weights",
    "engine.vllm",
    "engine.vocabulary",
    "frontend.api",
    "frontend.text",
    "frontend.engines",
    "frontend.parsing",
    "frontend.counters",
    "frontend.scrape",
    "frontend.tracing",
    "frontend.vllm",
    "metrics.catalogue",
    "metrics.files",
    "metrics.dashboards",
    "metrics.top",
)
BACK_DOORS = ("frontend.tracing.otlp",)  # optional: importing it needs packages that few install
# What each place must never import of the project; the longest name that a module lies in counts.
NEVER = {
    "metrics": ("engine", "frontend", "asyncio"),
    "engine": ("frontend", "asyncio", "engine.device", "engine.loop"),
    "engine.loop": ("frontend", "asyncio", "engine.supervisor"),
    "engine.device": ("frontend", "asyncio", "metrics", "engine.wire", "engine.loop", "engine.supervisor"),
    "frontend": (
        *("engine.supervisor", "engine.loop", "engine.schedule", "engine.device", "engine.vllm"),
        *("engine.serve", "engine.flags", "engine.config", "engine.host", "engine.default_model"),
    ),
}
# Where alone each package of others is imported; one that is not here is imported nowhere.
ONLY_IN = {
    "aiohttp": ("frontend",),
    "gguf": ("engine.device.weights.gguf_file",),
    "grafana_foundation_sdk": ("metrics.dashboards.panels",),
    "jinja2": ("frontend.text",),
    "llguidance": ("engine.device.constraints", "frontend.api.constraints"),
    "llvmlite": ("engine.device.kernels",),
    "msgspec": ("engine.bounds", "engine.config", "engine.options", "engine.wire"),
    "msgpack": ("engine.loop", "engine.wire", "metrics.snapshot"),
    "numba": ("engine.device.kernels",),
    "numpy": ("engine.device", "engine.supervisor.auditor", "frontend.scrape", "metrics"),
    "opentelemetry": ("frontend.tracing.otlp",),
    "prometheus_client": ("metrics.audit",),
    "pydantic": ("frontend.api",),
    "rich": ("metrics.top.terminal", "metrics.top.view"),
    "safetensors": ("engine.device.weights.huggingface",),
    "setproctitle": ("engine.loop.process", "engine.serve", "frontend.server"),
    "tokenizers": ("engine.vocabulary", "frontend.text.tokenizer"),
    "torch": ("engine.device",),
    "uvloop": ("frontend.server",),
    "yaml": ("metrics.dashboards.generate",),
    "zmq": ("engine.loop", "engine.supervisor", "frontend", "metrics.broadcast"),
}
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60


def modules() -> dict[str, Path]:
    """Every module of the three packages by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module name that the file imports, at any depth of nesting; `from a import b` gives `a.b` where that is
    a module of ours, else `a`."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else str(node.module))
    return names


def is_in(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def wing_of(module: str) -> tuple[str, ...]:
    """The wings that a module lies in, outermost first; a wing's own `__init__` lies in those around it."""
    return tuple(wing for wing in WINGS if module.startswith(f"{wing}."))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_place_may(module: str):
    place = max((name for name in NEVER if is_in(module, (name,))), key=len)
    wrong = {name for name in imports(MODULES[module]) if is_in(name, NEVER[place])}
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", MODULES)
def test_a_wing_is_entered_by_its_door(module: str):
    around = (*wing_of(module), module)
    wrong = {
        name
        for name in imports(MODULES[module]) - set(BACK_DOORS)
        if name in MODULES and any(wing not in around for wing in wing_of(name))
    }
    assert not wrong, f"{module} imports past the doors: {sorted(wrong)}"


def test_every_package_is_one_of_these():
    """So that no module stands outside the tables."""
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert folders == {*PACKAGES, "tests"}


def test_every_folder_is_a_wing():
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py" and "." in name}
    assert folders == set(WINGS)


@pytest.mark.parametrize("module", MODULES)
def test_a_package_of_others_is_imported_for_its_purpose_alone(module: str):
    packages = {name.partition(".")[0] for name in imports(MODULES[module])}
    wrong = {
        package
        for package in packages - set(PACKAGES) - sys.stdlib_module_names
        if not is_in(module, ONLY_IN.get(package, ()))
    }
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_no_place_may_import_what_it_does_not(package: str):
    using = [name for name, path in MODULES.items() if any(is_in(i, (package,)) for i in imports(path))]
    assert [place for place in ONLY_IN[package] if not any(is_in(name, (place,)) for name in using)] == []


def offered(door: Path) -> set[str]:
    """What `__all__` names."""
    for node in parsed(door).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def taken(wing: str, path: Path) -> set[str]:
    """What a file takes of a wing: what it imports from it, and the attributes of it where it imports it whole."""
    names: set[str] = set()
    aliases: set[str] = set()
    tree = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.module == wing:
                    names.add(alias.name)
                elif f"{node.module}.{alias.name}" == wing:
                    aliases.add(alias.asname or alias.name)
    return names | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in aliases}


@pytest.mark.parametrize("wing", WINGS)
def test_a_door_offers_only_what_somebody_outside_takes(wing: str):
    outside = [path for name, path in MODULES.items() if not is_in(name, (wing,))] + TESTS
    unused = offered(MODULES[wing]).difference(*(taken(wing, path) for path in outside))
    assert not unused, f"{wing} offers {sorted(unused)}"


def test_imports_have_no_cycle():
    graph = {name: {i for i in imports(path) if i in MODULES and i != name} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("entry", ["frontend.server", "engine.serve"])
def test_a_process_without_tensors_starts_without_torch(entry: str):
    program = f"import {entry}, sys; print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_read_in_one_sitting(module: str):
    path = MODULES[module]
    assert len(path.read_text().splitlines()) <= MAX_MODULE_LINES
    for function in functions(path):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, f"{module}.{function.name} has {lines} lines"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_a_docstring(module: str):
    assert ast.get_docstring(parsed(MODULES[module]))


def mapped(page: Path, names: str) -> set[str]:
    """What the map of a page names in the first column of a table or at the beginning of a line."""
    block = re.search(r"<!-- map:begin -->(.*?)<!-- map:end -->", page.read_text(), re.DOTALL)
    assert block, f"{page} has no map between its markers"
    return set(re.findall(rf"^(?:\| )?\[?`({names})`", block.group(1), re.MULTILINE))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_of_a_package_maps_every_module_and_no_other(package: str):
    rooms = (path for path in (ROOT / package).rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    tree = {str(path.relative_to(ROOT / package)) for path in rooms}
    assert mapped(ROOT / package / "README.md", r"[\w/]+\.py") == tree
    wings = {f"{wing.replace('.', '/')}/" for wing in WINGS if wing.startswith(f"{package}.")}
    assert mapped(ROOT / package / "README.md", r"[\w/]+/") == wings


def test_the_readme_maps_every_outer_wing_and_no_other():
    outer = {wing for wing in WINGS if wing.count(".") == 1}
    assert mapped(ROOT / "README.md", r"[\w/]+/") == {f"{name.replace('.', '/')}/" for name in (*PACKAGES, *outer)}
