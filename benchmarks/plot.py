"""Draw a results file: speed and memory of every contender by case, layers against their floor, loss curves.

python -m benchmarks.plot out/results.json [out/results.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from .results import NotResults, case_name, case_of, layers, load, networks


def _bars(axis, rows: list[dict], name_of, value_of, text_of) -> None:
    """One horizontal bar per row, with a text at its end; rows of one name side by side, a color per contender."""
    groups = list(dict.fromkeys(map(name_of, rows)))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    height = 0.8 / len(contenders)
    for i, contender in enumerate(contenders):
        mine = [row for row in rows if row["contender"] == contender]
        places = [groups.index(name_of(row)) + i * height for row in mine]
        bars = axis.barh(places, [value_of(row) for row in mine], height, label=contender)
        axis.bar_label(bars, [text_of(row) for row in mine], fontsize=7, padding=2)
    axis.set_yticks([j + 0.4 - height / 2 for j in range(len(groups))], groups, fontsize=8 if len(groups) < 30 else 6)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlim(0, 1.25 * max(map(value_of, rows)))
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _speed(axis, rows: list[dict]) -> None:
    """Speed relative to eager, or images per second where a case has no eager row; images per second at the bars."""
    eager = {case_of(row): row["images_per_s"] for row in rows if row["contender"] == "eager"}
    relative = all(case_of(row) in eager for row in rows)

    def value(row: dict) -> float:
        return row["images_per_s"] / eager[case_of(row)] if relative else row["images_per_s"]

    def text(row: dict) -> str:
        speed = row["images_per_s"]
        return f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.1f}/s"

    _bars(axis, rows, case_name, value, text)
    if relative:
        axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("speed relative to eager" if relative else "images per second")


def _memory(axis, rows: list[dict]) -> None:
    def gigabytes(row: dict) -> float:
        return row["peak_bytes"] / 1e9

    _bars(axis, rows, case_name, gigabytes, lambda row: f"{gigabytes(row):.1f}")
    axis.set_xlabel("peak memory of a step (GB)")


def _layer(row: dict) -> str:
    return f"{row['layer']} {row['operator']} {row['problem']}"


def _floors(axis, rows: list[dict]) -> None:
    def share(row: dict) -> float:
        return 100 * row["roofline_share"]

    _bars(axis, rows, _layer, share, lambda row: f"{1e3 * row['median_ms']:.0f} us, {share(row):.0f} %")
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlabel("share of the floor (%)")


def _losses(axis, parities: list[dict]) -> None:
    for parity in parities:
        label = f"{parity['model']} {parity['dtype']}"
        (line,) = axis.plot(parity["losses_torchvision"], label=f"{label} torchvision", linewidth=3, alpha=0.4)
        axis.plot(parity["losses_fused"], "--", color=line.get_color(), label=f"{label} fused ({parity['impl']})")
    axis.set_xlabel("training step on digits")
    axis.set_ylabel("cross entropy (nats)")
    axis.legend(fontsize=8)


def draw(results: dict, path: Path) -> None:
    """Write a PNG of what a results file holds; rows without a time are left out and named in the log of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole, single = networks(results), layers(results)
    parities = [parity for parity in results.get("parity", []) if parity["losses_fused"]]
    measured = [row for row in whole if row.get("peak_bytes")]
    panels = [(_speed, whole), (_memory, measured), (_floors, single), (_losses, parities)]
    panels = [(panel, content) for panel, content in panels if content]
    height = 1.5 + max(3.5, 0.25 * len(whole), 0.2 * len(single))
    columns = max(1, len(panels))
    figure, axes = plt.subplots(1, columns, figsize=(8 * columns, height), squeeze=False, layout="constrained")
    for axis, (panel, content) in zip(axes[0], panels):
        panel(axis, content)
    environment = results["environment"]
    figure.suptitle(
        f"{environment['card'] or environment['cpu']}, commit {environment['commit']}, torch {environment['torch']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not 1 <= len(argv) <= 2:
        print("usage: python -m benchmarks.plot RESULTS.json [PICTURE.png]", file=sys.stderr)
        return 2
    source = Path(argv[0])
    try:
        results = load(source)
    except NotResults as error:
        print(error, file=sys.stderr)
        return 2
    draw(results, Path(argv[1]) if len(argv) == 2 else source.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
