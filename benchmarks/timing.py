"""Times of a call, by CUDA events on a GPU, and their summary."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds(run: Callable[[], object], device: str) -> float:
    """One call."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles of times in seconds, two or more, as the fields of a row, in milliseconds."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_ms": median * 1e3, "q25_ms": low * 1e3, "q75_ms": high * 1e3, "n": len(times)}
