"""The documented functions: `residual_block`, `conv_bn_act` and `stem`, and the checks in front of them.

For a tracer (FX, torch.compile, torch.export) each is one operator of `torch.ops.fused_resnet`, so that it records one
node, with the BatchNorm buffers that it updates among its arguments. Below the tracer, and without one, it unfolds into
the autograd Functions of `autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from . import plan as planning
from .autograd import ConvBN, Options, output_hw, run_chain, run_stem
from .ops import Geometry

_LIBRARY = torch.library.Library("fused_resnet", "FRAGMENT")

# The fields of a list of ConvBN as an operator's arguments; lists have one entry per unit, `geometry` seven.
_UNITS = (
    "Tensor[] w, Tensor?[] gamma, Tensor?[] beta, Tensor(a!)?[] running_mean, Tensor(b!)?[] running_var,"
    " Tensor(c!)?[] num_batches_tracked, int[] geometry, float[] eps, float[] momentum, bool[] batch_stats, str[] sync"
)
_CUMULATIVE = -1.0  # momentum=None in a list of floats


def _pack(units: Sequence[ConvBN]) -> tuple[list, ...]:
    w, gamma, beta, mean, var, counter, geometries, eps, momenta, batch_stats, sync = map(list, zip(*units))
    geometry = [number for g in geometries for number in (*g.stride, *g.padding, *g.dilation, g.groups)]
    momentum = [_CUMULATIVE if m is None else m for m in momenta]
    return w, gamma, beta, mean, var, counter, geometry, eps, momentum, batch_stats, sync


def _unpack(w, gamma, beta, mean, var, counter, geometry, eps, momentum, batch_stats, sync) -> list[ConvBN]:
    geometries = [
        Geometry((g[0], g[1]), (g[2], g[3]), (g[4], g[5]), g[6])
        for g in (geometry[7 * i : 7 * i + 7] for i in range(len(w)))
    ]
    momenta = [None if m == _CUMULATIVE else m for m in momentum]
    return [ConvBN(*u) for u in zip(w, gamma, beta, mean, var, counter, geometries, eps, momenta, batch_stats, sync)]


def _no_tensor(name: str, value: object) -> TypeError:
    return TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _check_activation(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise _no_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_units(units: list[ConvBN], shortcut: ConvBN | None) -> None:
    """Raise if there are none, if they are not ConvBNs, or if a geometry is none."""
    if not units:
        raise ValueError("units: expected at least one ConvBN, got none")
    named = {f"units[{i}]": unit for i, unit in enumerate(units)}
    if shortcut is not None:
        named["shortcut"] = shortcut
    for name, unit in named.items():
        if not isinstance(unit, ConvBN):
            raise TypeError(f"{name}: expected a ConvBN, got {type(unit).__name__}")
        for field, pair, smallest in zip(("stride", "padding", "dilation"), unit.geometry, (1, 0, 1)):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or pair[0] < smallest or pair[1] < smallest:
                raise ValueError(
                    f"{name}.geometry.{field}: expected (height, width), each at least {smallest}, got {pair!r}"
                )


def _check_unit(
    name: str, unit: ConvBN, x: Tensor, shape: tuple[int, ...], autocast: torch.dtype | None
) -> tuple[int, ...]:
    """Raise if the unit cannot read an input of that shape on x's device in x's dtype, or autocast's; else its output's
    shape."""
    n, c, height, width = shape
    w, groups = unit.w, unit.geometry.groups
    if not isinstance(w, Tensor):
        raise _no_tensor(f"{name}.w", w)
    if w.dim() != 4:
        raise ValueError(f"{name}.w: expected [K, C / groups, R, S], got shape {tuple(w.shape)}")
    w_shape, device = w.shape, x.device
    k = w_shape[0]
    if groups < 1 or c % groups or k % groups:
        raise ValueError(f"{name}.geometry.groups: must divide the {c} input and {k} output channels, got {groups}")
    if w_shape[1] * groups != c:
        raise ValueError(
            f"{name}.w: shape {tuple(w_shape)} with groups={groups} reads {w_shape[1] * groups} channels, "
            f"the input has {c}"
        )
    if w.device != device:
        raise ValueError(f"{name}.w: on {w.device}, but the input is on {device}; move them to one device")
    if w.dtype != x.dtype and not autocast:
        raise TypeError(f"{name}.w: {w.dtype}, but the input is {x.dtype}; cast one of them or use torch.autocast")
    dtype = autocast or x.dtype
    allowed = (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)
    for field, vector in zip(("gamma", "beta", "running_mean", "running_var"), unit[1:5]):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise _no_tensor(f"{name}.{field}", vector)
        if vector.shape != (k,) or vector.device != device:
            raise ValueError(
                f"{name}.{field}: expected shape ({k},) on {device}, got {tuple(vector.shape)} on {vector.device}"
            )
        if vector.dtype not in allowed:
            raise TypeError(
                f"{name}.{field}: expected {' or '.join(map(str, allowed))} with activations of {dtype}, "
                f"got {vector.dtype}"
            )
    if not unit.batch_stats and (unit.running_mean is None or unit.running_var is None):
        raise ValueError(f"{name}: batch_stats=False needs running_mean and running_var, got None")
    if (unit.running_mean is None) != (unit.running_var is None):
        raise ValueError(f"{name}: expected running_mean and running_var, or neither, got one of them")
    if unit.momentum is None and unit.running_mean is not None and unit.num_batches_tracked is None:
        raise ValueError(f"{name}.momentum: None (cumulative average) needs num_batches_tracked, got None")
    p, q = output_hw(w_shape, unit.geometry, height, width)
    if p < 1 or q < 1:
        raise ValueError(
            f"{name}: the input's {height}x{width} pixels are fewer than its kernel {tuple(w_shape[2:])} needs"
        )
    if unit.batch_stats and not unit.sync and n * p * q == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {(n, k, p, q)} at {name}"
        )
    return n, k, p, q


def _check_chain(
    x: Tensor,
    residual: Tensor | None,
    units: Sequence[ConvBN],
    shortcut: ConvBN | None,
    identity: bool,
    autocast: torch.dtype | None,
) -> None:
    shape = tuple(x.shape)
    for i, unit in enumerate(units):
        shape = _check_unit(f"units[{i}]", unit, x, shape, autocast)
    side, name = None, ""
    if shortcut is not None:
        side, name = _check_unit("shortcut", shortcut, x, tuple(x.shape), autocast), "shortcut"
    elif identity:
        side, name = tuple(x.shape), "x (identity shortcut)"
    elif residual is not None:
        _check_activation("residual", residual)
        if residual.device != x.device:
            raise ValueError(f"residual: on {residual.device}, but x is on {x.device}; move them to one device")
        if residual.dtype != x.dtype and not autocast:
            raise TypeError(f"residual: {residual.dtype}, but x is {x.dtype}; cast one of them or use torch.autocast")
        side, name = tuple(residual.shape), "residual"
    if side is not None and side != shape:
        raise ValueError(f"{name}: shape {side} cannot be added to the output of shape {shape}")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of a convolution on x, None outside autocast and for float64, which it leaves."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def _run_block(
    x: Tensor, residual: Tensor | None, units: list[ConvBN], shortcut: ConvBN | None, options: Options
) -> Tensor:
    _check_activation("x", x)
    dtype = _autocast_dtype(x)
    _check_chain(x, residual, units, shortcut, options.identity, dtype)
    if dtype is None:
        return run_chain(x, residual, units, shortcut, options)
    x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    # The operators below know their dtypes: an autocast of theirs would round fp32 statistics.
    with torch.autocast(x.device.type, enabled=False):
        return run_chain(x, residual, units, shortcut, options)


def _run_stem(x: Tensor, unit: ConvBN, impl: str) -> Tensor:
    _check_activation("x", x)
    dtype = _autocast_dtype(x)
    _check_chain(x, None, [unit], None, False, dtype)
    if dtype is None:
        return run_stem(x, unit, impl)
    with torch.autocast(x.device.type, enabled=False):
        return run_stem(x.to(dtype), unit, impl)


def _block_operator(x, residual, *arguments):
    *flat, has_shortcut, identity, relu, scheme, impl = arguments
    *units, shortcut = _unpack(*flat) if has_shortcut else (*_unpack(*flat), None)
    return _run_block(x, residual, units, shortcut, Options(identity, relu, scheme, impl))


def _stem_operator(x, *arguments):
    *flat, impl = arguments
    return _run_stem(x, *_unpack(*flat), impl)


for _schema, _body in (
    (
        f"residual_block(Tensor x, Tensor? residual, {_UNITS}, bool has_shortcut, bool identity, bool relu, str scheme,"
        " str impl) -> Tensor",
        _block_operator,
    ),
    (f"stem(Tensor x, {_UNITS}, str impl) -> Tensor", _stem_operator),
):
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema[: _schema.index("(")], _body, "CompositeImplicitAutograd")


def is_traced(x: Tensor) -> bool:
    """Whether a tracer wants one operator. Without one, none is called: torch.jit.trace and vmap have no rule for lists
    of optional tensors."""
    return torch.compiler.is_compiling() or has_torch_function((x,))


def _block(
    x: Tensor, residual: Tensor | None, units: list[ConvBN], shortcut: ConvBN | None, options: Options
) -> Tensor:
    _check_units(units, shortcut)
    if not is_traced(x):
        return _run_block(x, residual, units, shortcut, options)
    everyone = units if shortcut is None else [*units, shortcut]
    return torch.ops.fused_resnet.residual_block(x, residual, *_pack(everyone), shortcut is not None, *options)


def residual_block(
    x: Tensor,
    units: Sequence[ConvBN],
    shortcut: ConvBN | None = None,
    *,
    residual: Tensor | None = None,
    identity: bool | None = None,
    scheme: str = "auto",
    impl: str | None = None,
) -> Tensor:
    """A residual block: out = relu(F(x) + s), F = BN(conv(relu(BN(conv(... x))))) over `units`.

    s is BN(conv(x)) with a `shortcut`, `residual` if one is given, else x, or nothing with `identity=False`: the plain
    stack of the degradation experiment (He et al. 2015, sections 3.2 and 4.1).

    Args:
        x: [N, C, H, W], float16, bfloat16, float32 or float64, any memory format (converted to channels_last).
        units: the convolutions with their BatchNorms, in order; `ConvBN` documents the fields.
        shortcut: the projection of a block whose shape changes.
        residual: [N, K, P, Q], what a shortcut of another kind has computed.
        scheme: "auto", "stored" or "moments": how training ends the block (module `autograd`).
        impl: "auto", "reference", "triton" or "cuda"; default: what `fused_resnet.use` says.

    Returns:
        [N, K, P, Q] in channels_last memory; x's dtype, or under autocast its dtype. BatchNorm buffers of units with
        `batch_stats` are updated in place.

    Raises:
        ValueError, TypeError: an argument that does not fit, named; nothing has been changed then.
        fused_resnet.Unsupported: an explicit `impl` or `scheme` that cannot run.
    """
    if scheme not in ("auto", "stored", "moments"):
        raise ValueError(f'scheme: expected "auto", "stored" or "moments", got {scheme!r}')
    if identity is None:
        identity = shortcut is None and residual is None
    if (shortcut is not None) + (residual is not None) + identity > 1:
        raise ValueError("shortcut, residual, identity: a block has at most one of them")
    return _block(x, residual, [*units], shortcut, Options(identity, True, scheme, planning.resolve_impl(impl)))


def conv_bn_act(
    x: Tensor, unit: ConvBN, residual: Tensor | None = None, relu: bool = True, *, impl: str | None = None
) -> Tensor:
    """relu?(BN(conv(x)) + residual) in training and inference.

    residual: [N, K, P, Q] like the output, or None. Everything else as in `residual_block`.
    """
    return _block(x, residual, [unit], None, Options(False, relu, "stored", planning.resolve_impl(impl)))


def stem(x: Tensor, unit: ConvBN, *, impl: str | None = None) -> Tensor:
    """max_pool(relu(BN(conv(x))), kernel 3, stride 2, padding 1) without storing the normalised map.

    x [N, C, H, W] -> [N, K, ceil(P / 2), ceil(Q / 2)] for a convolution to P x Q. Everything else as in
    `residual_block`.
    """
    impl = planning.resolve_impl(impl)
    _check_units([unit], None)
    return torch.ops.fused_resnet.stem(x, *_pack([unit]), impl) if is_traced(x) else _run_stem(x, unit, impl)
