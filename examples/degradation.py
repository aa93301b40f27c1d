"""The paper's experiment: deeper plain networks train worse, deeper residual networks do not (He et al. 2015, 4.2).

    python -m examples.degradation                                  # scikit-learn's digits: minutes on two CPU cores
    python -m examples.degradation --data cifar10 --folder DIR      # CIFAR-10 from files that are there already
    python -m examples.degradation --full --folder DIR              # CIFAR-10 with the paper's schedule, for a GPU

Networks of 6n + 2 layers, plain and with shortcuts A, B and C, see the same batches in the same order; plain and A even
start from the same weights. Training error is that of the mini-batches of an epoch, as they were trained on; test error
is measured after each epoch. Both are drawn to degradation.png. degradation.json is written after each network, so an
interrupted run goes on where it stopped. What each network costs is printed beside the paper's published figures.

The digits (1797 images of 8 x 8 pixels, enlarged to 16 x 16) show how hard a network is to optimise within a few
hundred steps. What depth is good for they do not show: 20 layers fit them, one test image is 0.2 %, and none of their
numbers compares with the paper's on CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fused_resnet
from benchmarks.environment import describe, write_json
from benchmarks.parity import digits

SHORTCUTS = ("plain", "A", "B", "C")
# The paper's tables 1, 2, 3 and 6. Depth: (million parameters, test error in % on CIFAR-10), shortcut A.
PAPER_CIFAR = {
    20: (0.27, 8.75), 32: (0.46, 7.51), 44: (0.66, 7.17), 56: (0.85, 6.97), 110: (1.7, 6.43), 1202: (19.4, 7.93),
}  # fmt: skip
# (depth, shortcut): (10^9 multiply-adds, top-1 error in % on ImageNet's validation images, 10 crops).
PAPER_IMAGENET = {
    (18, "plain"): (1.8, 27.94), (18, "A"): (1.8, 27.88),
    (34, "plain"): (3.6, 28.54), (34, "A"): (3.6, 25.03), (34, "B"): ("", 24.52), (34, "C"): ("", 24.19),
    (50, "B"): (3.8, 22.85), (101, "B"): (7.6, 21.75), (152, "B"): (11.3, 21.43),
}  # fmt: skip
_DIGITS_TRAINED, _DIGITS_SIZE = 1297, 16
_WARMED_UP_DEPTH = 110
_CIFAR_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


@dataclass(frozen=True)
class Settings:
    """What all networks of one results file share."""

    data: str
    iterations: int
    batch: int
    learning_rate: float
    seed: int = 0
    momentum: float = 0.9
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Images:
    """Training and test images [N, 3, H, W] in fp32 and their labels; `augment`: random crops and flips in training."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    augment: bool

    def to(self, device: str) -> Images:
        """The same on a device."""
        tensors = (self.train, self.train_labels, self.test, self.test_labels)
        return Images(*(t.to(device) for t in tensors), self.augment)


def _images(x: Tensor, labels: Tensor, trained: int, augment: bool) -> Images:
    """The first `trained` images for training, the others for the test, less the per-pixel mean of the first."""
    mean, deviation = x[:trained].mean(0), x[:trained].std()
    x = ((x - mean) / deviation).contiguous(memory_format=torch.channels_last)
    return Images(x[:trained], labels[:trained], x[trained:], labels[trained:], augment)


def load_digits() -> Images:
    """scikit-learn's handwritten digits, 1297 for training and the last 500 for the test. A flipped digit is no digit
    any more, so nothing is augmented."""
    x, labels = digits(1797, _DIGITS_SIZE)
    return _images(x, labels, _DIGITS_TRAINED, augment=False)


