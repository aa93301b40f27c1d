"""Train an image classifier of fused_resnet: on one device, or with torchrun on many cards and hosts.

    python -m examples.imagenet --data imagenet --model resnet50
    torchrun --nproc-per-node=8 -m examples.imagenet --data imagenet --model resnet50

--data is a folder with `train` and `val`, each with a folder of images for every class, or with tar shards of KEY.jpg
and KEY.cls; or the word `synthetic`. Exit status: 0 at the end or after a checkpoint on SIGTERM, 1 if training fails,
2 for options or data that do not fit, before training.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fused_resnet
from fused_resnet import models, weights
from fused_resnet.plan import IMPLS

from . import checkpoint, ranks
from .data import Data, DataError, open_data, torch_loaders
from .train import DTYPES, Stopped, Trainer

_CIFAR = re.compile(r"cifar_resnet(\d+)")
# Options that change what is written, shown or waited for, but no number of the run.
_FREE = {
    "--checkpoint-every", "--classes", "--data", "--device", "--evaluate", "--log-every", "--max-unreadable",
    "--output", "--resume", "--tensorboard", "--weights", "--workers",
}  # fmt: skip


def _number(kind: type, low: float, high: float = float("inf"), open_end: bool = False):
    """An argparse type: a number in [low, high], or [low, high) with `open_end`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (open_end and value == high):
            bounds = f"from {low} on" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"expected a{'n integer' if kind is int else ' number'} {bounds}, got {text!r}"
            )
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.imagenet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, whole, positive = _number(int, 1), _number(int, 0), _number(float, 0)
    share = _number(float, 0, 1, open_end=True)

    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True, help='a folder with "train" and "val", or "synthetic"')
    group.add_argument("--classes", type=count, help="expected; default: the folders', 1000 for shards and synthetic")
    group.add_argument(
        "--synthetic-images", type=count, default=12800, help="of an epoch with --data synthetic; default: %(default)s"
    )
    group.add_argument("--loader", choices=("torch", "dali"), default="torch", help="who decodes; dali: NVIDIA DALI")
    group.add_argument("--workers", type=whole, help="processes that read; default: this process's share of the cores")
    group.add_argument(
        "--max-unreadable",
        type=whole,
        default=100,
        help="images skipped in an epoch before it stops; default: %(default)s",
    )
    group.add_argument(
        "--size", type=count, nargs="+", default=[224],
        help="height and width in pixels; several: progressive resizing, equal shares of the epochs; default: 224",
    )  # fmt: skip
    group.add_argument("--val-size", type=count, help="in validation; default: the last --size")
    group.add_argument("--augment", choices=("none", "trivial"), default="none", help="besides crop and flip")
    group.add_argument("--erase", type=share, default=0.0, help="probability of random erasing")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="resnet50",
        help=f"{', '.join(models.BUILDERS)}, or cifar_resnet20, ...; default: %(default)s",
    )
    group.add_argument("--unfused", action="store_true", help="torchvision's model (a cifar_resnet: unfused)")
    group.add_argument("--impl", choices=IMPLS, default="auto", help="as in fused_resnet.use")
    group.add_argument("--weights", help="to start from: a file or a name of torchvision's; fc may have other classes")
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all processes")

    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=count, default=90, help="default: %(default)s")
    group.add_argument(
        "--batch-size", type=count, default=256, help="of each process and backward pass; default: %(default)s"
    )
    group.add_argument("--accumulate", type=count, default=1, help="backward passes of an optimizer step")
    group.add_argument("--optimizer", choices=("sgd", "lars"), default="sgd", help="lars: timm's")
    group.add_argument(
        "--lr",
        type=positive,
        default=0.1,
        help="for 256 images in a step, scaled to what a step takes; default: %(default)s",
    )
    group.add_argument("--momentum", type=share, default=0.9, help="default: %(default)s")
    group.add_argument(
        "--weight-decay", type=positive, default=1e-4, help="not on norms and biases; default: %(default)s"
    )
    group.add_argument("--warmup-epochs", type=positive, help="linear warm-up; default: 5, but at most a tenth of all")
    group.add_argument("--label-smoothing", type=share, default=0.1, help="default: %(default)s")
    group.add_argument(
        "--ema", type=share, default=0.0, metavar="DECAY", help="average weights, validate and save these"
    )
    group.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    group.add_argument("--dtype", choices=DTYPES, help="of autocast; default: bf16 on CUDA devices, fp32 on CPUs")
    group.add_argument("--graph", action="store_true", help="the whole step as one CUDA graph, on one device")
    group.add_argument("--seed", type=whole, default=0)
    group.add_argument(
        "--deterministic", action="store_true", help="slower; a resumed run is exact on CUDA devices, too"
    )

    group = parser.add_argument_group("files")
    group.add_argument(
        "--output",
        type=Path,
        default=Path("out/imagenet"),
        help="folder of checkpoints and weights; default: %(default)s",
    )
    group.add_argument(
        "--checkpoint-every", type=count, default=1000, metavar="N", help="optimizer steps; default: %(default)s"
    )
    group.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output, if any")
    group.add_argument("--log-every", type=count, default=50, metavar="N", help="optimizer steps; default: %(default)s")
    group.add_argument("--tensorboard", action="store_true", help="write scalars to --output")
    group.add_argument("--evaluate", action="store_true", help="validate --weights and do not train")
    return parser


