"""The main job: tune, prove parity with torchvision, then time fused against it, in training and in inference.

    python -m benchmarks.run --models resnet50 --modes training inference --batches 32 256 --dtypes bf16

`auto` takes a fused kernel only where one was measured to be faster. So on a GPU, what no table has of the cases'
problems is measured first, into the user's own table (`fused_resnet.tune`): whole blocks, then operators, those that
move most bytes first, and the blocks again behind theirs. What is left when `--tune` is over stays the library's, and
the next run goes on. Parity is proven with the plans that are timed.

Contenders are interleaved, round by round, so that a card that heats up or throttles slows all of them alike. Every row
is written as soon as it is measured: results.json holds the environment, the parity checks and the rows, losses among
them, and results.png shows them. Exit status: 0, 1 if parity fails (nothing is timed then) or nothing could be timed, 2
for a bad option.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

import fused_resnet
from fused_resnet import ops, plan, tuned, tuning, workload
from fused_resnet.models import BUILDERS
from fused_resnet.plan import IMPLS

from . import environment, parity, plot, roofline, timing, tune
from .baselines import BASELINES, DTYPES, Absent, Case, fused, torchvision_model
from .results import Results, case_of, networks
from .tune import MODES

_TUNING_SECONDS = 300.0
_PARITY_SIZE_ON_CPU = 48
_SECONDS_PER_CASE = {"cuda": 6.0, "cpu": 12.0}
_ROUNDS = 40
_COLUMNS = ("model", "mode", "dtype", "batch", "contender", "ms", "q25-q75", "images/s", "peak MB", "of roofline", "")


def _forget() -> None:
    """Free what earlier contenders held. Compiled code goes once for all: it would be gone for those built before."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _set_aside() -> int:
    """Bytes that lie in the memory pools of CUDA graphs."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _prepare(build: Callable, case: Case) -> tuple[Callable[[], object], int | None]:
    """A contender, warmed up by three calls, for compiled CUDA graphs are recorded in the second one; and the peak of
    memory that a step needs beyond weights and optimizer, with what a graph set aside for it, None on a CPU."""
    if case.device != "cuda":
        run = build(case)
        for _ in range(3):
            run()
        return run, None
    before = _set_aside()
    run = build(case)
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    kept = max(0, _set_aside() - before)
    torch.cuda.reset_peak_memory_stats()
    lying = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return run, torch.cuda.max_memory_allocated() - lying + kept


def _failure(error: Exception) -> str:
    if isinstance(error, (Absent, fused_resnet.Unsupported)):
        return str(error)
    return f"{type(error).__name__}: {str(error)[:300].partition(chr(10))[0]}"


def measure_case(
    case: Case, contenders: dict[str, Callable], ceilings: roofline.Ceilings, seconds: float
) -> list[dict]:
    """Build, warm up and time the contenders of one case in turn; one row each, with `error` where it could not run."""
    rows = {name: {**case._asdict(), "contender": name} for name in contenders}
    runs, peaks = {}, {}
    _forget()
    for name, build in contenders.items():
        try:
            runs[name], peaks[name] = _prepare(build, case)
        except Exception as error:  # one contender's failure, out of memory or in a compiler, is a row like any other
            rows[name]["error"] = _failure(error)
        if case.device == "cuda":
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.monotonic() + seconds
    for _ in range(_ROUNDS):
        for name, run in list(runs.items()):
            try:
                times[name].append(timing.seconds(run, case.device))
            except Exception as error:  # the others' graphs may have taken its memory
                rows[name]["error"] = _failure(error)
                del runs[name], times[name]
        if time.monotonic() > stop and all(len(t) >= 3 for t in times.values()):
            break
    with torch.device("meta"):
        network = torchvision_model(case.model).eval()  # a batch of one, with 1x1 maps, has no statistics
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


def _spawn(words: list[str], seconds: float, log: Path) -> int:
    """`benchmarks.tune` in a process of its own, which a wrong kernel may take down: its exit status. TimeoutExpired:
    it outlasted its time, and was ended."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.tune", *words],
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    return done.returncode


def _card() -> plan.Device:
    return ops.device_of(torch.empty(0, device="cuda"), "auto")


def _left(tasks: list[workload.Task]) -> int:
    """How many of these are to be measured into the user's own table, by what the tables have now."""
    ops.forget_plans()
    card = _card()
    own = {} if card.tuned is None else card.tuned.measured
    return len(tuning.to_measure(tune.unshipped(tasks, card.arch), own))


def _fill_table(arguments: argparse.Namespace, seconds: float, log: Path) -> None:
    """Measure for these cases for so long; says if that ended badly, which leaves the rest to the library."""
    words = ["--own", "--budget", f"{seconds:.0f}", "--size", str(arguments.size)]
    for option in ("models", "batches", "dtypes", "modes"):
        words += [f"--{option}", *map(str, getattr(arguments, option))]
    try:
        # Half a minute more for its start and its last problem.
        status = _spawn(words, seconds + 30, log)
    except subprocess.TimeoutExpired:
        print(f"tuning: a problem took too long, see the end of {log}; going on without it", file=sys.stderr)
    else:
        if status not in (0, 3):
            print(f"tuning: ended with status {status}, see the end of {log}; going on", file=sys.stderr)


