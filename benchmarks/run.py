"""The main job: prove parity with torchvision, then time fused against it, in training and in inference.

    python -m benchmarks.run --models resnet50 --modes training inference --batches 32 256 --dtypes bf16

Contenders are interleaved, round by round, so that a card that heats up or throttles slows all of them alike. Every row
is written as soon as it is measured: results.json holds the environment, the parity checks and the rows, losses among
them, and results.png shows them. Exit status: 0, 1 if parity fails (nothing is timed then), 2 for a bad option.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import fused_resnet
from fused_resnet.models import BUILDERS
from fused_resnet.plan import IMPLS

from . import environment, parity, plot, roofline, timing
from .baselines import BASELINES, DTYPES, Absent, Case, fused, torchvision_model
from .results import Results, case_of

MODES = ("training", "inference")
_SECONDS_PER_CASE = {"cuda": 6.0, "cpu": 12.0}
_ROUNDS = 40
_COLUMNS = ("model", "mode", "dtype", "batch", "contender", "ms", "q25-q75", "images/s", "peak MB", "of roofline", "")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _warm_up(run: Callable[[], object], device: str) -> int | None:
    """Two calls, and the peak of memory that the second one needs beyond what lay there before; None on a CPU."""
    run()
    _synchronize(device)
    if device != "cuda":
        run()
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_case(
    case: Case, contenders: dict[str, Callable], ceilings: roofline.Ceilings, seconds: float
) -> list[dict]:
    """Build, warm up and time the contenders of one case in turn; one row each, with `error` where it could not run."""
    rows = {name: {**case._asdict(), "contender": name} for name in contenders}
    runs, peaks = {}, {}
    for name, build in contenders.items():
        try:
            runs[name] = build(case)
            peaks[name] = _warm_up(runs[name], case.device)
        except (Absent, fused_resnet.Unsupported) as error:
            rows[name]["error"] = str(error)
            runs.pop(name, None)
        except Exception as error:  # one contender's failure, out of memory or in a compiler, is a row like any other
            rows[name]["error"] = f"{type(error).__name__}: {str(error)[:300].partition(chr(10))[0]}"
            runs.pop(name, None)
        if case.device == "cuda":
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.monotonic() + seconds
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            times[name].append(timing.seconds(run, case.device))
        if time.monotonic() > stop and all(len(t) >= 3 for t in times.values()):
            break
    with torch.device("meta"):
        network = torchvision_model(case.model)
    dtype = str(DTYPES[case.dtype]).removeprefix("torch.")
    work = roofline.layers(network, (case.batch, 3, case.size, case.size), dtype)
    floor = roofline.floor_seconds(work.values(), ceilings, case.mode == "training")
    for name, seconds_each in times.items():
        rows[name] |= timing.summary(seconds_each)
        median = rows[name]["median_ms"] / 1e3
        rows[name] |= {
            "images_per_s": case.batch / median,
            "peak_bytes": peaks[name],
            "roofline_share": floor / median,
            "clocks": environment.clocks(),
        }
    return list(rows.values())


def table(rows: list[dict]) -> str:
    """Rows as aligned text; the last column is the speed relative to the case's eager row, or the error."""
    eager = {case_of(row): row["median_ms"] for row in rows if row["contender"] == "eager" and "median_ms" in row}
    lines = [_COLUMNS]
    for row in rows:
        head = (row["model"], row["mode"], row["dtype"], str(row["batch"]), row["contender"])
        if "error" in row:
            lines.append((*head, "-", "-", "-", "-", "-", row["error"]))
            continue
        base = eager.get(case_of(row))
        relative = "" if base is None else f"{base / row['median_ms']:.2f} x eager"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        spread = f"{row['q25_ms']:.2f}-{row['q75_ms']:.2f}"
        share = f"{100 * row['roofline_share']:.0f} %"
        lines.append((*head, f"{row['median_ms']:.2f}", spread, f"{row['images_per_s']:,.1f}", peak, share, relative))
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[-1]]).rstrip() for line in lines)


