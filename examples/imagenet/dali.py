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

from .data import VAL_RESIZE, DataError, Images, TrainOrder, ValOrder, loader


class Cut(NamedTuple):
    """An encoded image and what to make of it; places and extents are (y, x) in pixels."""

    encoded: np.ndarray
    window: np.ndarray  # first pixel of what is decoded
    extent: np.ndarray  # of the window
    resized: np.ndarray  # extent after resizing
    corner: np.ndarray  # first pixel of what is kept of that
    kept: np.ndarray  # extent of it
    flip: np.ndarray  # 0 or 1


def _cut(encoded: bytes, window, extent, resized, corner, size: int, flip: bool) -> Cut:
    places = (np.array(place, np.int32) for place in (window, extent))
    kept = (np.array(place, np.int32) for place in (corner, (size, size)))
    return Cut(
        np.frombuffer(encoded, np.uint8), *places, np.array(resized, np.float32), *kept, np.array(flip, np.int32)
    )


def _open(encoded: bytes) -> tuple[bytes, Image.Image]:
    return encoded, Image.open(io.BytesIO(encoded))  # reads the header alone


def _random_cut(opened: tuple[bytes, Image.Image], size: int) -> Cut:
    """The window and the flip that torchvision's RandomResizedCrop and RandomHorizontalFlip would draw."""
    encoded, image = opened
    drawn = v2.RandomResizedCrop(size).make_params([image])
    window, extent = (drawn["top"], drawn["left"]), (drawn["height"], drawn["width"])
    return _cut(encoded, window, extent, (size, size), (0, 0), size, bool(torch.rand(1) < 0.5))


def _central_cut(opened: tuple[bytes, Image.Image], size: int) -> Cut:
    """The shorter side resized to VAL_RESIZE * size, and the centre, with torchvision's rounding."""
    encoded, image = opened
    width, height = image.size
    short, shorter = min(width, height), round(size * VAL_RESIZE)
    resized = [int(shorter * side / short) for side in (height, width)]
    corner = [round((side - size) / 2) for side in resized]
    return _cut(encoded, (0, 0), (height, width), resized, corner, size, False)


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
            encoded, window, extent, resized, corner, kept, flip = fn.external_source(
                source=batches, num_outputs=len(Cut._fields)
            )
            images = fn.decoders.image_slice(
                encoded,
                start=window,
                shape=extent,
                axes=[0, 1],
                output_type=types.RGB,
                device="mixed" if cuda else "cpu",
            )
            images = fn.resize(images, size=resized, antialias=True)
            return fn.flip(fn.slice(images, start=corner, shape=kept, axes=[0, 1]), horizontal=flip)

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
            except DataError:
                raise
            except RuntimeError as error:
                raise DataError(
                    f"DALI stopped; --loader torch names and skips what cannot be decoded: {error}"
                ) from error
            yield output["images"].permute(0, 3, 1, 2), *on_the_way.popleft()


def dali_loaders(train, val, orders: tuple[TrainOrder, ValOrder], options, device) -> tuple[DaliLoader, DaliLoader]:
    """Training and validation batches, like data.torch_loaders."""
    host = torch.device("cpu")  # encoded images gain nothing from pinned memory
    images = (
        Images(train, _open, _random_cut, options.seed, replace=True),
        Images(val, _open, _central_cut, options.seed, replace=False),
    )
    cuts = (loader(dataset, order, options.workers, host, _collate) for dataset, order in zip(images, orders))
    return tuple(DaliLoader(each, options.batch_size, device) for each in cuts)
