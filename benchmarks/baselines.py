"""The contenders: a name, and how to build its training step or inference call. Each is optional: `Absent` says why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Absent(RuntimeError):
    """This contender cannot run here; the message says why."""


class Case(NamedTuple):
    """A network, a mode ("training" or "inference"), images a batch, a dtype name, image size in pixels, a device."""

    model: str
    mode: str
    batch: int
    dtype: str
    size: int
    device: str

    def images(self) -> Tensor:
        """Random images in channels_last memory, fp32 as a data loader delivers them."""
        x = torch.randn(self.batch, 3, self.size, self.size, device=self.device)
        return x.to(memory_format=torch.channels_last)

    def autocast(self):
        """Autocast to the case's dtype, nothing for fp32."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.dtype])


def torchvision_model(name: str, **keywords) -> nn.Module:
    """The network as torchvision builds it; `Absent` without torchvision."""
    try:
        import torchvision
    except ImportError as error:
        raise Absent(f"torchvision is not installed: {error}") from error
    return getattr(torchvision.models, name)(**keywords)


def _prepare(model: nn.Module, case: Case) -> nn.Module:
    model = model.to(case.device, memory_format=torch.channels_last)
    return model.train(case.mode == "training")


def _optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)


def _step(model: Callable, parameters: nn.Module, case: Case) -> Callable[[], Tensor]:
    """A whole training step (forward, loss, backward, optimizer), or a forward in inference mode, on one batch."""
    x = case.images()
    if case.mode == "inference":

        def infer() -> Tensor:
            with torch.inference_mode(), case.autocast():
                return model(x)

        return infer
    target = torch.randint(1000, (case.batch,), device=case.device)
    optimizer = _optimizer(parameters, case)

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with case.autocast():
            loss = F.cross_entropy(model(x), target)
        # float16 runs without a loss scaler: it costs the same, and no one trains here.
        loss.backward()
        optimizer.step()
        return loss

    return train


def _graphed(model: nn.Module, case: Case) -> Callable[[], Tensor]:
    if case.device != "cuda":
        raise Absent("CUDA graphs need a CUDA device")
    x = case.images()
    if case.mode == "inference":
        with case.autocast():
            captured = fused_resnet.capture(model, x)
        return lambda: captured(x)
    if case.dtype == "fp16":
        raise Absent("a captured step has no loss scaler, which float16 needs")
    target = torch.randint(1000, (case.batch,), device=case.device)
    optimizer = _optimizer(model, case)
    autocast = None if case.dtype == "fp32" else torch.bfloat16
    step = fused_resnet.capture_step(model, optimizer, F.cross_entropy, x, target, autocast=autocast)
    return lambda: step(x, target)


def _compiled(mode: str) -> Callable[[Case], Callable[[], Tensor]]:
    def build(case: Case) -> Callable[[], Tensor]:
        model = _prepare(torchvision_model(case.model), case)
        torch._dynamo.reset()
        return _step(torch.compile(model, mode=mode), model, case)

    return build


def _eager(case: Case) -> Callable[[], Tensor]:
    model = _prepare(torchvision_model(case.model), case)
    return _step(model, model, case)


def _eager_graph(case: Case) -> Callable[[], Tensor]:
    return _graphed(_prepare(torchvision_model(case.model), case), case)


# name -> builder of a call that does one step of a case
BASELINES: dict[str, Callable[[Case], Callable[[], Tensor]]] = {
    "eager": _eager,
    "graph": _eager_graph,
    "compile": _compiled("default"),
    "compile-max-autotune": _compiled("max-autotune"),
}


def fused(impl: str, graph: bool = False) -> Callable[[Case], Callable[[], Tensor]]:
    """The builder of our own contender: eager, or its step captured as a CUDA graph."""

    def build(case: Case) -> Callable[[], Tensor]:
        model = _prepare(getattr(fused_resnet, case.model)(), case)
        with fused_resnet.use(impl):
            run = _graphed(model, case) if graph else _step(model, model, case)

        def call() -> Tensor:
            with fused_resnet.use(impl):
                return run()

        return call

    return build
