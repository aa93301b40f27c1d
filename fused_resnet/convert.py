"""`fuse(model)` and `unfuse(model)`: switch an existing model to the fused operators in place, and back.

A module that can be fused changes its class, nothing else: parameters, buffers, hooks, names and every reference to it
stay, so optimizers and wrappers do not notice. The new class derives from the old one (`isinstance` keeps answering as
before) and is made on the fly, since it depends on what is found: torchvision's and timm's residual blocks,
torchvision's ResNet for its stem, and plain Sequentials of Conv2d, BatchNorm2d and ReLU.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

from torch import Tensor, nn

from . import functional
from .modules import FusedBlock, FusedForward, Switchable, check_module, conv_bn, conv_bn_reason


class _Swapped:
    """Mixed into every class that `fuse` makes; `ORIGINAL` is the class that `unfuse` restores."""

    ORIGINAL: type[nn.Module]

    def __reduce_ex__(self, protocol):
        # Made on the fly, the class has no name to be found by: rebuild it from the original, for pickle and deepcopy.
        return _blank, (self.ORIGINAL,), self.__getstate__()


def _blank(original: type[nn.Module]) -> nn.Module:
    fused = _fused_class(original)
    return fused.__new__(fused)


def conv_bn_runs(children: list[nn.Module]) -> list[tuple[int, int]]:
    """Where [conv, BatchNorm] or [conv, BatchNorm, ReLU] stand in a list of modules: (start, length) of each."""
    runs, i = [], 0
    while i + 1 < len(children):
        if conv_bn_reason(children[i], children[i + 1]) is not None:
            i += 1
            continue
        length = 3 if i + 2 < len(children) and type(children[i + 2]) is nn.ReLU else 2
        runs.append((i, length))
        i += length
    return runs


class _FusedSequential(nn.Module):
    """A Sequential that runs each of its `conv_bn_runs` as one operator, and calls its other children."""

    def forward(self, input: Tensor) -> Tensor:  # the original's name for it
        x = input
        children = list(self._modules.values())
        runs, i = dict(conv_bn_runs(children)), 0
        while i < len(children):
            length = runs.get(i, 1)
            if length == 1:
                x = children[i](x)
            else:
                unit = conv_bn(*children[i : i + 2], functional.is_traced(x))
                x = functional.conv_bn_act(x, unit, relu=length == 3)
            i += length
        return x


# (module, class) -> mixin and the names of its (conv, BatchNorm, activation) children. Recognised by name, so that
# neither library has to be installed.
_BASIC = ("conv1", "bn1"), ("conv2", "bn2")
_BOTTLENECK = (*_BASIC, ("conv3", "bn3"))
_KNOWN: dict[tuple[str, str], tuple[type, tuple]] = {
    ("torchvision.models.resnet", "BasicBlock"): (FusedBlock, tuple((*pair, "relu") for pair in _BASIC)),
    ("torchvision.models.resnet", "Bottleneck"): (FusedBlock, tuple((*pair, "relu") for pair in _BOTTLENECK)),
    ("timm.models.resnet", "BasicBlock"): (
        FusedBlock,
        tuple((*pair, f"act{i}") for i, pair in enumerate(_BASIC, 1)),
    ),
    ("timm.models.resnet", "Bottleneck"): (
        FusedBlock,
        tuple((*pair, f"act{i}") for i, pair in enumerate(_BOTTLENECK, 1)),
    ),
    ("torchvision.models.resnet", "ResNet"): (FusedForward, ()),
    ("torchvision.ops.misc", "Conv2dNormActivation"): (_FusedSequential, ()),
    ("torch.nn.modules.container", "Sequential"): (_FusedSequential, ()),
}


@lru_cache
def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    mixin, layers = _KNOWN[original.__module__, original.__name__]
    body = {"ORIGINAL": original, "__module__": __name__}
    if mixin is FusedBlock:
        body |= {"LAYERS": layers, "forward_unfused": original.forward}
    return type(f"Fused{original.__name__}", (_Swapped, mixin, original), body)


def _native(module: nn.Module) -> bool:
    """A module that this package's constructors made fused: it is switched by its flag."""
    return isinstance(module, Switchable) and not isinstance(module, _Swapped)


def fuse(model: nn.Module) -> nn.Module:
    """Switch every part of `model` that can be fused to the fused operators, in place, and return the model.

    What is known: torchvision's and timm's BasicBlock and Bottleneck (exactly these classes: a subclass may compute
    something else), torchvision's ResNet for its stem, Sequentials with Conv2d, BatchNorm2d(, ReLU) in a row, and this
    package's own modules after `unfuse`. Anything else stays as it is. Parameters and buffers are shared with the
    model as it was, state_dict keys and outputs do not change. `explain` says what runs fused and what does not. Fuse
    before fully_shard, which changes classes, too; before or after DistributedDataParallel and torch.compile.

    Raises TypeError if `model` is not an nn.Module. Warns if nothing in it is known.
    """
    check_module(model)
    for module in list(model.modules()):
        if _native(module):
            module.__dict__.pop("fused", None)
            continue
        cls = type(module)
        known = _KNOWN.get((cls.__module__, cls.__name__))
        if known is None:
            continue
        if known[0] is _FusedSequential and not conv_bn_runs(list(module.children())):
            continue
        module.__class__ = _fused_class(cls)
    if not any(isinstance(module, (Switchable, _Swapped)) for module in model.modules()):
        warnings.warn(f"fuse: nothing in this {type(model).__name__} is known; it stays as it is", stacklevel=2)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse` in place and return the model: original classes, the same parameters, buffers and outputs.

    This package's own modules keep their class and run their children one by one until `fuse` is called.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the class of a module was derived from a fused one since (fully_shard does so); nothing is changed.
    """
    check_module(model)
    for name, module in model.named_modules():
        if isinstance(module, _Swapped) and type(module) is not _fused_class(module.ORIGINAL):
            raise ValueError(
                f"model: {name or 'it'} has become a {type(module).__name__} since it was fused; undo that first"
            )
    for module in model.modules():
        if isinstance(module, _Swapped):
            module.__class__ = module.ORIGINAL
        elif _native(module):
            module.fused = False
    return model
