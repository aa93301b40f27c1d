"""Images for training and validation: folders, tar shards or noise; each sample a function of (seed, epoch, index).

Augmentation draws from a generator that is seeded anew for every sample, and the order of an epoch is a permutation
that is computed, not kept. So nothing depends on which worker made a sample or on what ran before, and training
continues in the middle of an epoch as if it had never stopped. Images leave the workers as uint8, a quarter of the
bytes of fp32; they are normalised on the device.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, for values in [0, 1]
VAL_RESIZE = 256 / 224  # shorter side over the centre crop's
_IN_A_ROW = 32  # images that are tried before the run gives up


class Key(NamedTuple):
    """What makes a sample: the epoch, its place in the data, and the image's height and width in pixels."""

    epoch: int
    index: int
    size: int


class DataError(RuntimeError):
    """Too much of the data cannot be read."""


class Folder:
    """Encoded images of a folder with one folder for each class (torchvision's ImageFolder).

    Raises OSError for a folder without classes, or a class without images.
    """

    def __init__(self, root: Path) -> None:
        listing = ImageFolder(str(root))
        self.root, self.classes, self._samples = root, listing.classes, listing.samples

    def __len__(self) -> int:
        return len(self._samples)

    def label(self, index: int) -> int:
        """The class number."""
        return self._samples[index][1]

    def name(self, index: int) -> str:
        """What a message calls the image."""
        return os.path.relpath(self._samples[index][0], self.root)

    def read(self, index: int) -> bytes:
        """The encoded image."""
        return Path(self._samples[index][0]).read_bytes()


class Shards:
    """Encoded images of WebDataset-style tar files: members KEY.jpg (jpeg, png, webp) and KEY.cls, the class number.

    The members' places are listed once, so that any sample can be read at once and shuffling is a whole permutation.
    Raises ValueError for a file that is no plain tar, or an image without a class number.
    """

    classes = None  # numbers alone

    def __init__(self, root: Path) -> None:
        self.root = root
        self._samples: list[tuple[str, str, int, int]] = []  # shard, member, offset, bytes
        self._labels: list[int] = []
        for path in sorted(root.glob("*.tar")):
            self._list(path)

    def _list(self, path: Path) -> None:
        images, labels = {}, {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    key = f"{folder}/{stem}"
                    if suffix.lower() in ("jpg", "jpeg", "png", "webp"):
                        images[key] = (path.name, member.name, member.offset_data, member.size)
                    elif suffix == "cls":
                        labels[key] = int(archive.extractfile(member).read())
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"--data: {path} is no uncompressed tar of KEY.jpg and KEY.cls: {error}") from error
        for key, place in images.items():
            if key not in labels:
                raise ValueError(f"--data: {path} has {place[1]}, but no .cls beside it, its class number")
            self._samples.append(place)
            self._labels.append(labels[key])

    def __len__(self) -> int:
        return len(self._samples)

    def label(self, index: int) -> int:
        """The class number."""
        return self._labels[index]

    def name(self, index: int) -> str:
        """What a message calls the image."""
        return "/".join(self._samples[index][:2])

    def read(self, index: int) -> bytes:
        """The encoded image."""
        shard, _, offset, size = self._samples[index]
        with open(self.root / shard, "rb") as file:
            file.seek(offset)
            return file.read(size)


def open_source(root: Path) -> Folder | Shards:
    """Shards where `root` holds tar files, else a folder of classes. Raises ValueError, naming it, if it is neither."""
    if any(root.glob("*.tar")):
        return Shards(root)
    try:
        return Folder(root)
    except OSError as error:
        raise ValueError(f"--data: {root}: {error}") from error


def digest(source: Folder | Shards | Noise) -> str:
    """A hash of all names and labels: equal where two processes see the same data."""
    if isinstance(source, Noise):
        return f"{source.length} of {source.classes} classes"
    total = hashlib.sha256()
    for index in range(len(source)):
        total.update(f"{source.name(index)} {source.label(index)}\n".encode())
    return total.hexdigest()[:16]


