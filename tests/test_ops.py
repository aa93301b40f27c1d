"""Every operator: schema, fake kernel and tracing (opcheck); strides of fakes are the real ones."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fused_resnet
from fused_resnet import autograd, functional, modules, plan, testing
from fused_resnet.ops import Geometry

N, H, W = 2, 5, 7
GEOMETRY = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def _flat(problem, seed=0):
    """The operator's flat arguments, from the nested ones of its reference function."""
    arguments = testing.operator_arguments(problem, torch.Generator().manual_seed(seed), "cpu")

    def flatten(value):
        if isinstance(value, Geometry):
            return [list(value.stride), list(value.padding), list(value.dilation), value.groups]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return list(value)
        return [list(value) if isinstance(value, (tuple, torch.Size)) else value]

    return [item for value in arguments for item in flatten(value)]


def _problem(op, c=35, k=24, **fields):
    return plan.Problem(op, N, H, W, c, k, dtype="float32", **fields)


def _conv(op, r=3, stride=1, c=35, k=24, **fields):
    return _problem(op, c, k, r=r, s=r, stride=(stride, stride), padding=(r // 2, r // 2), **fields)


def _samples():
    """(operator, flat arguments without impl)."""
    for r, stride, prologue in ((1, 1, True), (1, 2, False), (3, 1, False), (3, 2, True)):
        yield "conv_stats", _flat(_conv("conv_stats", r, stride, prologue=prologue))
        yield "conv_affine", _flat(_conv("conv_affine", r, stride, epilogue="affine+residual"))
        yield "conv_wgrad", _flat(_conv("conv_wgrad", r, stride, prologue=prologue))
    for c, kind in ((36, "identity"), (35, "projection")):
        problem = _conv("bottleneck_affine", 3, c=c, k=9, epilogue=kind)
        x, weights, bns, geometry = testing.operator_arguments(problem, torch.Generator().manual_seed(0), "cpu")
        flat = [x, list(weights), *map(list, zip(*bns)), *map(list, geometry[:3]), geometry.groups]
        yield "bottleneck_affine", flat
    for r, c in ((7, 3), (3, 35)):
        yield "conv_affine_pool", _flat(_conv("conv_affine_pool", r, 2, c, epilogue="affine"))
    for r, epilogue in ((1, "add"), (3, "relu"), (3, "")):
        g, w, geometry, hw, relu_of, addend, stride = testing.operator_arguments(
            _conv("conv_dgrad", r, prologue=r == 1, epilogue=epilogue), torch.Generator().manual_seed(0), "cpu"
        )
        relu, add = relu_of or (None, None), (None, None) if addend is None else addend[:2]
        flat = [*g, w, *map(list, geometry[:3]), geometry.groups, list(hw), *relu, *add, stride]
        yield "conv_dgrad", flat
    for op in ("bn_act", "bn_join", "bn_act_pool", "bn_act_sums", "relu_grad", "bn_backward_apply"):
        yield op, _flat(_problem(op, 35, 35))
    yield "join_sums", _flat(_problem("join_sums", 35, 35))
    g, mask, c, bn, _, _ = _flat(_problem("join_sums", 35, 35))
    yield "join_sums", [g, mask, c, bn, c.clone(), bn.clone()]
    dy, index, c, bn = _flat(_problem("bn_act_pool_backward", 35, 35))
    yield "bn_act_pool_backward", [dy, index, c, bn]
    yield "moments", [*_flat(_problem("moments", 35, 35, prologue=True))]
    for op in ("cross_moments", "conv1x1_dgrad_moments"):
        yield op, _flat(_problem(op, 35, 24, r=1, s=1, prologue=True))
    for epilogue, side in (("join", 0), ("join_downsample", 9)):
        yield "conv1x1_join", _flat(_problem("conv1x1_join", r=1, s=1, prologue=True, epilogue=epilogue, side=side))
    for op in ("bn_finalize", "merge_partials", "bn_frozen", "bn_backward_finalize"):
        yield op, _flat(plan.Problem(op, 4, 3, 1, 35, 35, dtype="float32"))
    for op in ("moments_finalize", "cross_sums", "moments_weights"):
        yield op, _flat(plan.Problem(op, 24, 1, 1, 35, 35, dtype="float32"))


SAMPLES = list(_samples())
IDS = [f"{op}-{i}" for i, (op, _) in enumerate(SAMPLES)]


def test_every_operator_has_a_sample():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fused_resnet::")}
    assert names - {op for op, _ in SAMPLES} == {"residual_block", "stem"}


@pytest.mark.parametrize(("op", "arguments"), SAMPLES, ids=IDS)
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.fused_resnet, op).default, (*arguments, "reference"))


