"""Put the committed results into the README: python -m benchmarks.figures

Reads benchmarks/results/*.json, draws each as a PNG beside it, and rewrites what stands between the two comments
`figures: begin` and `figures: end` of README.md: where and on what it was measured, every case against its fastest
peer, and what is slower than it. Exit status: 0, or 2 for a file that is no results file or a README without the marks.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import plot
from .results import NotResults, case_name, case_of, layers, load, networks

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NOTHING = "Speed on a GPU: not measured yet."
_ROOT = Path(__file__).parent.parent


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rule = "|".join(["---"] * len(head))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def _origin(environment: dict) -> str:
    versions = [
        f"{name} {environment[name]}"
        for name in ("torch", "triton", "cuda", "cudnn", "driver")
        if environment.get(name)
    ]
    where = environment.get("card") or f"{environment.get('cpu')} (a CPU: this says nothing about a GPU)"
    date = (environment.get("date") or "").partition("T")[0]
    return f"{where}; {', '.join(versions)}; commit {environment['commit']}{f'; {date}' if date else ''}."


def _whole(rows: list[dict]) -> str:
    """Each case's fastest fused contender against its fastest peer, and the cases in which the peer is faster."""
    lines, lost = [], []
    for case in dict.fromkeys(map(case_of, rows)):
        mine = [row for row in rows if case_of(row) == case]
        ours = [row for row in mine if row["contender"].startswith("fused-")]
        peers = [row for row in mine if row not in ours]
        if not (ours and peers):
            continue
        our, peer = (max(group, key=lambda row: row["images_per_s"]) for group in (ours, peers))
        ratio = our["images_per_s"] / peer["images_per_s"]
        speeds = (f"{row['images_per_s']:,.0f} ({row['contender']})" for row in (our, peer))
        memory = " / ".join(f"{row['peak_bytes'] / 1e9:.1f}" if row.get("peak_bytes") else "-" for row in (our, peer))
        lines.append((case_name(our), *speeds, f"{ratio:.2f}", memory, f"{100 * our['roofline_share']:.0f} %"))
        if ratio < 1:
            lost.append(f"{case_name(our)} ({peer['contender']}, {1 / ratio:.2f} x)")
    head = ("case", "fused, images/s", "fastest peer, images/s", "speed-up", "memory of a step, GB", "of the roofline")
    said = f"Slower than the fastest peer: {'; '.join(lost)}." if lost else "No case is slower than its fastest peer."
    return f"{_table(head, lines)}\n\n{said}" if lines else ""


def _single(rows: list[dict]) -> str:
    """Each layer's fastest fused kernel against the library's, the slower ones by name."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((*case_of(row), row["operator"], row["problem"]), {})[row["contender"]] = row
    compared, lost = 0, []
    for group in groups.values():
        library = group.pop("library", None)
        if library is None or not group:
            continue
        compared += 1
        best = min(group.values(), key=lambda row: row["median_ms"])
        ratio = best["median_ms"] / library["median_ms"]
        if ratio > 1:
            lost.append((best["layer"], best["operator"], best["problem"], best["contender"], f"{ratio:.2f} x"))
    if not compared:
        return ""
    case = case_name(rows[0])
    said = f"Of {compared} operators and blocks of {case}, {compared - len(lost)} are faster fused than the library's"
    if not lost:
        return f"{said}."
    head = ("layer", "operator", "problem", "kernel", "time, of the library's")
    return f"{said}; under `auto` the library runs the others:\n\n{_table(head, lost)}"


def section(path: Path, readme: Path) -> str:
    """The text on one results file, whose picture is drawn beside it."""
    content = load(path)
    picture = path.with_suffix(".png")
    plot.draw(content, picture)
    link = os.path.relpath(picture, readme.parent).replace(os.sep, "/")
    parts = [_whole(networks(content)), _single(layers(content))]
    return "\n\n".join([_origin(content["environment"]), *filter(None, parts), f"![{path.stem}]({link})"])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--results", type=Path, default=_ROOT / "benchmarks" / "results", help="folder of results files"
    )
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md")
    arguments = parser.parse_args(argv)
    text = arguments.readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{arguments.readme}: expected {BEGIN} and, behind it, {END}", file=sys.stderr)
        return 2
    try:
        sections = [section(path, arguments.readme) for path in sorted(arguments.results.glob("*.json"))]
    except NotResults as error:
        print(error, file=sys.stderr)
        return 2
    body = "\n\n".join(sections) or NOTHING
    arguments.readme.write_text(f"{before}{begin}\n{body}\n{end}{after}")
    print(f"{arguments.readme}: {len(sections)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
