"""Command line: `python -m fused_resnet info | explain | bench`."""

from __future__ import annotations

import argparse
import importlib.util
import sys

import torch

from . import __version__, models, plan
from .explain import device_for, explain

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _triton_status() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install triton (Linux only)"
    import triton

    return triton.__version__


def info() -> int:
    """Print what is installed, which kernels can run here, and why others cannot."""
    from .kernels import native

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    missing = native.unavailable()
    rows = [
        ("fused_resnet", __version__),
        ("torch", torch.__version__),
        ("CUDA devices", ", ".join(f"{c.name} (sm{c.major}{c.minor})" for c in cards) or "none"),
        ("triton", _triton_status()),
        ("CUDA library", "loaded" if missing is None else f"no: {missing}"),
    ]
    device = device_for(None)
    if device is None:
        rows.append(("kernels", "none without a CUDA device; the library's operators run, or use('reference')"))
    else:
        measured = len(plan.measurements(device))
        rows.append(("measured plans", f"{measured} for sm{device.arch}" + ("" if measured else ": the library runs")))
        rows.append(("tuned here", device.tuned.name if device.tuned else "nothing yet: fused_resnet.tune"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    builders = {name: getattr(models, name) for name in models.BUILDERS}
    if arguments.model not in builders:
        print(f"--model: expected one of {', '.join(builders)}, got {arguments.model!r}", file=sys.stderr)
        return 2
    with torch.device("meta"):
        model = builders[arguments.model]().train(arguments.train)
        x = torch.empty(arguments.batch, 3, arguments.size, arguments.size, dtype=_DTYPES[arguments.dtype])
    try:
        print(explain(model, x, arch=arguments.arch, impl=arguments.impl))
    except (ValueError, plan.Unsupported) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _bench(rest: list[str]) -> int:
    if importlib.util.find_spec("benchmarks") is None:
        print("bench: run it from the repository's folder, where benchmarks/ is", file=sys.stderr)
        return 2
    from benchmarks import run

    return run.main(rest)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_resnet", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed and which kernels can run here")
    explained = commands.add_parser("explain", help="which implementation runs each layer of a model, and why")
    explained.add_argument("--model", default="resnet50")
    explained.add_argument("--batch", type=_positive, default=256)
    explained.add_argument("--size", type=_positive, default=224, help="image height and width in pixels")
    explained.add_argument("--dtype", choices=_DTYPES, default="bf16")
    explained.add_argument("--arch", help="plan for this card, e.g. sm90; default: the one that is here")
    explained.add_argument("--impl", choices=plan.IMPLS, default="auto")
    explained.add_argument("--train", action="store_true", help="the training step instead of inference")
    commands.add_parser("bench", help="the benchmark; its own options follow (bench --help)", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return _bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return info() if arguments.command == "info" else _explain(arguments)


if __name__ == "__main__":
    sys.exit(main())
