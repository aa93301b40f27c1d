"""The operators `torch.ops.fused_resnet.*`: schemas, fake kernels, and the one place that picks an implementation.

Each operator has the name and the meaning of its function in `reference`, where the mathematics is documented; its
schema flattens that function's arguments in order, so that `op.conv_stats(*a, w, *geometry, impl)` calls it. The last
argument `impl` ("auto", "reference", "triton" or "cuda") is part of the schema because backward runs in a thread of its
own, and a traced graph should say what it asked for.

The fake kernel of an operator is its reference function run on fake tensors: shapes and strides cannot drift apart.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import plan as planning
from . import reference, tuned
from .plan import Plan, Problem, statistics_rows
from .reference import Deferred, Frozen, Geometry, Gradient, Running

_LIBRARY = torch.library.Library("fused_resnet", "DEF")


class _Recording(threading.local):
    """Who is told what runs, and the card to plan for: in this thread, since another one may be training."""

    callback: Callable[[Problem, Plan], None] | None = None
    device: planning.Device | None = None


_recording = _Recording()


@contextmanager
def record(callback: Callable[[Problem, Plan], None], device: planning.Device | None):
    """Call `callback(problem, plan)` for every operator that runs on fake or meta tensors, planned for `device`."""
    before = _recording.callback, _recording.device
    _recording.callback, _recording.device = callback, device
    try:
        yield
    finally:
        _recording.callback, _recording.device = before


@lru_cache
def _cuda_device(index: int, in_job: bool) -> planning.Device:
    """`in_job`: whether this process has joined others, which then agree on a table of tuned plans."""
    card = torch.cuda.get_device_properties(index)
    arch = card.major * 10 + card.minor
    return planning.Device(
        arch,
        card.multi_processor_count,
        card.shared_memory_per_block_optin,
        triton_missing="" if importlib.util.find_spec("triton") else "Triton is not installed",
        cuda_missing=importlib.import_module(".kernels.native", __package__).unavailable() or "",
        tuned=tuned.load(arch, card.name),
    )


def forget_plans() -> None:
    """Read all tables of plans anew when the next operator runs."""
    _cuda_device.cache_clear()
    planning.forget_tables()


def device_of(x: Tensor, impl: str) -> planning.Device | None:
    """The planner's description of x's card; None on other devices, except where Triton's interpreter runs."""
    if x.device.type == "cuda":
        distributed = torch.distributed
        return _cuda_device(x.device.index, distributed.is_available() and distributed.is_initialized())
    if x.device.type == "cpu" and impl == "triton":
        try:
            import triton
        except ImportError:
            return None
        if triton.knobs.runtime.interpret:
            return planning.Device.default(90)
    return None


def nothing_measured(x: Tensor) -> bool:
    """Whether "auto" takes the library for every problem on x's device: there are no kernels, or no measurements. Not
    of meta tensors, whose plans somebody wants to see."""
    device = device_of(x, "auto")
    return not x.is_meta and (device is None or not planning.measurements(device))


def _sizes(shape: Sequence[int | torch.SymInt]) -> tuple[int, ...]:
    """A shape as numbers. While a dynamic one is traced, those it was seen with: a plan must not specialise it."""
    return tuple([size if type(size) is int else int(size.node.hint or 0) for size in shape])


def _problem(
    name: str, x: Tensor, geometry=None, w_shape=None, prologue: bool = False, epilogue: str = "", side: int = 0
) -> Problem:
    n, c, height, width = _sizes(x.shape)
    k, _, r, s = _sizes(w_shape or (c, c, 0, 0))
    geometry = geometry or Geometry()
    return Problem(
        name, n, height, width, c, k, r, s, *map(tuple, geometry[:3]), geometry.groups,
        str(x.dtype).removeprefix("torch."), prologue, epilogue, side,
    )  # fmt: skip


def _select(name: str, impl: str, x: Tensor, *details):
    """The function that runs operator `name` for these arguments: a launch_* with its plan, or the reference."""
    chosen = planning.plan_for(_problem(name, x, *details), device_of(x, impl), impl)
    if chosen.backend in ("triton", "cuda"):
        module = importlib.import_module(f".kernels.{chosen.module}", __package__)
        return partial(getattr(module, chosen.launch), plan=chosen)
    return getattr(reference, name)


