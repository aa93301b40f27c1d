"""What a measurement was taken on: versions, card, clocks, commit; and writing results that survive a kill."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


class Absent(RuntimeError):
    """This contender cannot run here; the message says why."""


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit measured, with "-dirty" if the work tree differs from it; outside a checkout what the environment's
    COMMIT says, else "unknown"."""
    found = _command("git", "describe", "--always", "--dirty", "--abbrev=12")
    return found or os.environ.get("COMMIT") or "unknown"


def _first_card(fields: str) -> list[str] | None:
    """What nvidia-smi says of the first card now; None without it."""
    lines = _command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return lines.splitlines()[0].split(", ") if lines else None


def clocks() -> dict[str, str] | None:
    """SM and memory clock (MHz), power (W) and temperature (C) of the first card now; None without nvidia-smi."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    values = _first_card(fields)
    return None if values is None else dict(zip(fields.split(","), values))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def describe() -> dict:
    """The environment as it goes into a results file."""
    cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": (_first_card("driver_version") or [None])[0],
        "card": None if card is None else card.name,
        "arch": None if card is None else f"sm{card.major}{card.minor}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, content: dict) -> None:
    """Write atomically: a reader, or a run killed half-way, leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
