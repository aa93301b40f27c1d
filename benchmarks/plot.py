"""Draw a results file: speed of every contender relative to eager, and the loss curves of the parity check.

python -m benchmarks.plot out/results.json [out/results.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def draw(results: dict, path: Path) -> None:
    """Write a PNG of a results file's content; rows without a time are left out and named in the log of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row.get("median_ms")]
    cases = list(dict.fromkeys(_case(row) for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    parities = results.get("parity", [])
    figure, axes = plt.subplots(1, 2, figsize=(14, 1.5 + max(3.5, 0.28 * len(cases) * max(1, len(contenders)))))
    height = 0.8 / max(1, len(contenders))
    for i, contender in enumerate(contenders):
        speeds = {_case(row): row["images_per_s"] for row in rows if row["contender"] == contender}
        places = [j + i * height for j, case in enumerate(cases) if case in speeds]
        values = [speeds[case] for case in cases if case in speeds]
        bars = axes[0].barh(places, values, height, label=contender)
        axes[0].bar_label(bars, fmt=lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.1f}", fontsize=7, padding=2)
    axes[0].set_yticks([j + 0.4 - height / 2 for j in range(len(cases))], cases, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("images per second")
    environment = results["environment"]
    axes[0].set_title(f"{environment['card'] or environment['cpu']}, commit {environment['commit']}", fontsize=9)
    if rows:
        axes[0].legend(fontsize=8)
    for parity in parities:
        label = f"{parity['model']} {parity['dtype']}"
        (line,) = axes[1].plot(parity["losses_torchvision"], label=f"{label} torchvision", linewidth=3, alpha=0.4)
        axes[1].plot(parity["losses_fused"], "--", color=line.get_color(), label=f"{label} fused ({parity['impl']})")
    axes[1].set_xlabel("training step on digits")
    axes[1].set_ylabel("cross entropy (nats)")
    if parities:
        axes[1].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _case(row: dict) -> str:
    return f"{row['model']} {row['mode']} {row['dtype']} {row['batch']}x{row['size']}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not 1 <= len(argv) <= 2:
        print("usage: python -m benchmarks.plot RESULTS.json [PICTURE.png]", file=sys.stderr)
        return 2
    source = Path(argv[0])
    try:
        results = json.loads(source.read_text())
        results["rows"], results["environment"]["commit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{source}: not a results file: {error!r}", file=sys.stderr)
        return 2
    draw(results, Path(argv[1]) if len(argv) == 2 else source.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
