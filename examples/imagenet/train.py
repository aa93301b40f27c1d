"""The recipe and the loop: stochastic gradient descent with warm-up and cosine, checkpoints, validation."""

from __future__ import annotations

import math
import random
import signal
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

import fused_resnet

from . import checkpoint, ranks
from .data import MEAN, STD, Data, DataError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR_IMAGES = 256  # images in a step that --lr is meant for


class Stopped(Exception):
    """SIGTERM came; everything is on disk."""


def lr_factor(step: int, warmup: int, total: int) -> float:
    """The factor on the learning rate at optimizer step `step`, counted from 0.

        (step + 1) / warmup                                          for step < warmup
        (1 + cos(pi (step - warmup) / (total - warmup))) / 2         from there on

    Source: Goyal et al. 2017 (warm-up), Loshchilov and Hutter 2017 (cosine).
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers with weight decay; norms and biases, all vectors, without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, options) -> torch.optim.Optimizer:
    """SGD with momentum, or LARS (You et al. 2017) from timm; the learning rate is scaled to the images in a step."""
    groups = parameter_groups(model, options.weight_decay)
    lr = options.lr * options.batch_size * options.accumulate * ranks.world() / LR_IMAGES
    if options.optimizer == "lars":
        from timm.optim import Lars

        return Lars(groups, lr, momentum=options.momentum)
    return torch.optim.SGD(groups, lr, momentum=options.momentum, fused=True)


def size_of_epoch(sizes: list[int], epoch: int, epochs: int) -> int:
    """The images' size in pixels: each of `sizes` for an equal share of the epochs (progressive resizing)."""
    return sizes[epoch * len(sizes) // epochs]


class _Clock:
    """Images per second between two calls."""

    def __init__(self, step: int, images_per_step: int) -> None:
        self._step, self._images_per_step, self._since = step, images_per_step, time.monotonic()

    def images_per_s(self, step: int) -> float:
        """Of the steps since the last call."""
        now = time.monotonic()
        speed = (step - self._step) * self._images_per_step / (now - self._since)
        self._step, self._since = step, now
        return speed


class Trainer:
    """All that training changes, and the loop that changes it.

    Args:
        model: on the device, in channels_last memory.
        data: what to train and validate on.
        options: of the command line.
        recipe: what a checkpoint must have been written with to be continued (name -> value).
    """

    def __init__(self, model: nn.Module, data: Data, device: torch.device, options, recipe: dict[str, Any]) -> None:
        self.model, self.data, self.device = model, data, device
        self.options, self.recipe = options, recipe
        self.writer = None  # TensorBoard's SummaryWriter, if scalars are wanted
        self.epoch = self.step = 0  # of this epoch; both count what is done
        self.best = -1.0  # top-1; any is better
        self.ddp = model if ranks.world() == 1 else DistributedDataParallel(model)
        if options.sync_bn:
            # After DDP, which refuses SyncBatchNorm on CPUs; parameters and buffers stay the ones that it knows.
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.loss = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        self.optimizer = make_optimizer(model, options)
        warmup, total = round(options.warmup_epochs * data.order.steps), options.epochs * data.order.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, warmup, total))
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "fp16")
        self.ema = None
        if options.ema:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)
        accuracies = {f"top{k}": MulticlassAccuracy(data.classes, min(k, data.classes), "micro") for k in (1, 5)}
        self.accuracy = MetricCollection(accuracies, compute_groups=False).to(device)
        self._captured: tuple[int, fused_resnet.graphs.CapturedStep] | None = None
        self._mean, self._std = (
            torch.tensor(values, device=device).mul(255).view(1, 3, 1, 1) for values in (MEAN, STD)
        )
        self._terminated = False
        self._unreadable = 0  # images, of all ranks in this epoch
        self._saved = -1  # the optimizer step of the last checkpoint

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the beginning."""
        return self.epoch * self.data.order.steps + self.step

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. All ranks call it."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])  # a captured step keeps it in a tensor on its device
        generators = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state()
        return {
            "recipe": self.recipe,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": ranks.gather(generators),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, in a run of the same recipe."""
        self._settle_buckets()
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        generators = state["generators"][ranks.rank()]
        random.setstate(generators["python"])
        torch.set_rng_state(generators["torch"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])
        self._saved = self.steps_done

    def save(self) -> None:
        """Write a checkpoint, unless this step's is on disk already. All ranks call it."""
        if self._saved == self.steps_done:
            return
        state = self.state()
        if ranks.rank() == 0:
            checkpoint.save(self.options.output, self.steps_done, state)
        self._saved = self.steps_done

    def close(self) -> None:
        """Let go of what must go before the process group; the trainer is of no use afterwards.

        DDP holds the group. Freed last, in a traceback for example, it would join the group's threads with the
        interpreter's lock held, which these may be waiting for.
        """
        self.ddp = None
        if self.writer is not None:
            self.writer.close()

    def _settle_buckets(self) -> None:
        """Let DDP do now what it does after its first backward: order its buckets as gradients become ready.

        A sum of three or more numbers depends on their place in a bucket, so without it the first step of a continued
        run would differ in its last bits. The pass changes BatchNorm's statistics; it comes before they are loaded.
        """
        if self.ddp is self.model:
            return
        size = self.options.size[0]
        images = torch.zeros(2, 3, size, size, device=self.device).to(memory_format=torch.channels_last)
        with self._autocast():
            self.ddp(images).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self):
        dtype = DTYPES[self.options.dtype]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def _on_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised fp32 images in channels_last memory, and labels."""
        images = images.to(self.device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
        return images.sub_(self._mean).div_(self._std), labels.to(self.device, non_blocking=True)

    def _step(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One optimizer step over the batches; their mean loss, on the device."""
        total = torch.zeros((), device=self.device)
        for i, (images, labels) in enumerate(batches):
            last = i + 1 == len(batches)
            with nullcontext() if last or self.ddp is self.model else self.ddp.no_sync():
                with self._autocast():
                    loss = self.loss(self.ddp(images), labels) / len(batches)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _captured_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """`_step` as a CUDA graph, captured anew for every size of images."""
        size = images.shape[-1]
        if self._captured is None or self._captured[0] != size:
            self._captured = None  # frees the old graph's memory first
            autocast = torch.bfloat16 if self.options.dtype == "bf16" else None
            step = fused_resnet.capture_step(self.model, self.optimizer, self.loss, images, labels, autocast=autocast)
            self._captured = size, step
        return self._captured[1](images, labels)

    def _confer(self, complaints: list[str]) -> bool:
        """Name and count unreadable images; whether any rank got SIGTERM. Raises DataError where they are too many."""
        for complaint in complaints:
            tqdm.write(f"skipped, unreadable: {complaint}", file=sys.stderr)
        terminated, unreadable = ranks.total(self._terminated, len(complaints))
        self._unreadable += int(unreadable)
        if self._unreadable > self.options.max_unreadable:
            raise DataError(
                f"{self._unreadable} unreadable images in one epoch; --max-unreadable is {self.options.max_unreadable}"
            )
        return terminated > 0

    def _train_epoch(self) -> None:
        """The steps that are left of this epoch, with a checkpoint at every --checkpoint-every-th step."""
        options, order = self.options, self.data.order
        order.start(self.epoch, self.step, size_of_epoch(options.size, self.epoch, options.epochs))
        batches = iter(self.data.train)
        clock = _Clock(self.step, order.images_per_step)
        self._unreadable = 0
        with tqdm(
            desc=f"epoch {self.epoch + 1}/{options.epochs}",
            total=order.steps * order.images_per_step,
            initial=self.step * order.images_per_step,
            unit=" images",
            disable=True if ranks.rank() else None,  # None: shown on a terminal
        ) as bar:
            while self.step < order.steps:
                group, complaints = [], []
                for images, labels, lost in islice(batches, options.accumulate):
                    group.append(self._on_device(images, labels))
                    complaints += lost
                loss = self._captured_step(*group[0]) if options.graph else self._step(group)
                self.scheduler.step()
                if self.ema:
                    self.ema.update_parameters(self.model)
                self.step += 1
                bar.update(order.images_per_step)
                terminated = self._confer(complaints)
                save = terminated or self.steps_done % options.checkpoint_every == 0
                if save or self.step == order.steps or self.steps_done % options.log_every == 0:
                    self._log(bar, self._mean_loss(loss), clock.images_per_s(self.step))
                if save:
                    self.save()
                if terminated:
                    raise Stopped

    def _mean_loss(self, loss: Tensor) -> float:
        """Over all ranks. Raises FloatingPointError if it is not finite: what follows is not worth a checkpoint."""
        mean = ranks.total(loss.item())[0] / ranks.world()
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at step {self.steps_done}; no checkpoint is written from there"
            )
        return mean

    def _log(self, bar: tqdm, loss: float, images_per_s: float) -> None:
        lr = self.scheduler.base_lrs[0] * self.scheduler.lr_lambdas[0](self.steps_done - 1)  # of the step just done
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.4f}")
        if bar.disable and ranks.rank() == 0:
            print(
                f"epoch {self.epoch + 1}, step {self.step}/{self.data.order.steps}: loss {loss:.3f}, lr {lr:.4f}, "
                f"{images_per_s:,.1f} images/s",
                flush=True,
            )
        if self.writer is not None:
            for name, value in (("loss", loss), ("lr", lr), ("images per s", images_per_s)):
                self.writer.add_scalar(f"train/{name}", value, self.steps_done)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy on the validation set, top-1 and top-5, of the averaged model if there is one."""
        model = self.ema.module if self.ema else self.model
        ranks.copy_from_first(list(model.buffers()))  # without SyncBatchNorm each rank has statistics of its own
        model.eval()
        self.accuracy.reset()
        complaints = []
        for images, labels, lost in self.data.val:
            complaints += lost
            if self._terminated:
                break
            if len(labels):
                images, labels = self._on_device(images, labels)
                with self._autocast():
                    logits = model(images)
                self.accuracy.update(logits.float(), labels)
        model.train()
        if self._confer(complaints):
            raise Stopped  # the checkpoint of the epoch's end is written
        return {name: value.item() for name, value in self.accuracy.compute().items()}

    def _finish_epoch(self) -> None:
        """Validate, report, and write the weights: `weights.pt` always, `best.pt` where they are the best so far."""
        accuracy = self.evaluate()
        better, self.best = accuracy["top1"] > self.best, max(self.best, accuracy["top1"])
        self.epoch, self.step = self.epoch + 1, 0
        if ranks.rank():
            return
        tqdm.write(
            f"epoch {self.epoch}/{self.options.epochs}: top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%}, "
            f"best top-1 {self.best:.2%}" + (f", {self._unreadable} images unreadable" if self._unreadable else "")
        )
        if self.writer is not None:
            for name, value in accuracy.items():
                self.writer.add_scalar(f"val/{name}", value, self.steps_done)
            self.writer.flush()
        model = self.ema.module if self.ema else self.model
        weights = checkpoint.serialised({name: value.cpu() for name, value in model.state_dict().items()})
        for name in ("weights.pt", "best.pt")[: 1 + better]:
            checkpoint.write(Path(self.options.output, name), weights)

    def fit(self) -> None:
        """Train to the last epoch. On SIGTERM, to any rank, all of them save and raise Stopped."""

        def on_sigterm(*_) -> None:
            self._terminated = True

        before = signal.signal(signal.SIGTERM, on_sigterm)
        try:
            while self.epoch < self.options.epochs:
                if self.step < self.data.order.steps:
                    self._train_epoch()
                    self.save()
                self._finish_epoch()
        finally:
            signal.signal(signal.SIGTERM, before)
