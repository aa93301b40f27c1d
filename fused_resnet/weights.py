"""Loading of checkpoints: torchvision's weight enums by member or name, and files. Nothing changes unless all fits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_SHOWN = 5
_COUNTER = "num_batches_tracked"


def _torchvision_enum(builder: str, weights: Any) -> Any:
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"weights: {weights!r} is no existing file, and torchvision, which has the named weights of {builder}, "
            f"cannot be imported: {error}"
        ) from error
    return get_model_weights(builder)


def resolve(builder: str, weights: Any) -> Any:
    """A member of torchvision's weights enum of `builder`, or the path of a checkpoint file.

    `weights`: the member itself, its name ("DEFAULT", "IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2"), or a path.
    Raises ValueError for a name that is neither, listing the allowed ones; TypeError for anything else; ImportError
    where torchvision is needed and missing.
    """
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and os.path.exists(weights)):
        return os.fspath(weights)
    enum = _torchvision_enum(builder, weights)
    if isinstance(weights, str):
        prefix, _, name = weights.rpartition(".")
        if prefix in ("", enum.__name__) and name in enum.__members__:
            return enum[name]
        allowed = ", ".join(enum.__members__)
        raise ValueError(f"weights: expected one of {allowed}, or the path of an existing file, got {weights!r}")
    if not isinstance(weights, enum):
        raise TypeError(f"weights: expected a {enum.__name__}, a name or a path, got {weights!r}")
    return weights


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """The state_dict in a file: plain, under "state_dict" or "model", with or without the prefixes of wrappers,
    DistributedDataParallel's "module." and torch.compile's "_orig_mod.".

    Raises ValueError, naming the file, if it cannot be read or holds no tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch.load's own message tells how to run code from the file.
        reason = "it is damaged or holds other objects than tensors (save model.state_dict())"
        raise ValueError(f"weights: {path} is not a readable checkpoint: {reason}") from error
    except Exception as error:
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(f"weights: {path} is not a readable checkpoint: {reason}") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise ValueError(f"weights: {path} holds no state_dict (a mapping from names to tensors)")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def load(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """model.load_state_dict(state), after checking that every key is there and every shape fits.

    Raises ValueError naming `source` and the first few missing, unexpected and mis-shaped keys; the model is unchanged
    then. num_batches_tracked may be missing (checkpoints of old PyTorch), or present for a BatchNorm that keeps none
    (torchvision's FrozenBatchNorm2d).
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith(_COUNTER)]
    unexpected = [
        key
        for key in state
        if key not in own and not (key.endswith(_COUNTER) and key.removesuffix(_COUNTER) + "running_mean" in own)
    ]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"weights: {source} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict({**own, **{key: value for key, value in state.items() if key in own}})