def load_cifar10(folder: Path | None) -> Images:
    """CIFAR-10 from its python batches in `folder` or in its cifar-10-batches-py; nothing is downloaded.

    The batches are pickles: unpickling runs code, so the folder must be one that is trusted.
    Raises ValueError, naming the folder or file and what was expected, if batches are missing or unreadable.
    """
    expected = f"CIFAR-10's python version, that is the files {', '.join(_CIFAR_BATCHES)}"
    if folder is None:
        raise ValueError(f"--folder: needed for CIFAR-10: a folder with {expected}, or with cifar-10-batches-py")
    inside = folder / "cifar-10-batches-py"
    source = inside if inside.is_dir() else folder
    missing = [name for name in _CIFAR_BATCHES if not (source / name).is_file()]
    if missing:
        raise ValueError(f"--folder: expected {expected}, in {folder} or {inside}; missing: {', '.join(missing)}")
    pixels, labels = [], []
    for name in _CIFAR_BATCHES:
        try:
            with open(source / name, "rb") as file:
                batch = pickle.load(file, encoding="bytes")
            pixels.append(torch.as_tensor(batch[b"data"]).view(len(batch[b"labels"]), 3, 32, 32))
            labels.append(torch.as_tensor(batch[b"labels"]))
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"--folder: {source / name} is no batch of CIFAR-10: {error!r}") from error
    trained = sum(map(len, labels[:-1]))
    return _images(torch.cat(pixels).float(), torch.cat(labels), trained, augment=True)


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image padded by 4 zero pixels, cropped to its size at random, and mirrored with probability 1/2.

    x [N, C, H, W] on any device -> the same shape in channels_last memory. `generator` draws on the CPU.
    """
    n, _, height, width = x.shape
    shifts = torch.randint(9, (2, n, 1), generator=generator)
    rows, columns = shifts[0] + torch.arange(height), shifts[1] + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(n)[:, None, None]
    index = [i.to(x.device) for i in (which, rows[:, :, None], columns[:, None, :])]  # broadcast to [N, H, W]
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return padded[index[0], index[1], index[2]].permute(0, 3, 1, 2)


def learning_rate(iteration: int, depth: int, settings: Settings) -> float:
    """The paper's schedule for any number of iterations: divided by 10 at 1/2 and 3/4 of them (32k and 48k of 64k);
    from 110 layers on the first 1/160 (400 of 64k) warm up at a tenth."""
    total = settings.iterations
    if depth >= _WARMED_UP_DEPTH and iteration < total // 160:
        return settings.learning_rate / 10
    return settings.learning_rate / 10 ** ((2 * iteration >= total) + (4 * iteration >= 3 * total))


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of mini-batches without end, every image once in each epoch."""
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def build(depth: int, shortcut: str) -> nn.Module:
    """The paper's CIFAR network; `shortcut` is one of SHORTCUTS."""
    return fused_resnet.cifar_resnet(depth, None if shortcut == "plain" else shortcut)


