"""FLOP and bytes of operators: against figures counted by hand, and against the tensors that operators exchange."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fused_resnet import reference, trials
from fused_resnet.plan import MODELS, Problem, Work, model_problems, work_of

# Per image at 16 bit, (GFLOP, MB) of a stage's first 1x1s, 3x3s, last 1x1s and its downsample, counted by hand.
RESNET50 = {
    "layer1": ((0.23, 4.8), (0.69, 2.4), (0.31, 6.0), (0.10, 2.0)),
    "layer2": ((0.51, 5.4), (0.93, 2.2), (0.41, 4.0), (0.21, 2.4)),
    "layer3": ((0.72, 3.7), (1.39, 1.5), (0.62, 3.0), (0.21, 1.2)),
    "layer4": ((0.41, 1.1), (0.69, 0.5), (0.31, 0.8), (0.21, 0.6)),
}
BATCH = 256


def _convolutions(layer, name):
    problems = model_problems("resnet50", BATCH, 224, False)
    wanted = {"conv1", "conv2", "conv3"} if name is None else {name}
    return [
        problem
        for where, problem in problems
        if problem.op == "conv_affine"
        and problem.epilogue == "affine"
        and where.startswith(layer)
        and where.split(".", 2)[-1] in wanted
    ]


@pytest.mark.parametrize("stage", RESNET50)
def test_resnet50_layers_by_hand(stage):
    for name, (gflop, megabytes) in zip(("conv1", "conv2", "conv3", "downsample.0"), RESNET50[stage]):
        problems = _convolutions(stage, name)
        flop = sum(work_of(p).flop for p in problems) / BATCH
        # By hand, weights and BatchNorm vectors counted nothing, and a strided 1x1 as reading the pixels it skips.
        small = sum(2 * p.k * p.c * p.r * p.s + 20 * p.k for p in problems)
        skipped = sum(2 * p.c * (p.n * p.h * p.w - p.gemm_m) for p in problems if p.r == 1)
        moved = (sum(work_of(p).bytes for p in problems) - small + skipped) / BATCH
        assert flop == pytest.approx(gflop * 1e9, abs=6e6), (stage, name)
        assert moved == pytest.approx(megabytes * 1e6, abs=6e4), (stage, name)


def test_whole_resnet50_by_hand():
    problems = {}
    for layer, problem in model_problems("resnet50", 1, 224, False):
        if problem.op == "conv_affine" and problem.epilogue == "affine":
            problems[layer] = problem
    assert len(problems) == 53
    assert sum(work_of(p).flop for p in problems.values()) == pytest.approx(8.17e9, rel=1e-3)  # without the classifier


def test_least_time_is_the_longer_of_the_two():
    assert Work(100, 10).seconds(bytes_per_s=10, flop_per_s=20) == 5
    assert Work(10, 100).seconds(bytes_per_s=10, flop_per_s=20) == 10


def _flat(op, arguments):
    """An operator's arguments as its schema wants them: NamedTuples flattened, an absent one as that many None."""
    if op == "bottleneck_affine":
        x, weights, bns, geometry = arguments
        return [x, list(weights), *map(list, zip(*bns)), *geometry]
    flat = []
    for i, value in enumerate(arguments):
        if op == "conv_dgrad" and i in (4, 5):  # relu_of and addend: two fields each
            flat += [None, None] if value is None else list(value)[:2]
        elif hasattr(value, "_fields"):
            flat += list(value)
        else:
            flat.append(value)
    return flat


def _exchanged(problem):
    """Bytes of all tensors that an operator of this problem gets and gives back."""
    arguments = _flat(problem.op, trials.operator_arguments(problem, torch.Generator().manual_seed(0), "cpu"))
    results = getattr(torch.ops.fused_resnet, problem.op)(*arguments, "reference")
    tensors = tree_leaves([arguments, results])
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.dim())


def _problems():
    distinct = {}
    for name in ("resnet18", "resnet50", "resnext50_32x4d"):
        for training in (True, False):
            for _, problem in model_problems(name, 2, 64, training):
                variant = problem.op, problem.prologue, problem.epilogue, problem.r, problem.stride
                distinct.setdefault(variant, problem)
    return list(distinct.values())


@pytest.mark.parametrize("problem", _problems(), ids=lambda p: f"{p.op}-{p.epilogue}-{p.r}x{p.stride[0]}-{p.prologue}")
def test_bytes_are_those_of_the_tensors(problem):
    skipped = 0
    if problem.stride != (1, 1) and problem.r < 2 and problem.op != "conv1x1_join":
        # Of a strided 1x1's input, only the pixels that it reads count; gradients of it live on its output's grid.
        grid = problem.n * -(-problem.h // 2) * -(-problem.w // 2)
        skipped = 2 * problem.c * (problem.n * problem.h * problem.w - grid)
    if problem.epilogue == "join_downsample" and problem.stride != (1, 1):
        skipped = 2 * problem.side * problem.n * problem.h * problem.w * 3
    assert work_of(problem).bytes == _exchanged(problem) - skipped


def test_every_operator_of_every_model_has_a_count():
    for name in MODELS:
        for training in (True, False):
            for _, problem in model_problems(name, 2, 64, training):
                work = work_of(problem)
                assert work.bytes > 0 and work.flop >= 0
                assert (work.flop > 0) == (hasattr(reference, problem.op) and _multiplies(problem)), problem
    with pytest.raises(KeyError):
        work_of(Problem("conv_winograd", 1, 8, 8, 8, 8))


def _multiplies(problem):
    return problem.op.startswith(("conv", "moments", "cross", "bottleneck"))