def _check(options, device: torch.device) -> None:
    """Raise ValueError or ImportError, naming the option, for what cannot run here."""
    cuda, cifar = device.type == "cuda", _CIFAR.fullmatch(options.model)
    if not cifar and options.model not in models.BUILDERS:
        raise ValueError(f"--model: expected {', '.join(models.BUILDERS)} or cifar_resnetN, got {options.model!r}")
    if options.warmup_epochs > options.epochs:
        raise ValueError(f"--warmup-epochs: at most --epochs {options.epochs}, got {options.warmup_epochs:g}")
    if options.evaluate and not options.weights:
        raise ValueError("--evaluate: expected --weights, the weights to validate")
    if options.sync_bn and not cuda and (options.unfused or cifar):
        raise ValueError(
            "--sync-bn: on CPUs only fused blocks have it; use a model of fused blocks alone, without --unfused"
        )
    if options.loader == "dali":
        if options.data == "synthetic" or options.augment != "none" or options.erase:
            raise ValueError("--loader: dali takes no --augment, --erase or synthetic data; use --loader torch")
        _need("nvidia.dali", "--loader: dali needs NVIDIA DALI", "nvidia-dali-cuda130")
    if options.optimizer == "lars":
        _need("timm", "--optimizer: lars is timm's", "timm")
    if options.tensorboard:
        _need("tensorboard", "--tensorboard: tensorboard is not installed", "tensorboard")
    if options.graph:
        for unfit, reason in (
            (not cuda, "a CUDA graph needs a CUDA device"),
            (ranks.world() > 1, "the all-reduces of several processes are not captured"),
            (options.dtype == "fp16", "the loss scaler decides on the host whether to step; use --dtype bf16"),
            (options.accumulate > 1, "the captured step is one backward pass; use --accumulate 1"),
            (options.optimizer != "sgd", "LARS has a learning rate that a graph would freeze; use --optimizer sgd"),
        ):
            if unfit:
                raise ValueError(f"--graph: {reason}")


