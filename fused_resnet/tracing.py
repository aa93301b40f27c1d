"""Walk a model on meta tensors, shapes without data, and know which layer runs: for `explain` and `profile`."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from .modules import FusedBlock, FusedConvBNAct, check_module


class LayerTracker:
    """Context manager that keeps `layer`, the name of the innermost module that runs, in forward and in backward.

    `on_leaf(name, module, input, unfused)` is called before each module without children; `unfused` says why the fused
    module around it runs its children one by one, None elsewhere. The hooks are global ones, since a hook of its own
    would make a module ineligible for fusing.
    """

    def __init__(self, model: nn.Module, on_leaf: Callable[[str, nn.Module, Tensor, str | None], None]) -> None:
        check_module(model)
        self._names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
        self._stack = [type(model).__name__]
        self._unfused: list[str] = []
        self._labelled: set = set()
        self._on_leaf = on_leaf
        self._thread = get_ident()  # the hooks fire in others, too

    @property
    def layer(self) -> str:
        """Name of the module that runs now, "" never: the model's class outside of its children."""
        return self._stack[-1]

    def _label(self, tensor: object, name: str) -> None:
        """Name the layer in backward: the autograd node that made `tensor` puts it on the stack before it runs."""
        node = tensor.grad_fn if isinstance(tensor, Tensor) else None
        if node is not None and node not in self._labelled:
            self._labelled.add(node)
            node.register_prehook(lambda _: self._stack.__setitem__(slice(None), [name]))

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        if get_ident() != self._thread:
            return
        if inputs:
            self._label(inputs[0], self.layer)
        name = self._names.get(id(module), type(module).__name__)
        self._stack.append(name)
        reason = _unfused_reason(module)
        if reason is not None:
            self._unfused.append(f"{name} runs unfused: {reason}")
        if inputs and isinstance(inputs[0], Tensor) and next(module.children(), None) is None:
            self._on_leaf(name, module, inputs[0], self._unfused[-1] if self._unfused else None)

    def _leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if get_ident() != self._thread:
            return
        self._label(output, self._stack.pop())
        if _unfused_reason(module) is not None:
            self._unfused.pop()

    def __enter__(self) -> LayerTracker:
        self._handles = (
            global_hooks.register_module_forward_pre_hook(self._enter),
            global_hooks.register_module_forward_hook(self._leave),
        )
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()


def _unfused_reason(module: nn.Module) -> str | None:
    return module.unfused_reason() if isinstance(module, (FusedBlock, FusedConvBNAct)) else None


def run_on_meta(model: nn.Module, x: Tensor) -> None:
    """Forward, and in training mode backward, of `model` on a meta tensor like x; the model stays as it is.

    Weights are taken to have x's dtype, as autocast sees to; BatchNorms of float32 keep theirs beside 16 bit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    state, metas = {}, {}  # a tensor that several modules share stays one
    for prefix, module in model.named_modules(remove_duplicate=False):
        float32 = isinstance(module, nn.modules.batchnorm._BatchNorm) and x.dtype.itemsize == 2
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            keep = not tensor.is_floating_point() or (float32 and tensor.dtype == torch.float32)
            dtype = tensor.dtype if keep else x.dtype
            if tensor not in metas:
                meta = torch.empty_like(tensor, dtype=dtype, device="meta")
                metas[tensor] = meta.requires_grad_(tensor.requires_grad)
            state[f"{prefix}.{name}" if prefix else name] = metas[tensor]
    with torch.set_grad_enabled(model.training):
        out = torch.func.functional_call(model, state, (torch.empty_like(x, device="meta"),))
        outputs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        if model.training and outputs:
            sum(t.sum() for t in outputs).backward()
