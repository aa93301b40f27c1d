"""The contenders: a name, and how to build its training step or inference call. Each is optional: `Absent` says why.

They train under autocast and infer with weights and images of the case's dtype (fp32: plain), with cuDNN's own search
on, so that the library is at its best.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet

from .environment import Absent

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """A network, a mode ("training" or "inference"), images a batch, a dtype name, image size in pixels, a device."""

    model: str
    mode: str
    batch: int
    dtype: str
    size: int
    device: str

    def images(self, layout: torch.memory_format = torch.channels_last) -> Tensor:
        """Random images: for training in fp32, as a data loader delivers them."""
        x = torch.randn(self.batch, 3, self.size, self.size, device=self.device)
        return x.to(torch.float32 if self.mode == "training" else DTYPES[self.dtype], memory_format=layout)

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


def timm_model(name: str) -> nn.Module:
    """The network as timm builds it; `Absent` without timm, or if timm has none of that name."""
    try:
        import timm
    except ImportError as error:
        raise Absent(f"timm is not installed: {error}") from error
    if not timm.is_model(name):
        raise Absent(f"timm has no {name}")
    return timm.create_model(name)


def _prepare(model: nn.Module, case: Case, layout: torch.memory_format = torch.channels_last) -> nn.Module:
    model = model.to(case.device, memory_format=layout)
    if case.mode == "inference":
        # As one deploys it: autocast would cast the weights anew in each forward. BatchNorms stay fp32.
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(DTYPES[case.dtype])
    return model.train(case.mode == "training")


def _optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)


def _step(
    model: Callable, parameters: nn.Module, case: Case, layout: torch.memory_format = torch.channels_last
) -> Callable[[], Tensor]:
    """A whole training step (forward, loss, backward, optimizer), or a forward in inference mode, on one batch."""
    x = case.images(layout)
    if case.mode == "inference":

        def infer() -> Tensor:
            with torch.inference_mode():
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
        captured = fused_resnet.capture(model, x)
        return lambda: captured(x)
    if case.dtype == "fp16":
        raise Absent("a captured step has no loss scaler, which float16 needs")
    target = torch.randint(1000, (case.batch,), device=case.device)
    optimizer = _optimizer(model, case)
    autocast = None if case.dtype == "fp32" else torch.bfloat16
    step = fused_resnet.capture_step(model, optimizer, F.cross_entropy, x, target, autocast=autocast)
    return lambda: step(x, target)


def _compiled(**options) -> Callable[[Case], Callable[[], Tensor]]:
    def build(case: Case) -> Callable[[], Tensor]:
        if "freezing" in options.get("options", {}) and case.mode == "training":
            raise Absent("freezing makes constants of the weights: inference only")
        model = _prepare(torchvision_model(case.model), case)
        return _step(torch.compile(model, **options), model, case)

    return build


def _eager(
    make: Callable[[str], nn.Module] = torchvision_model, layout: torch.memory_format = torch.channels_last
) -> Callable[[Case], Callable[[], Tensor]]:
    def build(case: Case) -> Callable[[], Tensor]:
        model = _prepare(make(case.model), case, layout)
        return _step(model, model, case, layout)

    return build


def _eager_graph(case: Case) -> Callable[[], Tensor]:
    return _graphed(_prepare(torchvision_model(case.model), case), case)


def _cudnn_graphs(case: Case) -> Callable[[], Tensor]:
    from . import cudnn_graphs

    if case.device != "cuda":
        raise Absent("cuDNN's graphs need a CUDA device")
    model = _prepare(torchvision_model(case.model), case)
    return _step(cudnn_graphs.network(model, DTYPES[case.dtype]), model, case)


# name -> builder of a call that does one step of a case; of torchvision in channels_last where not said otherwise
BASELINES: dict[str, Callable[[Case], Callable[[], Tensor]]] = {
    "eager": _eager(),
    "eager-nchw": _eager(layout=torch.contiguous_format),
    "graph": _eager_graph,
    "compile": _compiled(mode="default"),
    "compile-max-autotune": _compiled(mode="max-autotune"),
    "compile-freezing": _compiled(options={"freezing": True, "max_autotune": True, "triton.cudagraphs": True}),
    "timm": _eager(timm_model),
    "cudnn-graphs": _cudnn_graphs,
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
