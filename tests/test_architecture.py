"""The law of the house: who may import whom, read from the imports; and what importing the package does not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fused_resnet"
# module -> package modules it may import
LAW = {
    "plan": set(),  # a package: its own files in PLAN_LAW
    "reference": set(),
    "tuned": {"plan"},
    "ops": {"plan", "reference", "tuned"},
    "autograd": {"ops", "plan", "reference"},
    "functional": {"autograd", "ops", "plan"},
    "modules": {"functional", "autograd", "ops", "plan"},
    "convert": {"modules", "functional"},
    "weights": set(),
    "models": {"modules", "weights"},
    "tracing": {"modules"},
    "explain": {"ops", "plan", "tracing"},
    "costs": {"plan", "tracing"},
    "graphs": {"modules", "plan"},
    "trials": {"plan", "reference"},
    "precompile": {"plan", "trials"},
    "workload": {"modules", "ops", "plan", "tracing"},
    "tuning": {"explain", "graphs", "modules", "ops", "plan", "precompile", "reference", "trials", "tuned", "workload"},
    "testing": {"trials"},
}
FREE = {"__init__", "__main__"}
PLAN_LAW = {
    "problem": set(),
    "cuda": {"problem"},
    "tiles": {"problem"},
    "families": {"problem", "tiles"},
    "layers": {"problem"},
    "tables": {"cuda", "families", "problem"},
    "occupancy": {"families", "problem"},
    "work": {"problem"},
    "__init__": {"cuda", "families", "layers", "occupancy", "problem", "tables", "work"},
}


def _imports(path: Path) -> tuple[set[str], set[str]]:
    """(package modules, other top-level packages) that a file imports, wherever in it."""
    own, other = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            other |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            other.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            own |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return own, other


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == (set(LAW) | FREE) - {"plan"}
    assert {path.stem for path in (PACKAGE / "plan").glob("*.py")} == set(PLAN_LAW)


@pytest.mark.parametrize("name", sorted(set(LAW) - {"plan"}))
def test_imports_point_one_way(name):
    own, _ = _imports(PACKAGE / f"{name}.py")
    assert own <= LAW[name], f"{name} imports {own - LAW[name]}"


def test_the_law_has_no_circle():
    seen: set[str] = set()
    while len(seen) < len(LAW):
        ready = {name for name, needs in LAW.items() if needs <= seen} - seen
        assert ready, f"circle among {set(LAW) - seen}"
        seen |= ready


@pytest.mark.parametrize("name", PLAN_LAW)
def test_plan_needs_the_standard_library_alone(name):
    own, other = _imports(PACKAGE / "plan" / f"{name}.py")
    assert other <= sys.stdlib_module_names
    assert own <= PLAN_LAW[name], f"plan.{name} imports {own - PLAN_LAW[name]}"


def test_reference_needs_torch_alone():
    _, other = _imports(PACKAGE / "reference.py")
    assert other <= {"torch", "typing", "collections", "__future__"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_epilogue_and_the_shared_checks_alone(path):
    own, other = _imports(path)
    shared = {name for name in own if name.startswith(("require", "empty", "on_device", "input_precision"))}
    helpers = {name for name in own - shared - {"epilogue"} if (PACKAGE / "kernels" / f"{name}.py").exists()}
    # The library's convolution has no file of its own to fuse with: it composes the elementwise passes.
    helpers -= {"bn", "pool"} if path.stem == "conv_library" else set()
    assert not helpers, f"{path.stem} imports the kernel file {helpers}"
    assert other <= {"torch", "triton", "contextlib", "functools", "pathlib", "math", "typing", "__future__"}
    source = path.read_text()
    assert "autotune" not in source and "environ" not in source and "atomic_add" not in source


def test_only_tests_and_benchmarks_import_testing():
    for path in PACKAGE.rglob("*.py"):
        assert "testing" not in _imports(path)[0]


def test_import_neither_needs_triton_nor_touches_a_device_or_the_library():
    code = """
import sys
sys.modules["triton"] = None
import fused_resnet, torch
assert not torch.cuda.is_initialized()
assert "fused_resnet.kernels" not in sys.modules and "torchvision" not in sys.modules
assert not hasattr(torch.ops.fused_resnet_cuda, "bn_join")
block = fused_resnet.FusedBottleneck(16, 4)
assert block(torch.randn(2, 16, 5, 5)).shape == (2, 16, 5, 5)
try:
    with fused_resnet.use("triton"):
        block(torch.randn(2, 16, 5, 5))
except fused_resnet.Unsupported as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
