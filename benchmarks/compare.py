"""What got faster or slower between two results files: python -m benchmarks.compare OLD.json NEW.json

Rows of the same case, contender and layer are compared by their medians. One is a regression if it takes over 10 %
longer and its quartiles lie outside the old ones, or if it no longer runs. Exit status: 0, 1 for a regression, 2 for
files that are no results or have no row in common.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from .results import NotResults, case_name, key, load

_LIMIT = 1.10


class Change(NamedTuple):
    """One row, old and new: the ratio of their medians, infinite for one that no longer runs, and what to call it."""

    name: str
    ratio: float
    verdict: str
    detail: str


def _name(row: dict) -> str:
    layer = f" {row['layer']} {row['operator']} {row['problem']}" if "layer" in row else ""
    return f"{case_name(row)}{layer} {row['contender']}"


def _change(old: dict, new: dict) -> Change | None:
    if "error" in old:
        return None
    if "error" in new:
        return Change(_name(new), float("inf"), "no longer runs", new["error"])
    ratio = new["median_ms"] / old["median_ms"]
    verdict = ""
    if ratio > _LIMIT and new["q25_ms"] > old["q75_ms"]:
        verdict = "SLOWER"
    elif ratio < 1 / _LIMIT and new["q75_ms"] < old["q25_ms"]:
        verdict = "faster"
    spreads = (f"{row['median_ms']:.3f} ({row['q25_ms']:.3f}-{row['q75_ms']:.3f})" for row in (old, new))
    return Change(_name(new), ratio, verdict, " -> ".join(spreads) + " ms")


def compare(old: dict, new: dict) -> list[Change]:
    """The changes of all rows that both results have, slowest first."""
    before = {key(row): row for row in old["rows"]}
    pairs = [(before[key(row)], row) for row in new["rows"] if key(row) in before]
    changes = [change for pair in pairs if (change := _change(*pair)) is not None]
    return sorted(changes, key=lambda change: -change.ratio)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        print("usage: python -m benchmarks.compare OLD.json NEW.json", file=sys.stderr)
        return 2
    try:
        old, new = (load(Path(name)) for name in argv)
    except NotResults as error:
        print(error, file=sys.stderr)
        return 2
    for field in ("card", "torch", "triton", "driver", "commit"):
        one, other = (content["environment"].get(field) for content in (old, new))
        if one != other:
            print(f"{field}: {one} -> {other}")
    changes = compare(old, new)
    if not changes:
        print(f"{argv[0]} and {argv[1]} have no timed row in common", file=sys.stderr)
        return 2
    width = max(len(change.name) for change in changes)
    for name, ratio, verdict, detail in changes:
        print(f"{name.ljust(width)}  {ratio:5.2f} x  {verdict.ljust(14)}  {detail}")
    worse = sum(change.verdict in ("SLOWER", "no longer runs") for change in changes)
    better = sum(change.verdict == "faster" for change in changes)
    print(f"{len(changes)} rows: {worse} slower or gone, {better} faster, the others within 10 % or their spread")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