def _need(module: str, complaint: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{complaint}: pip install {package} ({error})") from error


def _build(options, classes: int) -> nn.Module:
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    cifar = _CIFAR.fullmatch(options.model)
    if cifar:
        model = models.cifar_resnet(int(cifar.group(1)), num_classes=classes)
        if options.unfused:
            fused_resnet.unfuse(model)
    elif options.unfused:
        import torchvision

        model = getattr(torchvision.models, options.model)(num_classes=classes)
    else:
        model = getattr(models, options.model)(num_classes=classes)
    if options.weights:
        _load_weights(model, options.model, options.weights, options.evaluate)
    return model


def _load_weights(model: nn.Module, name: str, source: str, whole: bool) -> None:
    """Load them; a classifier for other classes stays as it was initialised, unless they must fit as a `whole`."""
    if name not in models.BUILDERS and not Path(source).exists():
        raise ValueError(f"--weights: {name} has no named weights, expected an existing file, got {source}")
    found = weights.resolve(name, source)
    state = weights.read_checkpoint(found) if isinstance(found, str) else found.get_state_dict(check_hash=True)
    own = model.state_dict()
    if not whole:
        state = state | {
            key: own[key] for key in ("fc.weight", "fc.bias") if key in state and state[key].shape != own[key].shape
        }
    weights.load(model, state, str(found))


def _prepare(options, device: torch.device) -> tuple[nn.Module, Data]:
    """Everything of this process that can be wrong before the ranks speak to each other."""
    options.dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if options.warmup_epochs is None:
        options.warmup_epochs = min(5, options.epochs / 10)
    _check(options, device)
    if options.workers is None:
        options.workers = min(16, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    make_loaders = torch_loaders
    if options.loader == "dali":
        from .dali import dali_loaders as make_loaders
    data = open_data(options, make_loaders, ranks.rank(), ranks.world(), device)
    model = _build(options, data.classes).to(device, memory_format=torch.channels_last)
    if not options.evaluate:
        options.output.mkdir(parents=True, exist_ok=True)
        found = checkpoint.find(options.output)
        if found and not options.resume:
            raise ValueError(f"--output: {options.output} has {found[-1].name}; use --resume or another folder")
    return model, data


def _named(options) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": value for name, value in vars(options).items()}


def _recipe(options, data: Data, device: torch.device) -> dict[str, Any]:
    """What must be equal for a run to be continued exactly."""
    chosen = {name: value for name, value in _named(options).items() if name not in _FREE}
    facts = {"data": data.digest, "classes": data.classes, "processes": ranks.world(), "device": device.type}
    return chosen | facts


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    names = [name for name in (ours | theirs) if ours.get(name) != theirs.get(name)]
    return ", ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in names)


def _agree(complaint: str | None, given: dict[str, Any]) -> str | None:
    """The first complaint of any rank, or what a rank was given that differs from rank 0; None if all is well."""
    everyone = ranks.gather((complaint, given))
    for rank, (theirs, options) in enumerate(everyone):
        if theirs is not None:
            return theirs if ranks.world() == 1 else f"rank {rank}: {theirs}"
        if options != everyone[0][1]:
            return f"rank {rank} differs from rank 0: {_differences(everyone[0][1], options)}"
    return None


def _resume(options, recipe: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """(state to continue from or None, complaint or None), read by rank 0 for all."""
    try:
        found = checkpoint.load_newest(options.output)
    except ValueError as error:
        return None, str(error)
    if found is None:
        print(f"--resume: no checkpoint in {options.output}, training from the beginning")
        return None, None
    path, state = found
    differences = _differences(recipe, state["recipe"])
    if differences:
        return None, f"--resume: {path} was written with {differences}"
    print(f"continuing from {path}")
    return state, None


def _set_up(options, device: torch.device) -> tuple[Trainer | None, str | None]:
    """(trainer, None), or (None, what is wrong), the same on every rank."""
    given, prepared, complaint, state = _named(options), None, None, None
    try:
        prepared = _prepare(options, device)
        given["data"] = prepared[1].digest
    except (ValueError, ImportError, OSError) as error:
        complaint = str(error)
    complaint = _agree(complaint, given)
    if complaint is not None:
        return None, complaint
    model, data = prepared
    recipe = _recipe(options, data, device)
    if options.resume:
        state, complaint = ranks.from_first(_resume(options, recipe) if ranks.rank() == 0 else None)
        if complaint is not None:
            return None, complaint
    trainer = Trainer(model, data, device, options, recipe)
    if state is not None:
        trainer.load_state(state)
    return trainer, None


def _run(options, device: torch.device) -> int:
    trainer, complaint = _set_up(options, device)
    first = ranks.rank() == 0
    if trainer is None:
        if first:
            print(complaint, file=sys.stderr)
        return 2
    try:
        if options.evaluate:
            accuracy = trainer.evaluate()
            if first:
                print(f"top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%}")
            return 0
        if options.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter

            trainer.writer = SummaryWriter(str(options.output), purge_step=trainer.steps_done + 1)
        trainer.fit()
    except Stopped:
        if first:
            print(f"SIGTERM: stopped after step {trainer.steps_done}; --resume continues")
    finally:
        trainer.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True
    try:
        device = ranks.start(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        with fused_resnet.use(options.impl):
            return _run(options, device)
    except (DataError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 1
    except fused_resnet.Unsupported as error:  # at the first step, if at all
        print(f"--impl: {error}", file=sys.stderr)
        return 2
    finally:
        ranks.stop()


if __name__ == "__main__":
    sys.exit(main())
