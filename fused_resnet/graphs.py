"""CUDA-graph capture: a whole eval model, or a whole training step, as one launch.

A step of many short kernels is bound by the time it takes to launch them. A captured graph replays them all at once, on
fixed memory: inputs are copied in, parameters and buffers are read where they lie, so in-place updates of weights or
running statistics count from the next replay on. Under "auto" it holds what was measured to be fastest in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from . import plan
from .modules import check_module

_WARM_UPS = 3  # enough for lazy initialisation: cuDNN plans, Triton compilation, optimizer state
# Other threads may go on with calls that would break a capture under "global", the default: a data loader's allocates
# pinned memory. What this thread and autograd's put on the captured stream is recorded in either mode.
ERROR_MODE = "thread_local"


def _check_cuda(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cuda":
        raise ValueError(f"{name}: on {tensor.device}; a CUDA graph needs a tensor on a CUDA device")


def _check_like(name: str, static: Tensor, value: Tensor) -> None:
    """ValueError if `value` is not what the graph was captured for."""
    if value.shape != static.shape or value.dtype != static.dtype:
        raise ValueError(
            f"{name}: captured for shape {tuple(static.shape)} {static.dtype}, got {tuple(value.shape)} {value.dtype}; "
            "capture again for another shape or dtype"
        )


class Captured:
    """A captured eval model: `captured(x)` copies x in, replays, and returns a copy of the output."""

    def __init__(self, graph: torch.cuda.CUDAGraph, x: Tensor, out: Tensor) -> None:
        self._graph, self._x, self._out = graph, x, out

    @property
    def pool(self) -> tuple[int, int]:
        """The graph's memory pool, for other captures that never run at the same time."""
        return self._graph.pool()

    def __call__(self, x: Tensor) -> Tensor:
        """x: shape and dtype of the example, any device. ValueError for another shape or dtype."""
        _check_like("x", self._x, x)
        self._x.copy_(x)
        self._graph.replay()
        return self._out.clone()


def capture(model: nn.Module, example: Tensor, *, pool: tuple[int, int] | None = None) -> Captured:
    """Capture `model(example)` in inference mode as a CUDA graph.

    Args:
        model: in eval mode, since a replay must not change statistics; on example's device.
        example: an input on a CUDA device; its values do not count. An autocast around the call is captured, too.
        pool: memory to share with other captures (`Captured.pool`).

    Raises ValueError for a model in training mode or an example that is not on a CUDA device.
    """
    check_module(model)
    _check_cuda("example", example)
    if model.training:
        raise ValueError("model: in training mode; call model.eval() first, or capture_step for a training step")
    x = example.detach().clone(memory_format=torch.preserve_format)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.device(x.device), plan.replayed():
        _on_side_stream(lambda: model(x))
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=ERROR_MODE):
            out = model(x)
    return Captured(graph, x, out)


def _on_side_stream(run: Callable[[], object]) -> None:
    """Warm up away from the default stream, as capture demands."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (i, name): value
        for i, p in enumerate(parameters)
        for name, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


class Snapshot:
    """Values of a model's parameters and buffers and an optimizer's state; `restore` writes them back in place.

    Optimizer state that did not exist yet is set to zero, not removed: the graph keeps its memory, and a zero momentum
    or moment is what a first step starts from.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
        self._state = {key: value.clone() for key, value in _optimizer_tensors(optimizer).items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Write the values back and drop all gradients."""
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for key, value in _optimizer_tensors(self._optimizer).items():
            if key in self._state:
                value.copy_(self._state[key])
            else:
                value.zero_()
        self._optimizer.zero_grad(set_to_none=True)


def check_capturable(optimizer: torch.optim.Optimizer) -> None:
    """ValueError if a captured step of this optimizer would not be what it computes outside a graph."""
    for i, group in enumerate(optimizer.param_groups):
        if group.get("capturable") is False:
            raise ValueError(f"optimizer: group {i} has capturable=False; construct it with capturable=True")
        if group.get("dampening", 0) != 0:
            raise ValueError(f"optimizer: group {i} has dampening={group['dampening']}, whose first step is special")
        if not isinstance(group["lr"], Tensor) and not group.get("fused"):
            raise ValueError(
                f"optimizer: group {i} has lr={group['lr']}, which a graph would freeze; use fused=True or a tensor lr"
            )


class CapturedStep:
    """A captured training step: `step(x, target)` copies both in, replays, and returns the loss (0-dimensional)."""

    def __init__(self, graph: torch.cuda.CUDAGraph, x: Tensor, target: Tensor, loss: Tensor) -> None:
        self._graph, self._x, self._target, self._loss = graph, x, target, loss

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """Shapes and dtypes of the examples, any device. ValueError for others; nothing has run then."""
        for name, static, value in (("x", self._x, x), ("target", self._target, target)):
            _check_like(name, static, value)
        self._x.copy_(x)
        self._target.copy_(target)
        self._graph.replay()
        return self._loss.clone()


def capture_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    *,
    autocast: torch.dtype | None = None,
) -> CapturedStep:
    """Capture forward, loss, backward and optimizer step on one batch as a CUDA graph.

    The warm-up runs on the examples, and leaves parameters, running statistics and optimizer state as they were. A
    learning rate is put into a tensor on the device, so that a scheduler's changes count.

    Args:
        model: in training mode, on a CUDA device.
        optimizer: capturable (`check_capturable`), e.g. torch.optim.SGD(..., fused=True).
        loss_function: (model output, target) -> 0-dimensional loss.
        x, target: an example batch on the model's device; their values do not count.
        autocast: torch.bfloat16 to run the forward and the loss under autocast; float16 would need loss scaling.

    Raises ValueError for a model in eval mode, examples elsewhere than on a CUDA device, or an unfit optimizer.
    """
    check_module(model)
    _check_cuda("x", x)
    _check_cuda("target", target)
    if not model.training:
        raise ValueError("model: in eval mode; call model.train() first, or capture for inference")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast: expected None or torch.bfloat16, got {autocast}")
    check_capturable(optimizer)
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=x.device)
    x, target = (t.detach().clone(memory_format=torch.preserve_format) for t in (x, target))

    def step() -> Tensor:
        with nullcontext() if autocast is None else torch.autocast("cuda", autocast, cache_enabled=False):
            loss = loss_function(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    def warm_up() -> None:
        optimizer.zero_grad(set_to_none=True)
        step()

    snapshot = Snapshot(model, optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(x.device), plan.replayed():
        _on_side_stream(warm_up)
        snapshot.restore()
        with torch.cuda.graph(graph, capture_error_mode=ERROR_MODE):
            loss = step()
    return CapturedStep(graph, x, target, loss.detach())