def _mixed(*numbers: int) -> int:
    """32 random bits, a function of the numbers (non-negative)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, PyTorch's CPU generator starts from a seed made of `numbers`; afterwards it goes on from where it was."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(_mixed(*numbers))
    try:
        yield
    finally:
        generator.set_state(before)


class Images(Dataset):
    """Key -> (image, label, complaint): a sample, and what could not be read on the way to it.

    In training an unreadable image is replaced by the next readable one, so that every rank's batches stay whole; in
    validation it is left out. Either way `complaint` names it; it is "" for a sample that is as it should be.

    Args:
        source: the encoded images.
        decode: encoded image -> image; raises for a damaged one.
        prepare: (image, size) -> what the loader's collate_fn takes for an image.
        seed: of the run.
        replace: whether to replace.
    """

    def __init__(self, source: Folder | Shards, decode: Callable, prepare: Callable, seed: int, replace: bool) -> None:
        self.source, self.decode, self.prepare, self.seed, self.replace = source, decode, prepare, seed, replace

    def __getitem__(self, key: Key):
        complaint = ""
        for i in range(_IN_A_ROW if self.replace else 1):
            index = (key.index + i) % len(self.source)
            try:
                image = self.decode(self.source.read(index))
            except Exception as error:  # Pillow's decoders raise many types for a damaged file
                complaint = complaint or f"{self.source.name(index)}: {error}"
                continue
            with seeded(self.seed, key.epoch, key.index):
                return self.prepare(image, key.size), self.source.label(index), complaint
        if self.replace:
            raise DataError(f"{_IN_A_ROW} images in a row cannot be read, beginning with {complaint}")
        return None, -1, complaint


def _decode(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


@lru_cache
def _augmentation(size: int, augment: str, erase: float) -> Callable[[Image.Image], Tensor]:
    steps: list[v2.Transform] = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if augment == "trivial":
        steps.append(v2.TrivialAugmentWide())
    steps.append(v2.PILToTensor())
    if erase:
        steps.append(v2.RandomErasing(erase))
    return v2.Compose(steps)


def augmented(image: Image.Image, size: int, augment: str = "none", erase: float = 0.0) -> Tensor:
    """A random crop and flip, uint8 [3, size, size]; "trivial" adds TrivialAugment, `erase` is its probability."""
    return _augmentation(size, augment, erase)(image)


@lru_cache
def _centre(size: int) -> Callable[[Image.Image], Tensor]:
    return v2.Compose([v2.Resize(round(size * VAL_RESIZE), antialias=True), v2.CenterCrop(size), v2.PILToTensor()])


def centred(image: Image.Image, size: int) -> Tensor:
    """The centre after resizing the shorter side to VAL_RESIZE * size, uint8 [3, size, size]."""
    return _centre(size)(image)


class Noise(Dataset):
    """Random images, one after another of each class: training without data."""

    def __init__(self, length: int, classes: int, seed: int) -> None:
        self.length, self.classes, self.seed = length, classes, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key):
        with seeded(self.seed, key.index):
            image = torch.randint(256, (3, key.size, key.size), dtype=torch.uint8)
        return image, key.index % self.classes, ""


class TrainOrder(Sampler):
    """A rank's batches of an epoch, from any step on: lists of Key.

    Step s of an epoch takes the samples [s g, (s + 1) g) of a permutation, g = batch_size * accumulate * world; of
    these each rank takes the next batch_size, `accumulate` times. What no whole step is left for is dropped.
    """

    def __init__(self, length: int, batch_size: int, accumulate: int, seed: int, rank: int, world: int) -> None:
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.images_per_step = batch_size * accumulate * world
        self.steps = length // self.images_per_step
        self.epoch = self.step = self.size = 0

    def start(self, epoch: int, step: int, size: int) -> None:
        """Let the next iteration begin at that step of that epoch, with images of size x size."""
        self.epoch, self.step, self.size = epoch, step, size

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        begin, end = self.step * self.images_per_step, self.steps * self.images_per_step
        for first in range(begin + self.rank * self.batch_size, end, self.batch_size * self.world):
            yield [Key(self.epoch, index, self.size) for index in order[first : first + self.batch_size]]


class ValOrder(Sampler):
    """A rank's batches of the validation set: every world-th image, each once."""

    def __init__(self, length: int, batch_size: int, size: int, rank: int, world: int) -> None:
        self.length, self.batch_size, self.size, self.rank, self.world = length, batch_size, size, rank, world

    def __iter__(self) -> Iterator[list[Key]]:
        mine = range(self.rank, self.length, self.world)
        for first in range(0, len(mine), self.batch_size):
            yield [Key(0, index, self.size) for index in mine[first : first + self.batch_size]]


