"""Whole blocks and a whole network through the Triton kernels: in the interpreter on a CPU, compiled on a GPU."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import ops, plan
from fused_resnet.modules import conv_bn
from fused_resnet.testing import assert_within_budget


@pytest.fixture(autouse=True)
def few_rows(monkeypatch, device):
    """The interpreter runs a program for each row of statistics, used or not: four, instead of up to 512."""
    if device == "cpu":
        monkeypatch.setattr(plan.problem, "statistics_rows", lambda channels: 4)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _used(monkeypatch):
    """Names of the operators that ran, each with the backend that ran it."""
    seen = []
    choose = plan.plan_for

    def note(problem, device, impl):
        chosen = choose(problem, device, impl)
        seen.append((problem.op, chosen.backend))
        return chosen

    monkeypatch.setattr(ops.planning, "plan_for", note)
    return seen


def _block(kind, inplanes, planes, stride, options, dtype, device):
    torch.manual_seed(0)
    expansion = 4 if kind is Bottleneck else 1
    down = None
    if stride != 1 or inplanes != planes * expansion:
        down = nn.Sequential(
            nn.Conv2d(inplanes, planes * expansion, 1, stride, bias=False), nn.BatchNorm2d(planes * expansion)
        )
    block = kind(inplanes, planes, stride, down, **options).to(device, memory_format=torch.channels_last)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            module.weight.data[0], module.weight.data[1] = -0.5, 0.0
            module.running_var.uniform_(0.5, 2.0)
        elif isinstance(module, nn.Conv2d):
            module.to(dtype)
    return block


def _fused(block, x, scheme):
    units = [
        conv_bn(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")
    ]
    shortcut = None if block.downsample is None else conv_bn(*block.downsample)
    return fused_resnet.residual_block(x, units, shortcut, scheme=scheme)


def _run(forward, block, x):
    x = x.clone().requires_grad_()
    out = forward(block, x)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.device, out.dtype)
    out.backward(gradient)
    return [out.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


SHAPES = {
    "identity": (Bottleneck, 32, 8, 1, {}),
    "projection": (Bottleneck, 35, 9, 2, {}),
    "grouped": (Bottleneck, 32, 8, 2, {"groups": 2, "dilation": 2}),
    "basic": (BasicBlock, 20, 20, 1, {}),
    "basic projection": (BasicBlock, 19, 24, 2, {}),
}
CASES = [
    *((shape, "stored", True, torch.float32) for shape in SHAPES),
    *((shape, "moments", True, torch.float32) for shape in ("identity", "projection", "grouped")),
    ("projection", "moments", False, torch.float32),
    ("basic projection", "stored", False, torch.float32),
    *(("projection", "moments", True, dtype) for dtype in DTYPES[1:]),
    *(("basic projection", "stored", True, dtype) for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize(
    ("shape", "scheme", "training", "dtype"),
    CASES,
    ids=[f"{s}-{scheme}-{'training' if t else 'frozen'}-{d}" for s, scheme, t, d in CASES],
)
def test_block_through_the_kernels(shape, scheme, training, dtype, device, monkeypatch):
    """Output, every gradient and every buffer; judge: float64, peer: the reference at the same precision.

    At 16 bit a ReLU that rounding switches, in the kernels or in the reference, changes gradients by more than rounding
    does, on a few pixels by 10 %. So the norm over all of them is compared on three inputs, our median with the peer's
    worst: a wrong kernel spoils the median, a rare switch does not.
    """
    block = _block(*SHAPES[shape], dtype, device).train(training)
    generator = torch.Generator().manual_seed(3)
    errors = []
    for _ in range(1 if dtype == torch.float32 else 3):
        x = torch.randn(2, SHAPES[shape][1], 7, 8, generator=generator).to(device, dtype)
        got, judge, peer = _three(block, x.to(memory_format=torch.channels_last), scheme, monkeypatch)
        assert_within_budget(got[0].float(), judge[0].double(), peer[0].float(), "output")
        for i, (a, b, c) in enumerate(zip(got, judge, peer)):
            if not a.is_floating_point():
                assert torch.equal(a, b)
            elif dtype == torch.float32:
                # Weights have no border pixels.
                assert_within_budget(*(t.flatten() if i > 1 else t for t in (a, b, c)), f"result {i}")
        results = (got, judge, peer)
        a, b, c = (torch.cat([t.double().flatten() for t in r[1:] if t.is_floating_point()]) for r in results)
        errors.append(((a - b).norm() / b.norm(), (c - b).norm() / b.norm()))
    ours, theirs = torch.tensor(errors, dtype=torch.double).unbind(1)
    assert ours.median() <= 2 * (theirs.max() + torch.finfo(dtype).eps), f"{ours.tolist()}, peer {theirs.tolist()}"


def _three(block, x, scheme, monkeypatch):
    """The results of a block by the kernels, by plain PyTorch in float64, and by the reference."""
    blocks = [copy.deepcopy(block) for _ in range(3)]
    with fused_resnet.use("reference"):
        peer = _run(lambda b, v: _fused(b, v, scheme), blocks[0], x)
    judge = _run(lambda b, v: b(v), blocks[1].double(), x.double())
    with monkeypatch.context() as patch:
        seen = _used(patch)
        with fused_resnet.use("triton"):
            got = _run(lambda b, v: _fused(b, v, scheme), blocks[2], x)
    assert seen and {backend for _, backend in seen} == {"triton"}
    assert ("conv1x1_join", "triton") in seen if scheme == "moments" else ("bn_join", "triton") in seen
    return got, judge, peer


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_through_the_kernels(dtype, device, monkeypatch):
    block = _block(Bottleneck, 35, 9, 2, {}, dtype, device).eval()
    x = torch.randn(2, 35, 7, 6).to(device, dtype).to(memory_format=torch.channels_last)
    seen = _used(monkeypatch)
    with torch.no_grad():
        with fused_resnet.use("triton"):
            got = _fused(block, x, "auto")
        assert {backend for _, backend in seen} == {"triton"} and ("conv_affine", "triton") in seen
        with fused_resnet.use("reference"):
            peer = _fused(block, x, "auto")
        assert_within_budget(got, copy.deepcopy(block).double()(x.double()), peer)


def _stem(channels, dtype, device):
    torch.manual_seed(0)
    four = nn.Sequential(
        nn.Conv2d(channels, 20, 7, 2, 3, bias=False), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ).to(device, memory_format=torch.channels_last)
    nn.init.normal_(four[1].weight, 0.5, 0.7)
    nn.init.normal_(four[1].bias, 0.0, 0.3)
    four[1].running_var.uniform_(0.5, 2.0)
    four[0].to(dtype)
    return four


@pytest.mark.parametrize("dtype", DTYPES)
def test_stem_training_through_the_kernels(dtype, device, monkeypatch):
    """As a block: output, gradients of image and parameters, buffers."""
    four = _stem(3, dtype, device)
    x = torch.randn(2, 3, 13, 10, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    x = x.to(memory_format=torch.channels_last)
    copies = [copy.deepcopy(four) for _ in range(3)]

    def fused(modules, value):
        return fused_resnet.stem(value, conv_bn(modules[0], modules[1]))

    with fused_resnet.use("reference"):
        peer = _run(fused, copies[0], x)
    judge = _run(lambda modules, value: modules(value), copies[1].double(), x.double())
    seen = _used(monkeypatch)
    with fused_resnet.use("triton"):
        got = _run(fused, copies[2], x)
    assert {backend for _, backend in seen} == {"triton"}
    assert {"bn_act_pool", "bn_act_pool_backward", "conv_dgrad", "conv_wgrad"} <= {op for op, _ in seen}
    names = ("y", "dx", "dw", "dgamma", "dbeta", "running mean", "running variance", "batches")
    for a, b, c, what in zip(got, judge, peer, names):
        if not a.is_floating_point():
            assert torch.equal(a, b)
        elif dtype == torch.float32:
            assert_within_budget(a, b, c, what)
    # At 16 bits a maximum that rounding moves takes its gradient to another pixel.
    a, b, c = (torch.cat([t.double().flatten() for t in r if t.is_floating_point()]) for r in (got, judge, peer))
    assert (a - b).norm() <= 2 * ((c - b).norm() + torch.finfo(dtype).eps * b.norm())


@pytest.mark.parametrize("channels,module", [(3, "stem"), (6, "conv_library")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stem_inference_through_the_kernels(dtype, channels, module, device, monkeypatch):
    """One operator, whose kernel for an image writes no map."""
    four = _stem(channels, dtype, device).eval()
    x = torch.randn(2, channels, 14, 11).to(device, dtype).to(memory_format=torch.channels_last)
    unit = conv_bn(four[0], four[1])
    seen = _used(monkeypatch)
    with torch.no_grad():
        with fused_resnet.use("triton"):
            got = fused_resnet.stem(x, unit)
        assert seen == [("conv_affine_pool", "triton")]
        with fused_resnet.use("reference"):
            peer = fused_resnet.stem(x, unit)
        assert_within_budget(got, copy.deepcopy(four).double()(x.double()), peer)
    problem = plan.Problem("conv_affine_pool", 2, 14, 11, channels, 20, 7, 7, (2, 2), (3, 3), dtype="float32")
    assert plan.triton_plan(problem, None, plan.Device.default(90), "").module == module


@pytest.mark.parametrize("training", [True, False])
def test_parameters_with_strides(training, device):
    """As another framework's layout leaves them after a permutation, or a slice of a longer vector."""
    dense = _block(Bottleneck, 35, 9, 2, {}, torch.float32, device).train(training)
    strided = copy.deepcopy(dense)
    for module in strided.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))
        elif isinstance(module, nn.BatchNorm2d):
            module.weight = nn.Parameter(module.weight.detach().repeat_interleave(2)[::2])
    x = torch.randn(2, 35, 7, 6).to(device)
    with fused_resnet.use("triton"):
        results = [_run(lambda b, v: _fused(b, v, "moments"), block, x) for block in (dense, strided)]
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_with_strides_are_refused(training, device):
    """They would have to be written in place: beyond their end, with a stride of 0."""
    block = _block(Bottleneck, 16, 4, 1, {}, torch.float32, device).train(training)
    block.bn1.running_var = torch.ones(1, device=device).expand(4)
    x = torch.randn(2, 16, 3, 3, device=device, requires_grad=True)
    message = r"running_var must be a contiguous \[4\]; got \(4,\), strides \(0,\)"
    with fused_resnet.use("triton"), pytest.raises(ValueError, match=message):
        _fused(block, x, "stored")


