"""Decoding, cropping and flipping by NVIDIA DALI, on the GPU where there is one.

The workers read files and choose each sample's window, size and flip, from the same seeds as the CPU path; DALI only
does what it is told, so a run continues exactly with it, too. Unreadable is here what Pillow cannot open; DALI stops
at an image that is damaged further inside.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from .data import VAL_RESIZE, Images, TrainOrder, ValOrder, loader


class Cut(NamedTuple):
    """An encoded image and what to make of it: the window's first pixel and extent (y, x), the output's, and a flip."""

    encoded: np.ndarray
    start: np.ndarray
    shape: np.ndarray
    size: np.ndarray
    flip: np.ndarray


def _open(encoded: bytes) -> tuple[bytes, Image.Image]:
    return encoded, Image.open(io.BytesIO(encoded))  # reads the header alone


def _cut(encoded: bytes, window: dict[str, int], size: int, flip: bool) -> Cut:
    return Cut(
        np.frombuffer(encoded, np.uint8),
        np.array([window["top"], window["left"]], np.int32),
        np.array([window["height"], window["width"]], np.int32),
        np.array([size, size], np.float32),
        np.array(flip, np.int32),
    )


def _random_cut(opened: tuple[bytes, Image.Image], size: int) -> Cut:
    encoded, image = opened
    window = v2.RandomResizedCrop(size).make_params([image])
    return _cut(encoded, window, size, bool(torch.rand(1) < 0.5))


def _central_cut(opened: tuple[bytes, Image.Image], size: int) -> Cut:
    encoded, image = opened
    width, height = image.size
    side = round(min(width, height) / VAL_RESIZE)
    window = {"top": (height - side) // 2, "left": (width - side) // 2, "height": side, "width": side}
    return _cut(encoded, window, size, False)


def _collate(samples: list[tuple]) -> tuple[list[Cut], Tensor, list[str]]:
    readable = [(cut, label) for cut, label, _ in samples if cut is not None]
    labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
    return [cut for cut, _ in readable], labels, [complaint for _, _, complaint in samples if complaint]


class DaliLoader:
    """Batches (images, labels, complaints) like data.loader's, with the images on the device already."""

    def __init__(self, cuts: DataLoader, batch_size: int, device: torch.device) -> None:
        self.cuts, self.batch_size, self.device = cuts, batch_size, device

    def _pipeline(self, batches: Iterator[tuple]):
        from nvidia.dali import fn, pipeline_def, types

        cuda = self.device.type == "cuda"

        @pipeline_def(batch_size=self.batch_size, num_threads=4, device_id=self.device.index if cuda else None)
        def define():
            encoded, start, shape, size, flip = fn.external_source(source=batches, num_outputs=len(Cut._fields))
            images = fn.decoders.image_slice(
                encoded, start=start, shape=shape, axes=[0, 1], output_type=types.RGB, device="mixed" if cuda else "cpu"
            )
            return fn.flip(fn.resize(images, size=size, antialias=True), horizontal=flip)

        return define()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        on_the_way: deque[tuple[Tensor, list[str]]] = deque()

        def batches() -> Iterator[tuple]:
            lost: list[str] = []
            for cuts, labels, complaints in self.cuts:
                lost = lost + complaints
                if cuts:
                    on_the_way.append((labels, lost))
                    lost = []
                    yield tuple(map(list, zip(*cuts)))

        images = DALIGenericIterator(self._pipeline(batches()), ["images"])
        while True:
            try:
                (output,) = next(images)
            except StopIteration:
                return
            except RuntimeError as error:
                raise RuntimeError(
                    f"DALI stopped; --loader torch skips what cannot be decoded and names it: {error}"
                ) from error
            yield output["images"].permute(0, 3, 1, 2), *on_the_way.popleft()


def dali_loaders(train, val, orders: tuple[TrainOrder, ValOrder], options, device) -> tuple[DaliLoader, DaliLoader]:
    """Training and validation batches, like data.torch_loaders."""
    host = torch.device("cpu")  # encoded images gain nothing from pinned memory
    return tuple(
        DaliLoader(
            loader(Images(source, _open, prepare, options.seed, replace), order, options.workers, host, _collate),
            options.batch_size,
            device,
        )
        for source, prepare, replace, order in (
            (train, _random_cut, True, orders[0]),
            (val, _central_cut, False, orders[1]),
        )
    )