def _results(call, arguments):
    results = call(*arguments, "reference")
    return (results,) if isinstance(results, torch.Tensor) else results


def _assert_fakes_announce(call, arguments):
    real = _results(call, tree_map_only(torch.Tensor, torch.clone, arguments))
    with FakeTensorMode() as mode:
        fakes = _results(call, tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for a, b in zip(real, fakes):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize(("op", "arguments"), SAMPLES, ids=IDS)
def test_fake_strides_are_the_real_ones(op, arguments):
    _assert_fakes_announce(getattr(torch.ops.fused_resnet, op), arguments)


@pytest.mark.parametrize("op", ["bn_act", "bn_join", "bn_act_pool", "bn_act_sums", "bn_backward_apply", "conv_stats"])
@pytest.mark.parametrize("channels", [1, 35])
def test_fake_strides_of_a_single_pixel(op, channels):
    """Where an extent is 1 its stride is open, and easy to announce wrongly."""
    r = 1 if op == "conv_stats" else 0
    problem = plan.Problem(op, 3, 1, 1, channels, channels, r, r, dtype="float32")
    _assert_fakes_announce(getattr(torch.ops.fused_resnet, op), _flat(problem))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scheme", ["stored", "moments"])
def test_opcheck_of_whole_blocks(impl, training, scheme):
    torch.manual_seed(0)
    down = torch.nn.Sequential(torch.nn.Conv2d(12, 16, 1, 2, bias=False), torch.nn.BatchNorm2d(16))
    block = fused_resnet.FusedBottleneck(12, 4, 2, down).train(training)
    units = [modules.conv_bn(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3)]
    packed = functional._pack([*units, modules.conv_bn(*down)])
    x = torch.randn(3, 12, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    arguments = (x, None, *packed, True, False, True, scheme, impl)
    torch.library.opcheck(torch.ops.fused_resnet.residual_block.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_opcheck_of_the_stem(impl):
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(3, 8, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(8)
    x = torch.randn(2, 3, 17, 15).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(
        torch.ops.fused_resnet.stem.default, (x, *functional._pack([modules.conv_bn(conv, bn)]), impl)
    )


def test_explicit_impl_that_cannot_run_says_why():
    x, bn = torch.randn(1, 8, 3, 3), torch.ones(5, 8)
    with pytest.raises(fused_resnet.Unsupported, match="bn_act.*CUDA"):
        torch.ops.fused_resnet.bn_act(x, bn, True, "cuda")
    with pytest.raises(ValueError, match="impl must be one of auto, reference, triton, cuda; got 'fast'"):
        torch.ops.fused_resnet.bn_act(x, bn, True, "fast")


def test_saved_chain_round_trips():
    tensors = [torch.tensor(float(i)) for i in range(20)]
    deferred = tuple(autograd.Deferred(a, b) for a, b in zip(tensors[6:8], tensors[8:10]))
    saved = autograd.Saved(tensors[0], tuple(tensors[10:14]), deferred, tuple(tensors[2:4]), tuple(tensors[4:6]), None)
    assert autograd.Saved.from_tensors(saved.tensors(), 3) == saved