def test_repeats_are_bit_equal(device):
    block = _block(Bottleneck, 35, 9, 2, {}, torch.float16, device)
    x = torch.randn(2, 35, 7, 6).to(device, torch.float16).to(memory_format=torch.channels_last)
    repeats = 50 if device == "cuda" else 2
    with fused_resnet.use("triton"):
        results = [_run(lambda b, v: _fused(b, v, "moments"), copy.deepcopy(block), x) for _ in range(repeats)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


class Tiny(nn.Module):
    """A ResNet of two stages with one bottleneck each, small enough for the interpreter."""

    def __init__(self, bottleneck):
        super().__init__()
        torch.manual_seed(0)
        down = [nn.Sequential(nn.Conv2d(c, 16, 1, s, bias=False), nn.BatchNorm2d(16)) for c, s in ((8, 1), (16, 2))]
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(bottleneck(8, 4, 1, down[0]), bottleneck(16, 4, 2, down[1]))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def test_training_steps_through_the_kernels_follow_torchvision(device):
    """Five steps of SGD in fp32; losses and every parameter as with torchvision's block in float64."""
    ours, theirs = Tiny(fused_resnet.FusedBottleneck).to(device), Tiny(torchvision.models.resnet.Bottleneck).to(device)
    theirs.load_state_dict(ours.state_dict())
    judge = copy.deepcopy(theirs).double()
    generator = torch.Generator().manual_seed(4)
    batches = [
        (torch.randn(4, 3, 6, 6, generator=generator).to(device), torch.arange(4, device=device)) for _ in range(5)
    ]
    losses = []
    for model in (ours, theirs, judge):
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        losses.append([])
        for x, target in batches:
            optimizer.zero_grad()
            with fused_resnet.use("triton"):
                out = model(x.to(next(model.parameters()).dtype))
            loss = nn.functional.cross_entropy(out, target)
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    ours_losses, theirs_losses, judge_losses = (torch.tensor(values, dtype=torch.double) for values in losses)
    assert_within_budget(ours_losses.float(), judge_losses, theirs_losses.float(), "losses")
    for (name, p), exact in zip(ours.named_parameters(), judge.parameters()):
        torch.testing.assert_close(p.double(), exact, rtol=1e-4, atol=1e-5, msg=name)
    assert ours.blocks[0].bn3.num_batches_tracked == 5