def _block_problem(name: str, x: Tensor, convolutions: list[tuple[Tensor, Geometry]], kind: str) -> Problem:
    """Kernel, groups and dilation of the largest convolution, the stride, the last one's output channels, and in
    `epilogue` the kind and every convolution; what is for a CUDA graph is a problem of its own."""
    kind = planning.GRAPH + kind if planning.is_replayed() else kind
    chain = tuple([(_sizes(w.shape), (*g[0], *g[1], *g[2], g[3])) for w, g in convolutions])
    return _chain_problem(name, _sizes(x.shape), x.dtype, chain, kind)


@lru_cache(maxsize=1024)
def _chain_problem(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, chain: tuple[tuple[tuple, tuple], ...], kind: str
) -> Problem:
    """`_block_problem` of numbers, so that it is made once for each shape; chain: a weight's four sizes and a
    geometry's seven for each convolution."""
    (_, _, r, s), (*_, ph, pw, dh, dw, groups) = max(chain, key=lambda pair: pair[0][2])
    stride = max(geometry[:2] for _, geometry in chain)
    n, c, height, width = shape
    kernels = " ".join(f"{r}x{s}-{k}" for (k, _, r, s), _ in chain)
    return Problem(
        name, n, height, width, c, chain[-1][0][0], r, s, stride, (ph, pw), (dh, dw), groups,
        str(dtype).removeprefix("torch."), False, f"{kind} {kernels}",
    )  # fmt: skip


def plan_block(name: str, impl: str, x: Tensor, convolutions: list[tuple[Tensor, Geometry]], kind: str) -> Plan:
    """Whether a whole block or stem runs as fused operators or as the library's; kind: "training" or "inference", and
    the shortcut."""
    problem = _block_problem(name, x, convolutions, kind)
    if _recording.callback is not None:
        chosen = planning.plan_block(problem, _recording.device, impl)
        _recording.callback(problem, chosen)
        return chosen
    return planning.plan_block(problem, device_of(x, impl), impl)


def stage_problem(x: Tensor, convolutions: list[tuple[Tensor, Geometry]], depth: int) -> Problem:
    """The schedule of a stage of `depth` blocks in inference, the first one with these convolutions."""
    return _block_problem(planning.STAGE_OP, x, convolutions, f"inference {depth}")


def part_of_stage(impl: str, x: Tensor, convolutions: list[tuple[Tensor, Geometry]], depth: int) -> int:
    """How many images such a stage takes at once; 0: all."""
    device = device_of(x, impl) if _recording.callback is None else _recording.device
    if device is None:
        return 0
    problem = stage_problem(x, convolutions, depth)
    chosen = planning.plan_stage(problem, device, impl)
    if chosen.backend == "library":
        return 0
    if _recording.callback is not None:
        _recording.callback(problem, chosen)
    return int(chosen.backend)


def _bottleneck_details(weights: list[Tensor], geometry: Geometry) -> tuple:
    return geometry, weights[1].shape, False, "identity" if len(weights) == 3 else "projection"


def fuses_bottleneck(impl: str, x: Tensor, weights: list[Tensor], geometry: Geometry) -> bool:
    """Whether one kernel runs a bottleneck of these three weights, and a fourth one in the shortcut: asked for by name,
    or measured. `geometry` is that of the second one.

    Where it cannot, the caller has an operator for each convolution, which says why if it cannot run either.
    """
    problem = _problem("bottleneck_affine", x, *_bottleneck_details(weights, geometry))
    device = device_of(x, impl) if _recording.callback is None else _recording.device
    if device is not None and planning.cuda_unsupported(problem, device):
        return False
    try:
        chosen = planning.plan_for(problem, device, impl)
    except planning.Unsupported:
        return False
    if _recording.callback is not None and chosen.backend != "cuda":
        _recording.callback(problem, chosen)  # the operator, which would, does not run
    return chosen.backend == "cuda"


