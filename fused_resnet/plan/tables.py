"""Tables of measurements, shipped as `plans/sm<arch>.json` or tuned on a user's card: read with warnings, written
atomically."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .cuda import CUDA_LAUNCHES
from .families import FAMILIES
from .problem import BLOCK_OPS, SCHEMES, STAGE_OP, Measured, Problem, TileConfig

TABLE_FORMAT = 2


def read_text(path: Path) -> str | None:
    """The text of a table; None if there is no file, or, with a warning that names it, if it cannot be read."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"{path}: not a usable plan table, going on without it ({error!r})", stacklevel=2)
        return None


def parse_entries(text: str | None, name: str, arch: int, origin: dict[str, str] | None = None) -> list[dict]:
    """The entries of a table's text as `table_entry` made them; none, with a warning that names it, if it is damaged.

    ``origin``: what the table's own origin must say, for instance the card; another one is not used. No text has no
    entries, without a warning.
    """
    if text is None:
        return []
    try:
        table = json.loads(text)
        if table["format"] != TABLE_FORMAT or table["arch"] != arch:
            raise ValueError(f"format {table['format']}, sm{table['arch']}; expected {TABLE_FORMAT}, sm{arch}")
        for key, value in (origin or {}).items():
            if table["origin"].get(key) != value:
                raise ValueError(f"measured with {key} {table['origin'].get(key)!r}; this is {value!r}")
        return list(table["entries"])
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{name}: not a usable plan table, going on without it ({error!r})", stacklevel=3)
        return []


def parse_table(
    text: str | None, name: str, arch: int, origin: dict[str, str] | None = None, where: str = ""
) -> dict[Problem, Measured]:
    """The measurements of a table's text, by problem; ``where`` they were taken, for people: default "sm<arch>".

    A text that is truncated or foreign, or of another architecture or ``origin``, yields nothing; an entry for a kernel
    or a configuration this version does not know is left out. Both warn, naming the table: a damaged table costs speed,
    never an answer.
    """
    measured: dict[Problem, Measured] = {}
    left_out = []
    for entry in parse_entries(text, name, arch, origin):
        try:
            problem, times = _read_entry(entry, where or f"sm{arch}")
            measured[problem] = times
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            left_out.append(str(error))
    if left_out:
        warnings.warn(f"{name}: {len(left_out)} entries left out, the first: {left_out[0]}", stacklevel=2)
    return measured


def load_table(path: Path, arch: int) -> dict[Problem, Measured]:
    """`parse_table` of a file written by `dump_table`; nothing, without a warning, if there is none."""
    return parse_table(read_text(path), str(path), arch)


def _read_entry(entry: dict, where: str) -> tuple[Problem, Measured]:
    problem = Problem(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry["problem"].items()})
    config = None if entry["config"] is None else TileConfig(**entry["config"])
    us = {str(backend): float(time) for backend, time in entry["us"].items()}
    known = {
        "triton": problem.op in BLOCK_OPS or any(problem.op in family.launches for family in FAMILIES),
        "cuda": problem.op in BLOCK_OPS or problem.op in CUDA_LAUNCHES,
        "library": True,
    }
    for backend in us:
        backend, _, scheme = backend.partition(" ")
        if scheme and (scheme not in SCHEMES or problem.op not in BLOCK_OPS):
            raise ValueError(f"unknown kernel: {backend} {scheme} {problem.op}")
        if not (known.get(backend) or (problem.op == STAGE_OP and backend.isdigit() and int(backend))):
            raise ValueError(f"unknown kernel: {backend} {problem.op}")
    for time in us.values():
        if not 0 < time < float("inf"):
            raise ValueError(f"{problem.op}: {time} us")
    if "library" not in us:
        raise ValueError(f"{problem.op}: no time of the library, so nothing to compare with")
    if "triton" in us and config is None and problem.op not in BLOCK_OPS:
        raise ValueError(f"{problem.op}: a Triton kernel without a tile")
    return problem, Measured(us, config, where)


def table_entry(problem: Problem, us: dict[str, float], config: TileConfig | None = None) -> dict:
    """One measured problem in the form of the table: microseconds by backend, and the fastest Triton kernel's tile."""
    tile = None if config is None else asdict(config)
    return {"problem": asdict(problem), "us": us, "config": tile}


def dump_table(path: Path, arch: int, origin: dict[str, str], entries: Iterable[dict]) -> None:
    """Write a table for `load_table`, atomically: a reader sees the old one or the new one.

    ``origin`` says where the numbers come from: card, commit, date, versions.
    """
    table = {"format": TABLE_FORMAT, "arch": arch, "origin": origin, "entries": list(entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(temporary, path)
