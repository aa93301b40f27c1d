"""Checkpoints that survive a kill: written beside, synced, renamed, with a checksum in the name; the last two are kept.

A file is `checkpoint-<optimizer step>-<first 8 hex digits of its SHA-256>.pt`, so that damage is found before anything
is read from it, and `sha256sum` can check it, too.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)-([0-9a-f]{8})\.pt")


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def serialised(content: dict[str, Any]) -> memoryview:
    """What torch.save would write."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def write(path: Path, data: memoryview) -> None:
    """Leave the old file or the new one, whole, whenever the process or the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename, too
    finally:
        os.close(folder)


def find(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of an optimizer step, then remove all but the last two and what killed writers left."""
    data = serialised(state)
    path = folder / f"checkpoint-{step:08d}-{_digest(data)}.pt"
    write(path, data)
    for old in (*find(folder)[:-KEPT], *folder.glob("*.tmp")):
        old.unlink()
    return path


def _read(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    if _digest(data) != _NAME.fullmatch(path.name).group(2):
        raise ValueError(f"its SHA-256 begins with {_digest(data)}, not as its name says")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, None where there is none at all.

    Each corrupt one is named and renamed to `.corrupt`, out of the way of the next save.
    Raises ValueError if there are checkpoints and all of them are corrupt.
    """
    paths = find(folder)
    for path in reversed(paths):
        try:
            return path, _read(path)
        except Exception as error:  # torch.load raises many types for a damaged file
            reason, aside = str(error).partition("\n")[0], path.with_suffix(".corrupt")
            path.rename(aside)
            print(f"{path} is corrupt ({reason}): kept as {aside.name}, taking the one before it", file=sys.stderr)
    if paths:
        raise ValueError(f"--resume: every checkpoint in {folder} was corrupt")
    return None