@torch.no_grad()
def error_rate(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of wrong predictions in percent, with BatchNorm's running statistics."""
    model.eval()
    wrong = sum((model(part).argmax(1) != y).sum() for part, y in zip(x.split(500), labels.split(500)))
    model.train()
    return 100 * float(wrong) / len(x)


def train(
    depth: int, shortcut: str, images: Images, settings: Settings, progress: Callable[[], object] = lambda: None
) -> dict:
    """Train one network on the device of the images; `progress` is called after each iteration.

    Returns its curves: `iterations`, and at each of them `train_error` (of the mini-batches since the one before) and
    `test_error` in percent.
    """
    torch.manual_seed(settings.seed)
    x, labels = images.train, images.train_labels
    model = build(depth, shortcut).to(x.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.0, settings.momentum, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(settings.seed)
    epoch = -(-len(x) // settings.batch)
    curves: dict[str, list] = {"iterations": [], "train_error": [], "test_error": []}
    wrong, seen = torch.zeros((), dtype=torch.long, device=x.device), 0
    for iteration, rows in zip(range(settings.iterations), batches(len(x), settings.batch, generator)):
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, depth, settings)
        rows = rows.to(x.device)
        inputs = crop_and_flip(x[rows], generator) if images.augment else x[rows]
        logits = model(inputs)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        wrong += (logits.argmax(1) != labels[rows]).sum()
        seen += len(rows)
        if (iteration + 1) % epoch == 0 or iteration + 1 == settings.iterations:
            curves["iterations"].append(iteration + 1)
            curves["train_error"].append(100 * float(wrong) / seen)
            curves["test_error"].append(error_rate(model, images.test, images.test_labels))
            wrong, seen = torch.zeros_like(wrong), 0
        progress()
    return curves


def costs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Parameters, and multiply-adds of one forward, of a model built on any device."""
    total = fused_resnet.profile(model.eval(), shape).total
    return {"parameters": total.parameters, "multiply_adds": total.multiply_adds}


def _aligned(rows: list[tuple]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths)) for row in rows)


def imagenet_table() -> str:
    """Cost of the paper's ImageNet networks and of its two blocks (figure 5), beside the paper's figures."""
    rows: list[tuple] = [("network", "shortcut", "parameters", "multiply-adds", "paper: 10^9", "paper: top-1 error %")]
    with torch.device("meta"):
        for (depth, shortcut), (multiply_adds, error) in PAPER_IMAGENET.items():
            chosen = None if shortcut == "plain" else shortcut
            cost = costs(getattr(fused_resnet, f"resnet{depth}")(shortcut=chosen), (1, 3, 224, 224))
            rows.append(
                (f"ResNet-{depth}", shortcut, f"{cost['parameters']:,}", f"{cost['multiply_adds']:,}",
                 multiply_adds, f"{error:.2f}")
            )  # fmt: skip
        for name, block, channels in (
            ("basic block", fused_resnet.FusedBasicBlock(64, 64), 64),
            ("bottleneck", fused_resnet.FusedBottleneck(256, 64), 256),
        ):
            cost = costs(nn.Sequential(block), (1, channels, 56, 56))
            name = f"{name}, {channels} channels, 56x56"
            rows.append((name, "identity", f"{cost['parameters']:,}", f"{cost['multiply_adds']:,}", "", ""))
    note = "Multiply-adds of 50, 101 and 152: stride on the 3x3 convolution here, on the first 1x1 in the paper."
    return f"{_aligned(rows)}\n{note}"


def results_table(networks: list[dict]) -> str:
    """Cost and last errors of the networks trained, beside the paper's figures for shortcut A."""
    rows: list[tuple] = [
        ("depth", "shortcut", "parameters", "paper: 10^6", "multiply-adds", "train error %", "test error %",
         "paper: test error % (CIFAR-10)")
    ]  # fmt: skip
    for n in sorted(networks, key=lambda n: (SHORTCUTS.index(n["shortcut"]), n["depth"])):
        size, error = PAPER_CIFAR.get(n["depth"], ("", "")) if n["shortcut"] == "A" else ("", "")
        rows.append(
            (n["depth"], n["shortcut"], f"{n['parameters']:,}", size, f"{n['multiply_adds']:,}",
             f"{n['train_error'][-1]:.2f}", f"{n['test_error'][-1]:.2f}", error)
        )  # fmt: skip
    return _aligned(rows)


def draw(content: dict, path: Path) -> None:
    """Write a PNG: error curves of each kind of network, and the last training error against depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks, settings = content["networks"], content["settings"]
    kinds = [s for s in SHORTCUTS if any(n["shortcut"] == s for n in networks)]
    depths = sorted({n["depth"] for n in networks})
    figure, axes = plt.subplots(1, len(kinds) + 1, figsize=(3.6 * (len(kinds) + 1), 3.8), sharey=True)
    for axis, kind in zip(axes, kinds):
        for n in (n for n in networks if n["shortcut"] == kind):
            color = f"C{depths.index(n['depth'])}"
            axis.plot(n["iterations"], n["train_error"], "--", color=color, linewidth=1)
            axis.plot(n["iterations"], n["test_error"], color=color, label=f"{n['depth']} layers")
        axis.set_title("plain" if kind == "plain" else f"residual, shortcut {kind}")
        axis.set_xlabel("iteration")
        axis.legend(fontsize=8)
        last = sorted((n["depth"], n["train_error"][-1]) for n in networks if n["shortcut"] == kind)
        marker, color = "oxs^"[SHORTCUTS.index(kind)], f"{0.25 * SHORTCUTS.index(kind)}"  # colours stand for depths
        axes[-1].plot(*zip(*last), marker=marker, color=color, label=axis.get_title())
    axes[0].set_ylabel("error (%): training dashed, test solid")
    axes[-1].set_title("training error, last epoch")
    axes[-1].set_xlabel("layers")
    axes[-1].set_xticks(depths)
    axes[-1].legend(fontsize=8)
    axes[0].set_ylim(0, 100)
    figure.suptitle(
        f"{settings['data']}, {settings['iterations']} iterations, batch {settings['batch']}, "
        f"learning rate {settings['learning_rate']}, seed {settings['seed']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def open_results(path: Path, settings: Settings) -> dict:
    """The content of a results file to go on with, or an empty one.

    Raises ValueError if the file is not a results file, or one of other settings, which would be lost or mixed up.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return {"settings": asdict(settings), "networks": []}
        content = json.loads(path.read_text())
        found = dict(content["settings"])
        for network in content["networks"]:
            network["depth"], network["shortcut"], network["train_error"][-1]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"--out: {path} is not a results file, and is left as it is: {error!r}") from error
    differing = [f"{k} {found.get(k)} (here {v})" for k, v in asdict(settings).items() if found.get(k) != v]
    if differing:
        raise ValueError(
            f"--out: {path} holds networks trained with other settings: {', '.join(differing)}; name another folder"
        )
    return content


def run(networks: list[tuple[int, str]], images: Images, settings: Settings, content: dict, path: Path) -> None:
    """Train every network (depth, shortcut) that `content` lacks, add it, and write `content` to `path`, one by one.

    However the run ends, a picture beside the file shows the networks that are in it.
    """
    done = {(n["depth"], n["shortcut"]) for n in content["networks"]}
    left = [network for network in networks if network not in done]
    if len(left) < len(networks):
        print(f"{path} has {len(networks) - len(left)} of these networks already, {len(left)} are to be trained")
    environment = describe()
    try:
        with tqdm(total=len(left) * settings.iterations, disable=None) as bar:
            for depth, shortcut in left:
                bar.set_description(f"{depth} layers, {shortcut}")
                start = time.monotonic()
                curves = train(depth, shortcut, images, settings, bar.update)
                seconds = round(time.monotonic() - start, 1)
                cost = costs(build(depth, shortcut), (1, *images.train.shape[1:]))
                network = {"depth": depth, "shortcut": shortcut, **cost, **curves, "seconds": seconds}
                content["networks"].append({**network, "environment": environment})
                write_json(path, content)
                last = ", ".join(f"{what} {curves[f'{what}_error'][-1]:.2f} %" for what in ("train", "test"))
                bar.write(f"{depth} layers, {shortcut}: {last}, {seconds} s", file=sys.stderr)
    finally:
        if content["networks"]:
            draw(content, path.with_suffix(".png"))


@dataclass(frozen=True)
class Preset:
    """Defaults of one kind of run."""

    depths: tuple[int, ...]
    shortcuts: tuple[str, ...]
    iterations: int
    batch: int
    learning_rate: float


PRESETS = {
    "digits": Preset((20, 32, 44, 56), SHORTCUTS, 410, 32, 0.02),
    "cifar10": Preset((20, 56), ("plain", "A"), 1564, 128, 0.1),
    "full": Preset((20, 32, 44, 56, 110), ("plain", "A"), 64_000, 128, 0.1),
}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.degradation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="digits (default, bundled with scikit-learn) or cifar10")
    parser.add_argument("--folder", type=Path, help="where CIFAR-10's python batches are")
    parser.add_argument("--full", action="store_true", help="the paper's schedule on CIFAR-10: hours on a GPU")
    parser.add_argument("--depths", nargs="+", type=int, help="numbers of layers, 6n + 2")
    parser.add_argument("--shortcuts", nargs="+", help=f"of {', '.join(SHORTCUTS)}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=int, help="steps of each network")
    length.add_argument("--epochs", type=int, help="the same, in passes over the training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for degradation.json and .png")
    return parser.parse_args(argv)


def configure(argv: list[str] | None) -> tuple[list[tuple[int, str]], Images, Settings, dict, Path]:
    """Options -> the arguments of `run`. Raises ValueError, naming the option, what came and what is allowed."""
    arguments = _parse(argv)
    data = arguments.data or ("cifar10" if arguments.full else "digits")
    if data not in ("digits", "cifar10"):
        raise ValueError(f"--data: expected digits or cifar10, got {data!r}")
    if arguments.full and data != "cifar10":
        raise ValueError(f"--full: is the paper's schedule on CIFAR-10, got --data {data}")
    preset = PRESETS["full" if arguments.full else data]
    depths, shortcuts = arguments.depths or preset.depths, arguments.shortcuts or preset.shortcuts
    for depth in depths:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"--depths: expected 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}")
    for shortcut in shortcuts:
        if shortcut not in SHORTCUTS:
            raise ValueError(f"--shortcuts: expected {', '.join(SHORTCUTS)}, got {shortcut!r}")
    for option, value in (("--iterations", arguments.iterations), ("--epochs", arguments.epochs)):
        if value is not None and value < 1:
            raise ValueError(f"{option}: expected a positive integer, got {value}")
    images = load_digits() if data == "digits" else load_cifar10(arguments.folder)
    iterations = arguments.iterations or preset.iterations
    if arguments.epochs is not None:
        iterations = arguments.epochs * -(-len(images.train) // preset.batch)
    settings = Settings(data, iterations, preset.batch, preset.learning_rate, arguments.seed)
    path = arguments.out / "degradation.json"
    networks = list(dict.fromkeys((depth, shortcut) for shortcut in shortcuts for depth in depths))
    return networks, images, settings, open_results(path, settings), path


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for a bad option, 130 if interrupted."""
    try:
        networks, images, settings, content, path = configure(argv)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    print(f"{imagenet_table()}\n")
    try:
        run(networks, images.to(device), settings, content, path)
    except KeyboardInterrupt:
        print(f"interrupted: {path} keeps the finished networks; run again to go on")
        return 130
    print(f"\n{results_table(content['networks'])}")
    print(f"{path} and {path.with_suffix('.png').name} written, {time.monotonic() - start:.0f} s on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
