"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them.

`record` runs a launch function on meta tensors and notes what it would have launched, with the specialisation that
Triton's launcher would have applied; `compile_specs` compiles such notes for several architectures in subprocesses
(the interpreter, which the tests use, and the compiler exclude each other in one process).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

_POINTERS = {
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.float32": "*fp32",
    "torch.float64": "*fp64",
    "torch.uint8": "*u8",
    "torch.int64": "*i64",
}
_TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Spec:
    """One compilation: kernel ``module``.``name``, types, constants and 16-divisible arguments, and the options."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a Spec: registers and spilled bytes per thread, shared memory (bytes) per block."""

    spec: Spec
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_core: bool
    error: str = ""


def make_spec(module: str, kernel, arguments: dict[str, object], options: dict[str, int]) -> Spec:
    """The Spec of launching ``kernel`` (compiled or interpreted) with ``arguments`` by name.

    Tensors become 16-byte aligned pointers, None and constexpr parameters constants, and integers are specialised as
    the launcher does: 1 is a constant, a multiple of 16 is marked, unless the kernel says do_not_specialize.
    """
    fixed = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize") or ()
    annotations = kernel.fn.__annotations__
    signature, constexprs, divisible = [], [], []
    for name in kernel.arg_names:
        value = arguments[name]
        constant = "constexpr" in str(annotations.get(name, "")) or value is None
        if constant or (type(value) is int and value == 1 and name not in fixed):
            kind = "constexpr"
            constexprs.append((name, value))
        elif isinstance(value, int):
            kind = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                divisible.append(name)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = _POINTERS[str(value.dtype)]
            divisible.append(name)
        signature.append((name, kind))
    return Spec(
        module, kernel.__name__, tuple(signature), tuple(constexprs), tuple(divisible), tuple(sorted(options.items()))
    )


class _Recorder:
    """Stands in for a kernel: takes the launch, runs nothing."""

    def __init__(self, module, kernel, specs: list[Spec]) -> None:
        self.module, self.kernel, self.specs = module, kernel, specs

    def __getitem__(self, grid):
        assert all(extent > 0 for extent in grid), grid
        return self._launch

    def _launch(self, *args, **kwargs) -> None:
        arguments = dict(zip(self.kernel.arg_names, args))
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in kwargs}
        self.specs.append(make_spec(self.module.__name__, self.kernel, arguments | kwargs, options))


def record(launch, *args, **kwargs) -> list[Spec]:
    """What ``launch(*args, **kwargs)`` would launch, in whichever kernel file; its tensors are best meta tensors."""
    files = [module for name, module in sys.modules.items() if name.startswith("fused_resnet.kernels.")]
    kernels = [(module, *item) for module in files for item in vars(module).items() if item[0].endswith("_kernel")]
    specs: list[Spec] = []
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _Recorder(module, kernel, specs))
        launch(*args, **kwargs)
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return specs


def compile_specs(specs: Iterable[Spec], archs: Iterable[int], processes: int = 2) -> list[Compiled]:
    """Compile every distinct spec for every architecture; a failure comes back as a Compiled with its ``error``."""
    jobs = [(spec, arch) for spec in dict.fromkeys(specs) for arch in archs]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    running = []
    for first in range(processes):
        share = jobs[first::processes]
        worker = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        worker.stdin.write(json.dumps([{"spec": asdict(spec), "arch": arch} for spec, arch in share]))
        worker.stdin.close()
        running.append((worker, share))
    results = []
    for worker, share in running:
        lines = worker.stdout.read().splitlines()
        assert worker.wait() == 0 and len(lines) == len(share), f"compiling process ended early: {lines[-1:]}"
        results += [Compiled(spec, arch, **json.loads(line)) for (spec, arch), line in zip(share, lines)]
    return results


def _compile(job: dict) -> dict:
    """Compile one job in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec, arch = job["spec"], job["arch"]
    kernel = getattr(importlib.import_module(spec["module"]), spec["name"])
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in spec["divisible"]}
    source = ASTSource(kernel, dict(spec["signature"]), dict(spec["constexprs"]), attrs)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(spec["options"]))
    except Exception as error:
        empty = {"registers": 0, "stack": 0, "shared": 0, "tensor_core": False}
        return {**empty, "error": f"{type(error).__name__}: {error}"[:2000]}
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "tensor_core": _TENSOR_CORE[arch] in compiled.asm["ptx"],
    }


if __name__ == "__main__":
    for entry in json.load(sys.stdin):
        print(json.dumps(_compile(entry)), flush=True)
