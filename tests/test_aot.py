"""Every kernel a plan may choose for any layer of any model compiles for GPUs that are not here, without spills."""

import importlib

import pytest
import torch

from fused_resnet.plan import FAMILIES, MODELS, Device, Problem, Unsupported, model_problems, triton_plan
from fused_resnet.reference import Deferred, Frozen, Geometry, Gradient, Running

pytest.importorskip("triton")

import aot  # noqa: E402

ARCHS = (80, 90, 100)
BATCHES = (1, 32, 256)


def meta(*shape, dtype=torch.float32):
    memory = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory)


def bits(x):
    """ReLU bits of an activation."""
    n, c, h, w = x.shape
    return torch.empty(n, h, w, -(-c // 8), dtype=torch.uint8, device="meta")


def gradients(problem: Problem, g):
    """The ways the gradient of a convolution's output comes: written out, or deferred, from a ReLU with bits or not."""
    coef = meta(3, g.shape[1])
    if problem.op == "conv_wgrad":
        deferred = (problem.r, problem.s, problem.stride) == (1, 1, (1, 1))
    else:
        deferred = problem.prologue
    if not deferred:
        return [Gradient(g)]
    return [Gradient(g, mask, g, coef) for mask in (None, bits(g)) if mask is None or "add" not in problem.epilogue]


def dgrad_arguments(problem: Problem, g, dx, geometry):
    """With what the epilogue of an input gradient names; an identity's addend has a mask, a downsample's a stride."""
    w = meta(problem.c, problem.k // problem.groups, problem.r, problem.s, dtype=g.dtype)
    relu_of = Deferred(dx, meta(5, problem.k)) if "relu" in problem.epilogue else None
    addends = [(None, 1)]
    if "add" in problem.epilogue:
        stride = 2 if problem.r == 1 else geometry.stride[0]
        sparse = meta(*dx.shape[:2], *(-(-extent // stride) for extent in dx.shape[2:]), dtype=g.dtype)
        addends = [(Gradient(dx, bits(dx)), 1), (Gradient(dx), 1), (Gradient(sparse), stride)]
    hw = tuple(dx.shape[2:])
    return [(grad, w, geometry, hw, relu_of, *addend) for grad in gradients(problem, g) for addend in addends]


def dgrad_moments_arguments(problem: Problem, a):
    """Of an input gradient from moments, for the activation ``a`` as it comes."""
    k, n = problem.c, problem.k
    dout = meta(problem.n, n, *problem.out_hw, dtype=a.c.dtype)
    w_g, w_a = meta(n, k, dtype=a.c.dtype), meta(k, k, dtype=a.c.dtype)
    return [(dout, mask, w_g, a, w_a, meta(k), problem.stride[0]) for mask in (None, bits(dout))]


def moments_arguments(problem: Problem, a):
    """Of the operators on moments: those whose first tensor is an activation, and those whose first is a weight."""
    if problem.op == "moments":
        return [(a, problem.stride[0])]
    if problem.op == "cross_moments":
        g = meta(problem.n, problem.k, *problem.out_hw, dtype=a.c.dtype)
        mask = torch.empty(*g.permute(0, 2, 3, 1).shape[:3], -(-problem.k // 8), dtype=torch.uint8, device="meta")
        return [(a, g, mask, problem.stride[0])]
    w, n, k = a.c, problem.n, problem.c
    gram, cross = meta(k + 1, k + 1, dtype=torch.float64), meta(k + 1, n, dtype=torch.float64)
    if problem.op == "cross_sums":
        return [(cross, w, meta(5, n))]
    if problem.op == "moments_weights":
        return [(cross, gram, w, meta(3, n))]
    running = Running(meta(n), meta(n), torch.empty((), dtype=torch.int64, device="meta"))
    return [
        (gram, w, meta(n), meta(n), running, 0.1, 1e-5),
        (gram, w, meta(n), meta(n), running, None, 1e-5),
        (gram, w, None, None, None, 0.1, 1e-5),
    ]


def launch_arguments(problem: Problem):
    """Meta tensors for each way the operators may call the launch function of ``problem``."""
    dtype = getattr(torch, problem.dtype)
    x = meta(problem.n, problem.c, problem.h, problem.w, dtype=dtype)
    a = Deferred(x, meta(5, problem.c))
    c, k, vector = problem.c, problem.k, meta(problem.c)
    if problem.op.startswith("conv"):
        geometry = Geometry(problem.stride, problem.padding, problem.dilation, problem.groups)
        a = Deferred(x, a.bn if problem.prologue else None)
        w = meta(k, c // problem.groups, max(1, problem.r), max(1, problem.s), dtype=dtype)
        bn = meta(5, k)
        out = meta(problem.n, k, *problem.out_hw, dtype=dtype)
        if problem.op == "conv_dgrad":
            return dgrad_arguments(problem, x, out, geometry)
        if problem.op == "conv_wgrad":
            return [(a, grad, tuple(w.shape), geometry) for grad in gradients(problem, out)]
        if problem.op == "conv1x1_dgrad_moments":
            return dgrad_moments_arguments(problem, a)
        if problem.op == "conv_stats":
            return [(a, w, geometry)]
        if problem.op == "conv_affine_pool":
            return [(x, w, Frozen(*(meta(k),) * 4, 1e-5), geometry)]
        if problem.op == "conv_affine":
            residual = out if problem.epilogue.endswith("residual") else None
            buffers = meta(k)
            frozen = [Frozen(*(buffers,) * 4, 1e-5), Frozen(buffers, buffers, None, None, 1e-5)]
            return [(x, w, bn, residual, relu, geometry) for bn, relu in ((frozen[0], True), (frozen[1], False))]
        if problem.epilogue == "join":
            return [(a, w, bn, out, None, None, 1)]
        stride, side = problem.stride[0], problem.side
        shortcut = meta(problem.n, side, stride * problem.h, stride * problem.w, dtype=dtype)
        return [(a, w, bn, shortcut, meta(k, side, 1, 1, dtype=dtype), bn, stride)]
    if "moments" in problem.op or problem.op == "cross_sums":
        return moments_arguments(problem, a if problem.prologue else Deferred(x))
    pooled = meta(problem.n, c, (problem.h + 1) // 2, (problem.w + 1) // 2, dtype=dtype)
    index = torch.empty_like(pooled, dtype=torch.uint8)
    running = Running(vector, vector, torch.empty((), dtype=torch.int64, device="meta"))
    partials = meta(problem.n, problem.h, c)
    return {
        "bn_finalize": lambda: [
            (partials, vector, vector, running, 0.1, 1e-5),
            (partials, None, None, None, 0.1, 1e-5),
        ],
        "bn_frozen": lambda: [(vector, vector, vector, vector, 1e-5)],
        "bn_act": lambda: [(a, True), (a, False)],
        "bn_act_pool": lambda: [(a,)],
        "bn_act_pool_backward": lambda: [(pooled, index, a)],
        "bn_join": lambda: [(a, a), (a, Deferred(x))],
        "bn_act_sums": lambda: [(x, a)],
        "join_sums": lambda: [(x, bits(x), a, a), (x, bits(x), a, Deferred(x))],
        "relu_grad": lambda: [(x, bits(x))],
        "bn_backward_finalize": lambda: [(partials, a.bn, None), (partials, a.bn, partials)],
        "bn_backward_apply": lambda: [(Gradient(x, mask, x, meta(3, c)),) for mask in (None, bits(x))],
    }[problem.op]()


def chosen(arch: int, modules: tuple[str, ...], dtype="bfloat16"):
    """{spec: (problem, plan)} of every kernel of these modules that the heuristic picks for any layer of any model."""
    device, specs = Device.default(arch), {}
    problems = {
        problem: None
        for name in MODELS
        for batch in BATCHES
        for training in (True, False)
        for _, problem in model_problems(name, batch, 224, training, dtype)
    }
    for problem in problems:
        try:
            plan = triton_plan(problem, None, device, "heuristic")
        except Unsupported:
            continue
        if plan.module in modules:
            launch = getattr(importlib.import_module(f"fused_resnet.kernels.{plan.module}"), plan.launch)
            for arguments in launch_arguments(problem):
                for spec in aot.record(launch, *arguments, plan=plan):
                    specs.setdefault(spec, (problem, plan))
    return specs


def verdicts(compiled, specs, limit):
    """What is wrong with each compiled kernel, as text."""
    for result in compiled:
        problem, plan = specs[result.spec]
        config = dict(result.spec.constexprs) | dict(result.spec.options)
        name = f"{result.spec.name} sm_{result.arch} {config}"
        if result.error:
            yield f"{name}: {result.error}"
            continue
        if result.stack:
            yield f"{name}: {result.stack} bytes of stack, {result.registers} registers"
        if result.shared > limit:
            yield f"{name}: {result.shared} bytes of shared memory, limit {limit}"
        (estimate,) = (family.smem(problem, plan.config) for family in FAMILIES if family.module == plan.module)
        if "BLOCK_K" in config and result.shared > estimate:
            yield f"{name}: {result.shared} bytes of shared memory, estimated {estimate}"
        if "BLOCK_K" in config and not result.tensor_core:
            yield f"{name}: no tensor-core instruction"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "module,dtype",
    [
        ("conv1x1", "bfloat16"),
        ("conv1x1", "float32"),
        ("conv1x1_grad", "bfloat16"),
        ("conv1x1_grad", "float32"),
        ("bn", "bfloat16"),
        ("conv3x3", "bfloat16"),
        ("conv3x3", "float32"),
        ("conv3x3_grad", "bfloat16"),
        ("conv3x3_grad", "float32"),
        ("conv_library", "bfloat16"),
        ("moments", "bfloat16"),
        ("moments_matrices", "bfloat16"),
        ("moments", "float32"),
        ("moments_matrices", "float32"),
        ("pool", "bfloat16"),
        ("pool", "float32"),
        ("stem", "bfloat16"),
        ("stem", "float32"),
    ],
)
def test_every_chosen_kernel_compiles(module, dtype, arch, tf32):
    specs = chosen(arch, (module,), dtype)
    assert specs
    compiled = aot.compile_specs(specs, [arch])
    faults = list(verdicts(compiled, specs, Device.default(arch).smem_bytes))
    assert not faults, "\n".join(faults)
