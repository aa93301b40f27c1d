"""Build of the optional C++/CUDA library; everything else is in pyproject.toml.

FUSED_RESNET_CUDA=auto (default) builds it where PyTorch and nvcc are, and otherwise says in one line why not;
0 never builds it; 1 fails where it cannot be built. FUSED_RESNET_CUDA_ARCHS names the architectures ("80;90a;100").
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

SOURCES = (
    "csrc/bindings.cpp",
    "csrc/bn.cu",
    "csrc/bottleneck_sm90.cu",
    "csrc/conv3x3_sm90.cu",
    "csrc/conv3x3_wgrad_sm90.cu",
    "csrc/hopper/tensor_map.cu",
)
ARCHS = "80;90a;100"


def cuda_home() -> str | None:
    """The toolkit's folder. A wrapper script on PATH misleads PyTorch's guess; nvcc itself knows where it lives."""
    nvcc = os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc") if "CUDA_HOME" in os.environ else shutil.which("nvcc")
    if nvcc is None or not os.access(nvcc, os.X_OK):
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr + said.stdout, re.MULTILINE)
    return str(Path(top.group(1)).resolve()) if top else str(Path(nvcc).resolve().parent.parent)


def extension() -> tuple[list, dict]:
    """ext_modules and cmdclass for the library. Raises RuntimeError with the reason where it cannot be built."""
    home = cuda_home()
    if home is None:
        raise RuntimeError("nvcc was not found (PATH, CUDA_HOME)")
    os.environ["CUDA_HOME"] = home
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension
    except ImportError as error:
        raise RuntimeError(
            f"PyTorch is not there while building ({error}); install it first and use --no-build-isolation"
        ) from error
    if torch.version.cuda is None:
        raise RuntimeError("this PyTorch is a CPU build")
    if torch.version.cuda.split(".")[0] != _toolkit_major(home):
        raise RuntimeError(f"PyTorch is built for CUDA {torch.version.cuda}, nvcc is CUDA {_toolkit_major(home)}")
    archs = os.environ.get("FUSED_RESNET_CUDA_ARCHS", ARCHS).split(";")
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise RuntimeError(f"FUSED_RESNET_CUDA_ARCHS: expected numbers like {ARCHS}, got {';'.join(archs)}")
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # The stable ABI of LibTorch 2.10: one binary serves every later PyTorch, and every Python from 3.10 on.
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    library = CUDAExtension(
        "fused_resnet._C",
        list(SOURCES),
        extra_compile_args={
            "cxx": ["-O3", "-std=c++17", *defines],
            "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas=-v", *gencode, *defines],
        },
        py_limited_api=True,
    )
    return [library], {"build_ext": BuildExtension}


def _toolkit_major(home: str) -> str:
    said = subprocess.run([os.path.join(home, "bin", "nvcc"), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", said)
    return found.group(1) if found else "unknown"


def choose() -> tuple[list, dict]:
    """What to build, as FUSED_RESNET_CUDA says."""
    wish = os.environ.get("FUSED_RESNET_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FUSED_RESNET_CUDA: expected auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return [], {}
    try:
        return extension()
    except RuntimeError as reason:
        if wish == "1":
            sys.exit(f"FUSED_RESNET_CUDA=1, but the CUDA library cannot be built: {reason}")
        print(f"fused_resnet: installing without the CUDA library: {reason}", file=sys.stderr)
        return [], {}


ext_modules, cmdclass = choose()
options = {"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {}
setup(ext_modules=ext_modules, cmdclass=cmdclass, options=options)