def _select_fake(name: str, impl: str, x: Tensor, *details):
    if _recording.callback is not None:
        problem = _problem(name, x, *details)
        _recording.callback(problem, planning.plan_for(problem, _recording.device, impl))
    return getattr(reference, name)


def _operator(schema: str):
    """Define an operator from its schema and a body(select, *arguments), shared by the real and the fake kernel."""

    def define(body):
        name = schema[: schema.index("(")]
        _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        _LIBRARY.impl(name, partial(body, _select), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fused_resnet::{name}", partial(body, _select_fake), lib=_LIBRARY)
        return body

    return define


def _one_row_per_chunk(rows: Tensor) -> Tensor:
    """Give reference statistics [1, R, C] the kernels' shape [T, R, C]; the added rows count nothing."""
    missing = statistics_rows(rows.shape[2]) - rows.shape[0]
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows


def _sums(result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """An operator cannot return None: no sums are an empty tensor."""
    y, sums = result
    return y, y.new_empty(0) if sums is None else _one_row_per_chunk(sums)


def _deferred(c: Tensor | None, bn: Tensor | None) -> Deferred | None:
    return None if c is None else Deferred(c, bn)


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_AFFINE = "Tensor? gamma, Tensor? beta"
_FROZEN = f"Tensor running_mean, Tensor running_var, {_AFFINE}, float eps"
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"


def _running(mean: Tensor | None, var: Tensor | None, counter: Tensor | None) -> Running | None:
    return None if mean is None else Running(mean, var, counter)


# Forward


@_operator(f"conv_stats(Tensor x, Tensor? bn_in, Tensor w, {_GEOMETRY}, str impl) -> (Tensor, Tensor)")
def _(select, x, bn_in, w, stride, padding, dilation, groups, impl):
    geometry = Geometry(stride, padding, dilation, groups)
    run = select("conv_stats", impl, x, geometry, w.shape, bn_in is not None, "stats")
    c, partials = run(Deferred(x, bn_in), w, geometry)
    return c, _one_row_per_chunk(partials)


@_operator(f"conv_affine(Tensor x, Tensor w, {_FROZEN}, Tensor? residual, bool relu, {_GEOMETRY}, str impl) -> Tensor")
def _(select, x, w, mean, var, gamma, beta, eps, residual, relu, stride, padding, dilation, groups, impl):
    geometry = Geometry(stride, padding, dilation, groups)
    epilogue = "affine" if residual is None else "affine+residual"
    run = select("conv_affine", impl, x, geometry, w.shape, False, epilogue)
    return run(x, w, Frozen(mean, var, gamma, beta, eps), residual, relu, geometry)


@_operator(
    "bottleneck_affine(Tensor x, Tensor[] w, Tensor[] running_mean, Tensor[] running_var, Tensor?[] gamma,"
    f" Tensor?[] beta, float[] eps, {_GEOMETRY}, str impl) -> Tensor"
)
def _(select, x, w, mean, var, gamma, beta, eps, stride, padding, dilation, groups, impl):
    geometry = Geometry(stride, padding, dilation, groups)
    run = select("bottleneck_affine", impl, x, *_bottleneck_details(w, geometry))
    return run(x, tuple(w), tuple(map(Frozen, mean, var, gamma, beta, eps)), geometry)


@_operator(f"conv_affine_pool(Tensor x, Tensor w, {_FROZEN}, {_GEOMETRY}, str impl) -> Tensor")
def _(select, x, w, mean, var, gamma, beta, eps, stride, padding, dilation, groups, impl):
    geometry = Geometry(stride, padding, dilation, groups)
    run = select("conv_affine_pool", impl, x, geometry, w.shape, False, "affine")
    return run(x, w, Frozen(mean, var, gamma, beta, eps), geometry)


@_operator(f"bn_finalize(Tensor partials, {_AFFINE}, {_RUNNING}, float? momentum, float eps, str impl) -> Tensor")
def _(select, partials, gamma, beta, mean, var, counter, momentum, eps, impl):
    run = select("bn_finalize", impl, partials.unsqueeze(-1).transpose(1, 2))
    return run(partials, gamma, beta, _running(mean, var, counter), momentum, eps)


@_operator(f"bn_frozen({_FROZEN}, str impl) -> Tensor")
def _(select, mean, var, gamma, beta, eps, impl):
    return select("bn_frozen", impl, mean.view(1, -1, 1, 1))(mean, var, gamma, beta, eps)


@_operator("merge_partials(Tensor partials, str impl) -> Tensor")
def _(select, partials, impl):
    return select("merge_partials", impl, partials.unsqueeze(-1).transpose(1, 2))(partials)


@_operator("bn_act(Tensor c, Tensor bn, bool relu, str impl) -> Tensor")
def _(select, c, bn, relu, impl):
    return select("bn_act", impl, c)(Deferred(c, bn), relu)


@_operator("bn_join(Tensor c, Tensor bn, Tensor shortcut, Tensor? bn_shortcut, str impl) -> (Tensor, Tensor)")
def _(select, c, bn, shortcut, bn_shortcut, impl):
    return select("bn_join", impl, c)(Deferred(c, bn), Deferred(shortcut, bn_shortcut))


@_operator(
    "conv1x1_join(Tensor x, Tensor? bn_in, Tensor w, Tensor bn, Tensor shortcut, Tensor? w_shortcut,"
    " Tensor? bn_shortcut, int stride_shortcut, str impl) -> (Tensor, Tensor)"
)
def _(select, x, bn_in, w, bn, shortcut, w_shortcut, bn_shortcut, stride_shortcut, impl):
    details = w.shape, bn_in is not None, "join"
    geometry = Geometry()
    if w_shortcut is not None:
        details = w.shape, bn_in is not None, "join_downsample", w_shortcut.shape[1]
        geometry = Geometry((stride_shortcut, stride_shortcut))
    run = select("conv1x1_join", impl, x, geometry, *details)
    return run(Deferred(x, bn_in), w, bn, shortcut, w_shortcut, bn_shortcut, stride_shortcut)


@_operator("moments(Tensor x, Tensor? bn_in, int stride, str impl) -> Tensor")
def _(select, x, bn_in, stride, impl):
    geometry = Geometry((stride, stride))
    return select("moments", impl, x, geometry, None, bn_in is not None)(Deferred(x, bn_in), stride)


@_operator(
    f"moments_finalize(Tensor gram, Tensor w, {_AFFINE}, {_RUNNING}, float? momentum, float eps, str impl) -> Tensor"
)
def _(select, gram, w, gamma, beta, mean, var, counter, momentum, eps, impl):
    run = select("moments_finalize", impl, w)
    return run(gram, w, gamma, beta, _running(mean, var, counter), momentum, eps)


@_operator("bn_act_pool(Tensor c, Tensor bn, str impl) -> (Tensor, Tensor)")
def _(select, c, bn, impl):
    return select("bn_act_pool", impl, c)(Deferred(c, bn))


# Backward


@_operator("bn_act_sums(Tensor dy, Tensor c, Tensor bn, str impl) -> (Tensor, Tensor)")
def _(select, dy, c, bn, impl):
    return _sums(select("bn_act_sums", impl, c)(dy, Deferred(c, bn)))


@_operator(
    "join_sums(Tensor dout, Tensor? mask, Tensor c, Tensor bn, Tensor? shortcut, Tensor? bn_shortcut, str impl)"
    " -> (Tensor, Tensor)"
)
def _(select, dout, mask, c, bn, shortcut, bn_shortcut, impl):
    run = select("join_sums", impl, c)
    sums, sums_shortcut = run(dout, mask, Deferred(c, bn), Deferred(shortcut, bn_shortcut))
    empty = sums.new_empty(0) if sums_shortcut is None else _one_row_per_chunk(sums_shortcut)
    return _one_row_per_chunk(sums), empty


@_operator("relu_grad(Tensor dout, Tensor mask, str impl) -> Tensor")
def _(select, dout, mask, impl):
    return select("relu_grad", impl, dout)(dout, mask)


@_operator("bn_backward_finalize(Tensor sums, Tensor bn, Tensor? total, str impl) -> (Tensor, Tensor, Tensor)")
def _(select, sums, bn, total, impl):
    return select("bn_backward_finalize", impl, sums.unsqueeze(-1).transpose(1, 2))(sums, bn, total)


@_operator("bn_backward_apply(Tensor g, Tensor? mask, Tensor c, Tensor coef, str impl) -> Tensor")
def _(select, g, mask, c, coef, impl):
    return select("bn_backward_apply", impl, g)(Gradient(g, mask, c, coef))


@_operator(
    f"conv_dgrad(Tensor g, Tensor? mask, Tensor? c, Tensor? coef, Tensor w, {_GEOMETRY}, SymInt[] input_hw,"
    " Tensor? relu_c, Tensor? relu_bn, Tensor? addend, Tensor? addend_mask, int addend_stride, str impl)"
    " -> (Tensor, Tensor)"
)
def _(
    select, g, mask, c, coef, w, stride, padding, dilation, groups, input_hw,
    relu_c, relu_bn, addend, addend_mask, addend_stride, impl,
):  # fmt: skip
    geometry = Geometry(stride, padding, dilation, groups)
    epilogue = "".join((("relu" if relu_c is not None else ""), ("add" if addend is not None else "")))
    # Seen from the gradient: it has the convolution's output channels, and the result its input channels.
    transposed = (w.shape[1] * groups, w.shape[0] // groups, *w.shape[2:])
    run = select("conv_dgrad", impl, g, geometry, transposed, coef is not None, epilogue)
    grad_add = None if addend is None else Gradient(addend, addend_mask)
    result = run(
        Gradient(g, mask, c, coef), w, geometry, tuple(input_hw), _deferred(relu_c, relu_bn), grad_add, addend_stride
    )
    return _sums(result)


@_operator(
    "conv_wgrad(Tensor x, Tensor? bn_in, Tensor g, Tensor? mask, Tensor? c, Tensor? coef, int[] w_shape,"
    f" {_GEOMETRY}, str impl) -> Tensor"
)
def _(select, x, bn_in, g, mask, c, coef, w_shape, stride, padding, dilation, groups, impl):
    geometry = Geometry(stride, padding, dilation, groups)
    run = select("conv_wgrad", impl, x, geometry, w_shape, bn_in is not None)
    return run(Deferred(x, bn_in), Gradient(g, mask, c, coef), tuple(w_shape), geometry)


@_operator("cross_moments(Tensor x, Tensor? bn_in, Tensor g, Tensor? mask, int stride, str impl) -> Tensor")
def _(select, x, bn_in, g, mask, stride, impl):
    w_shape = (g.shape[1], x.shape[1], 1, 1)
    run = select("cross_moments", impl, x, Geometry((stride, stride)), w_shape, bn_in is not None)
    return run(Deferred(x, bn_in), g, mask, stride)


@_operator("cross_sums(Tensor cross, Tensor w, Tensor bn, str impl) -> Tensor")
def _(select, cross, w, bn, impl):
    return select("cross_sums", impl, w)(cross, w, bn)


@_operator(
    "moments_weights(Tensor cross, Tensor gram, Tensor w, Tensor coef, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(select, cross, gram, w, coef, impl):
    return select("moments_weights", impl, w)(cross, gram, w, coef)


@_operator(
    "conv1x1_dgrad_moments(Tensor dout, Tensor? mask, Tensor w_g, Tensor x, Tensor? bn_in, Tensor w_a, Tensor w_1,"
    " int stride, str impl) -> (Tensor, Tensor)"
)
def _(select, dout, mask, w_g, x, bn_in, w_a, w_1, stride, impl):
    geometry = Geometry((stride, stride))
    run = select("conv1x1_dgrad_moments", impl, x, geometry, (*w_g.shape, 1, 1), bn_in is not None)
    return _sums(run(dout, mask, w_g, Deferred(x, bn_in), w_a, w_1, stride))


@_operator("bn_act_pool_backward(Tensor dy, Tensor index, Tensor c, Tensor bn, str impl) -> (Tensor, Tensor)")
def _(select, dy, index, c, bn, impl):
    return _sums(select("bn_act_pool_backward", impl, c)(dy, index, Deferred(c, bn)))