def _tune(arguments: argparse.Namespace, results: Results) -> None:
    """Measure what no table has of the cases' problems. Says what came of it, and puts it down in the results."""
    if "auto" not in arguments.impl or not arguments.tune:
        return
    if tuned.folder() is None:
        print("tuning: FUSED_RESNET_PLANS is empty, so there is no folder for a table: `auto` goes by the shipped one")
        return
    start, log = time.monotonic(), arguments.out / "tune.log"
    options = arguments.models, arguments.batches, arguments.dtypes, arguments.modes, arguments.size
    tasks = tune.choices(tune.problems(*options), _card())
    missing = left = _left(tasks)
    if missing:
        print(f"tuning: {missing} of {len(tasks)} problems to measure; {log} says how it goes", flush=True)
        _fill_table(arguments, max(1.0, arguments.tune - (time.monotonic() - start)), log)
        left = _left(tasks)
    measured, seconds = missing - left, time.monotonic() - start
    table = str(tuned.location(_card().arch, torch.cuda.get_device_name()))
    counts = {"problems": len(tasks), "measured": measured, "left": left}
    results.content["tuning"] = {**counts, "seconds": seconds, "table": table}
    results.write()
    print(
        f"tuning: {measured} of {len(tasks)} problems measured in {seconds:.0f} s into {table}, "
        f"{f'{left} left for the next run' if left else 'none left'}"
    )


def _show(name: str, outcome: parity.Parity) -> None:
    print(f"{name}: {'passed' if outcome.passed else 'FAILED'}")
    for check in outcome.checks:
        mark = "" if check.passed else "   <- beyond the limit"
        print(f"    {check.what:22} error {check.error:.2e}, torchvision {check.peer_error:.2e}{mark}")
    pairs = list(zip(outcome.losses_fused, outcome.losses_torchvision))
    if pairs:
        shown = "  ".join(f"{a:.3f}/{b:.3f}" for a, b in pairs[::4])
        print(f"    losses fused/torchvision, every fourth step: {shown}")


def _prove(arguments: argparse.Namespace, cases: list[Case], results: Results) -> bool:
    """Parity of every case and implementation to be timed, once for equal plans; False if any check fails."""
    device = cases[0].device
    card = _card() if device == "cuda" else None
    impls = [impl for impl in arguments.impl if impl != "none"]
    if device == "cpu" and impls == ["auto"]:
        impls = ["reference"]  # under "auto" a CPU runs the library's operators: nothing would be proven
    passed, proven = True, set()
    for case, impl, graph in product(cases, impls, (False, True)):
        small = case if device == "cuda" else case._replace(size=_PARITY_SIZE_ON_CPU)
        name = f"parity {case.model} {case.mode} {case.dtype} {impl}"
        if card is not None:
            name += f", by the plans of batch {case.batch}{' in a CUDA graph' if graph else ''}"
        try:
            plans = parity.plans_of(small, impl, card, graph)
            key = (*small._replace(batch=0), impl, str(sorted(plans.items(), key=str)))
            if key in proven:
                continue
            proven.add(key)
            outcome = parity.check(small, impl, plans, card)
        except fused_resnet.Unsupported as error:
            print(f"{name}: cannot run: {error}")
        except Exception as error:  # as bad as a wrong result; the others are still looked at
            traceback.print_exc()
            print(f"{name}: FAILED: {_failure(error)}")
            passed = False
        else:
            results.add("parity", {**outcome.to_json(), "plans_of_batch": case.batch, "graph": graph})
            passed &= outcome.passed
            _show(name, outcome)
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
    if min(arguments.batches) < 1:
        return f"--batches: expected a positive integer, got {min(arguments.batches)}"
    if arguments.size < 32:
        return f"--size: expected at least 32 pixels, got {arguments.size}"
    if not arguments.budget > 0:
        return f"--budget: expected a positive number of seconds, got {arguments.budget}"
    if not 0 <= arguments.tune < arguments.budget:
        return f"--tune: expected 0 or a number of seconds below --budget {arguments.budget:g}, got {arguments.tune:g}"
    if device == "cpu" and arguments.tune:
        return "--tune: needs a CUDA device; expected 0 here"
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
    parser.add_argument(
        "--tune",
        type=float,
        metavar="SECONDS",
        help="for what no table has measured yet, 0: never; default: on a GPU 300, but at most half of --budget",
    )
    arguments = parser.parse_args(argv)
    if arguments.tune is None:
        arguments.tune = min(_TUNING_SECONDS, arguments.budget / 2) if cuda else 0.0
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = _parse(argv, device)
    complaint = _check_options(arguments, device)
    if complaint is not None:
        print(complaint, file=sys.stderr)
        return 2
    start = time.monotonic()
    if device == "cpu":
        print("No GPU here: a small configuration on the CPU. Its times say nothing about speed on a GPU.")
    cases = [
        Case(model, mode, batch, dtype, arguments.size, device)
        for model in arguments.models
        for mode in arguments.modes
        for dtype in arguments.dtypes
        for batch in arguments.batches
    ]
    results = Results(arguments.out / "results.json", arguments)
    _tune(arguments, results)
    if not _prove(arguments, cases, results):
        print("parity failed: nothing is timed", file=sys.stderr)
        if "tuning" in results.content:
            print("an empty FUSED_RESNET_PLANS leaves out what was tuned here", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    ceilings = {name: roofline.measure_ceilings(device, DTYPES[name]) for name in arguments.dtypes}
    results.content["ceilings"] = {name: c._asdict() for name, c in ceilings.items()}
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
    if not networks(results.content):
        print("nothing was timed", file=sys.stderr)
        return 1
    if device == "cpu":
        print("Measured on a CPU: this says nothing about speed on a GPU.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