def _collate(samples: list[tuple]) -> tuple[Tensor, Tensor, list[str]]:
    readable = [(image, label) for image, label, _ in samples if image is not None]
    complaints = [complaint for _, _, complaint in samples if complaint]
    if not readable:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), complaints
    return *default_collate(readable), complaints


def _begin_worker(_: int) -> None:
    """End on SIGTERM from the parent alone: one to all processes must leave a rank its workers until it has saved."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def loader(
    dataset: Dataset, order: Sampler, workers: int, device: torch.device, collate: Callable = _collate
) -> DataLoader:
    """Batches (images, labels, complaints) in the given order, made by `workers` processes, in pinned memory."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_begin_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and isinstance(order, TrainOrder),
        generator=torch.Generator(),  # so that it does not draw from the global one
    )


class Data(NamedTuple):
    """What a run trains and validates on: loaders of batches (images uint8 [N, 3, H, W], labels, complaints)."""

    train: Iterable
    val: Iterable
    order: TrainOrder
    classes: int
    digest: str  # equal for equal data


def torch_loaders(train, val, orders: tuple[TrainOrder, ValOrder], options, device) -> tuple[Iterable, Iterable]:
    """Training and validation batches, decoded and augmented by Pillow and torchvision in worker processes."""
    if not isinstance(train, Noise):
        prepare = partial(augmented, augment=options.augment, erase=options.erase)
        train = Images(train, _decode, prepare, options.seed, replace=True)
        val = Images(val, _decode, centred, options.seed, replace=False)
    return tuple(loader(dataset, order, options.workers, device) for dataset, order in zip((train, val), orders))


def _open_both(options) -> tuple[Folder | Shards | Noise, Folder | Shards | Noise, int]:
    """(training set, validation set, number of classes)."""
    if options.data == "synthetic":
        classes = options.classes or 1000
        lengths = options.synthetic_images, max(1, options.synthetic_images // 10)
        return *(Noise(length, classes, options.seed) for length in lengths), classes
    root = Path(options.data)
    for folder in (root / "train", root / "val"):
        if not folder.is_dir():
            raise ValueError(f"--data: expected the folders train and val in {root}, got no folder {folder}")
    train, val = open_source(root / "train"), open_source(root / "val")
    if train.classes != val.classes:
        apart = sorted(set(train.classes or ()) ^ set(val.classes or ()))
        raise ValueError(f"--data: train and val have different classes: {', '.join(apart[:5])} in one of them alone")
    labels = {source.label(index) for source in (train, val) for index in range(len(source))}
    classes = len(train.classes) if train.classes else options.classes or 1000
    if options.classes not in (None, classes):
        raise ValueError(f"--classes: {options.classes}, but {root} has {classes} classes")
    if not 0 <= min(labels) <= max(labels) < classes:
        raise ValueError(
            f"--classes: expected class numbers from 0 to {classes - 1}, got {min(labels)} to {max(labels)}"
        )
    return train, val, classes


def open_data(options, make_loaders: Callable, rank: int, world: int, device: torch.device) -> Data:
    """The data that the command line's options ask for. Raises ValueError, naming the option, where they do not fit."""
    train, val, classes = _open_both(options)
    order = TrainOrder(len(train), options.batch_size, options.accumulate, options.seed, rank, world)
    if order.steps == 0 and not options.evaluate:
        raise ValueError(
            f"--batch-size: a step takes {order.images_per_step} images (batch size x accumulate x processes), but "
            f"there are {len(train)}"
        )
    val_order = ValOrder(len(val), options.batch_size, options.val_size or options.size[-1], rank, world)
    seen = f"{digest(train)}-{digest(val)}"
    return Data(*make_loaders(train, val, (order, val_order), options, device), order, classes, seen)