def _prove(arguments: argparse.Namespace, device: str, results: Results) -> bool:
    """Parity of every model, dtype and implementation to be timed; False if any check fails."""
    impls = [impl for impl in arguments.impl if impl != "none"]
    if device == "cpu" and impls == ["auto"]:
        impls = ["reference"]  # under "auto" a CPU runs the library's operators: nothing would be proven
    passed = True
    size = 96 if device == "cuda" else 48
    for model in arguments.models:
        for dtype in arguments.dtypes:
            for impl in impls:
                try:
                    outcome = parity.check(Case(model, "training", 16, dtype, size, device), impl)
                except fused_resnet.Unsupported as error:
                    print(f"parity {model} {dtype} {impl}: cannot run: {error}")
                    continue
                results.add("parity", outcome.to_json())
                passed &= outcome.passed
                print(f"parity {model} {dtype} {impl}: {'passed' if outcome.passed else 'FAILED'}")
                for check in outcome.checks:
                    mark = "" if check.passed else "   <- beyond the limit"
                    print(f"    {check.what:22} error {check.error:.2e}, torchvision {check.peer_error:.2e}{mark}")
                pairs = zip(outcome.losses_fused, outcome.losses_torchvision)
                shown = [f"{a:.3f}/{b:.3f}" for a, b in list(pairs)[::4]]
                print(f"    losses fused/torchvision, every fourth step: {'  '.join(shown)}")
    return passed


def _contenders(arguments: argparse.Namespace, device: str) -> dict[str, Callable]:
    chosen: dict[str, Callable] = {}
    for impl in arguments.impl:
        if impl != "none":
            chosen[f"fused-{impl}"] = fused(impl)
            if device == "cuda":
                chosen[f"fused-{impl}-graph"] = fused(impl, graph=True)
    return chosen | {name: BASELINES[name] for name in arguments.baselines}


def _check_options(arguments: argparse.Namespace, device: str) -> str | None:
    for option, values, allowed in (
        ("--models", arguments.models, BUILDERS),
        ("--modes", arguments.modes, MODES),
        ("--dtypes", arguments.dtypes, tuple(DTYPES)),
        ("--baselines", arguments.baselines, tuple(BASELINES)),
        ("--impl", arguments.impl, (*IMPLS, "none")),
    ):
        for value in values:
            if value not in allowed:
                return f"{option}: expected one of {', '.join(allowed)}, got {value!r}"
    for option, values in (("--batches", arguments.batches), ("--size", [arguments.size])):
        for value in values:
            if value < 1:
                return f"{option}: expected a positive integer, got {value}"
    if min(arguments.size, 32) < 32:
        return f"--size: expected at least 32 pixels, got {arguments.size}"
    if arguments.budget <= 0:
        return f"--budget: expected a positive number of seconds, got {arguments.budget}"
    if device == "cpu" and "fp16" in arguments.dtypes:
        return "--dtypes: fp16 needs a CUDA device, allowed here: fp32, bf16"
    return None


def _parse(argv: list[str] | None, device: str) -> argparse.Namespace:
    cuda = device == "cuda"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet50"] if cuda else ["resnet18", "resnet50"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="training, inference")
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 32] if cuda else [8])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"] if cuda else ["fp32"], help="bf16, fp16, fp32")
    parser.add_argument("--baselines", nargs="*", default=["eager", "graph", "compile"] if cuda else ["eager"])
    parser.add_argument("--impl", nargs="+", default=["auto"], help="implementations to time; none: baselines alone")
    parser.add_argument("--size", type=int, default=224 if cuda else 64, help="image height and width in pixels")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for results.json and results.png")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = _parse(argv, device)
    complaint = _check_options(arguments, device)
    if complaint is not None:
        print(complaint, file=sys.stderr)
        return 2
    start = time.monotonic()
    torch.backends.cudnn.benchmark = True
    if device == "cpu":
        print("No GPU here: a small configuration on the CPU. Its times say nothing about speed on a GPU.")
    results = Results(arguments.out / "results.json", arguments)
    if not _prove(arguments, device, results):
        print("parity failed: nothing is timed", file=sys.stderr)
        return 1
    ceilings = {name: roofline.measure_ceilings(device, DTYPES[name]) for name in arguments.dtypes}
    results.content["ceilings"] = {name: c._asdict() for name, c in ceilings.items()}
    cases = [
        Case(model, mode, batch, dtype, arguments.size, device)
        for model in arguments.models
        for mode in arguments.modes
        for dtype in arguments.dtypes
        for batch in arguments.batches
    ]
    contenders = _contenders(arguments, device)
    for case in tqdm(cases, desc="cases", disable=None):
        if time.monotonic() - start > arguments.budget:
            print(f"budget of {arguments.budget:.0f} s spent: stopped before {case}")
            break
        for row in measure_case(case, contenders, ceilings[case.dtype], _SECONDS_PER_CASE[device]):
            results.add("rows", row)
    print(table(results.content["rows"]))
    plot.draw(results.content, arguments.out / "results.png")
    print(f"{results.path} and results.png written, {time.monotonic() - start:.0f} s")
    if device == "cpu":
        print("Measured on a CPU: this says nothing about speed on a GPU.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
