"""Tables of measured winners, `plans/sm<arch>.json`: read with warnings, written atomically."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from .cuda import CUDA_LAUNCHES
from .families import FAMILIES
from .problem import BLOCK_OPS, Problem, TileConfig

TABLE_FORMAT = 1


class Winner(NamedTuple):
    """One measured entry of a table; ``config`` of the fastest Triton kernel even where another backend won."""

    backend: str
    config: TileConfig | None
    reason: str


def read_entries(path: Path, arch: int) -> list[dict]:
    """The entries of a table as `table_entry` made them; none, with a warning that names the file, if it is damaged.

    A missing file has none, without a warning.
    """
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text())
        if table["format"] != TABLE_FORMAT or table["arch"] != arch:
            raise ValueError(f"format {table['format']}, sm{table['arch']}; expected {TABLE_FORMAT}, sm{arch}")
        return list(table["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path}: not a usable plan table, going on without it ({error!r})", stacklevel=3)
        return []


def load_table(path: Path, arch: int) -> dict[Problem, Winner]:
    """Read a table written by `dump_table`.

    A file that is truncated or foreign, or was measured on another architecture, yields nothing; an entry for a kernel
    or a configuration this version does not know is left out. Both warn, naming the file: a damaged table costs speed,
    never an answer.
    """
    winners: dict[Problem, Winner] = {}
    left_out = []
    for entry in read_entries(path, arch):
        try:
            problem, winner = _read_entry(entry, arch)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            left_out.append(str(error))
        else:
            winners[problem] = winner
    if left_out:
        warnings.warn(f"{path}: {len(left_out)} entries left out, the first: {left_out[0]}", stacklevel=2)
    return winners


def _read_entry(entry: dict, arch: int) -> tuple[Problem, Winner]:
    problem = Problem(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry["problem"].items()})
    backend, config = entry["backend"], entry["config"]
    known = {
        "triton": problem.op in BLOCK_OPS or any(problem.op in family.launches for family in FAMILIES),
        "cuda": problem.op in CUDA_LAUNCHES,
        "library": True,
    }
    if not known.get(backend):
        raise ValueError(f"unknown kernel: {backend} {problem.op}")
    if backend == "triton" and config is None and problem.op not in BLOCK_OPS:
        raise ValueError(f"{problem.op}: a Triton winner without a tile")
    reason = f"measured on sm{arch}: {float(entry['us']):.1f} us, library {float(entry['library_us']):.1f} us"
    return problem, Winner(backend, None if config is None else TileConfig(**config), reason)


def table_entry(problem: Problem, backend: str, config: TileConfig | None, us: float, library_us: float) -> dict:
    """One measured winner in the form of the table; times in microseconds."""
    tile = None if config is None else asdict(config)
    return {"problem": asdict(problem), "backend": backend, "config": tile, "us": us, "library_us": library_us}


def dump_table(path: Path, arch: int, origin: dict[str, str], entries: Iterable[dict]) -> None:
    """Write a table for `load_table`, atomically: a reader sees the old one or the new one.

    ``origin`` says where the numbers come from: card, commit, date, versions.
    """
    table = {"format": TABLE_FORMAT, "arch": arch, "origin": origin, "entries": list(entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(temporary, path)
