"""The drop-in modules: every BatchNorm rule, dtype, layout and piece of user code that torchvision's blocks allow."""

import copy

import pytest
import timm
import torch
import torch.nn.utils.prune
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import autograd, functional, plan, testing
from fused_resnet.modules import conv_bn, forward_stem, stem_reason

IMPLS = pytest.mark.parametrize("impl", ["auto", "reference"])
KINDS = pytest.mark.parametrize("kind", ["bottleneck", "basic"])


def _pair(kind="bottleneck", stride=None, norm_layer=nn.BatchNorm2d, dtype=torch.double):
    """Our block and torchvision's with the same random state; stride None: identity shortcut."""
    torch.manual_seed(0)
    expansion = 4 if kind == "bottleneck" else 1
    inplanes = 4 * expansion if stride is None else 6

    def down():
        return None if stride is None else nn.Sequential(
            nn.Conv2d(inplanes, 4 * expansion, 1, stride, bias=False), norm_layer(4 * expansion)
        )  # fmt: skip

    classes = (
        (fused_resnet.FusedBottleneck, Bottleneck) if expansion == 4 else (fused_resnet.FusedBasicBlock, BasicBlock)
    )
    ours, theirs = (cls(inplanes, 4, stride or 1, down(), norm_layer=norm_layer).to(dtype) for cls in classes)
    for name, tensor in theirs.state_dict().items():
        if name.endswith("var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            tensor.normal_()
            if name == "bn1.weight":
                tensor[0], tensor[1] = -0.7, 0.0
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _x(block, batch=3, size=(7, 5), dtype=torch.double):
    return torch.randn(batch, block.conv1.in_channels, *size, generator=torch.Generator().manual_seed(5)).to(dtype)


def _run(block, x, impl):
    x = x.clone().requires_grad_()
    with fused_resnet.use(impl):
        out = block(x)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    out.backward(gradient)
    return [out.detach(), x.grad, *(p.grad for p in block.parameters() if p.requires_grad)]


def _assert_same(ours, theirs, x, impl, **tolerance):
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-9}
    for a, b in zip(_run(ours, x, impl), _run(theirs, x, impl)):
        torch.testing.assert_close(a, b, **tolerance)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def _each_bn(block, change):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            change(module)


@IMPLS
@KINDS
@pytest.mark.parametrize("stride", [None, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_block_equals_torchvisions(impl, kind, stride, training):
    ours, theirs = (block.train(training) for block in _pair(kind, stride))
    for size in ((7, 5), (8, 6), (1, 1)):
        _assert_same(ours, theirs, _x(ours, size=size), impl)


@IMPLS
@pytest.mark.parametrize(
    "change",
    [
        lambda bn: setattr(bn, "momentum", None),
        lambda bn: setattr(bn, "momentum", 0.7),
        lambda bn: setattr(bn, "eps", 0.1),
        lambda bn: setattr(bn, "track_running_stats", False),
    ],
    ids=["cumulative", "momentum", "eps", "untracked"],
)
def test_batch_norm_options(impl, change):
    ours, theirs = _pair(stride=2)
    for block in (ours, theirs):
        _each_bn(block, change)
    for _ in range(3):
        _assert_same(ours, theirs, _x(ours), impl)


@IMPLS
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_built_with_options(impl, options, training):
    ours, theirs = _pair(stride=2, norm_layer=lambda c: nn.BatchNorm2d(c, **options))
    _assert_same(ours.train(training), theirs.train(training), _x(ours), impl)


@IMPLS
def test_one_batch_norm_frozen_among_training_ones(impl):
    ours, theirs = _pair(stride=2)
    for block in (ours, theirs):
        block.bn2.eval()
        block.downsample[1].eval()
    _assert_same(ours, theirs, _x(ours), impl)


@IMPLS
def test_one_value_per_channel(impl):
    ours, _ = _pair()
    with fused_resnet.use(impl), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours(_x(ours, 1, (1, 1)))
    assert ours(_x(ours, 2, (1, 1))).shape == (2, 16, 1, 1)


def test_buffers_are_updated_in_place_and_backward_does_not_read_them():
    ours, theirs = _pair()
    pointers = [b.data_ptr() for b in ours.buffers()]
    x = _x(ours).requires_grad_()
    with fused_resnet.use("reference"):
        out = ours(x)
    assert [b.data_ptr() for b in ours.buffers()] == pointers
    for buffer in ours.buffers():  # as DDP's broadcast may do between forward and backward
        buffer.zero_()
    gradient = torch.randn_like(out)
    out.backward(gradient)
    y = _x(theirs).requires_grad_()
    theirs(y).backward(gradient)
    torch.testing.assert_close(x.grad, y.grad)


@IMPLS
@pytest.mark.parametrize("stride", [None, 2])
def test_frozen_batch_norm_of_detectors(impl, stride):
    ours, theirs = _pair(stride=stride, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    assert ours.unfused_reason() is None
    _assert_same(ours, theirs, _x(ours), impl)


class _Calls(TorchDispatchMode):
    """Counts calls of the fused operators."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def test_cumulative_average_needs_no_fused_operator():
    """update_bn sets momentum=None in every BatchNorm: under "auto" this is no reason to leave the library."""
    block, _ = _pair()
    _each_bn(block, lambda bn: setattr(bn, "momentum", None))
    with _Calls() as calls:
        block(_x(block))
    assert calls.counts["convolution"] == 3 and "conv_stats" not in calls.counts


@pytest.mark.parametrize(
    ("frozen", "wgrad", "dgrad"),
    [((), 3, 3), (("conv1", "conv2"), 1, 2), (("conv1", "bn1", "conv2", "bn2"), 1, 0), (("conv3", "bn3"), 2, 2)],
)
def test_frozen_layers_skip_their_gradients(frozen, wgrad, dgrad):
    block, _ = _pair()
    for name in frozen:
        getattr(block, name).requires_grad_(False)
    x = _x(block).requires_grad_(not frozen)
    with fused_resnet.use("reference"), _Calls() as calls:
        block(x).sum().backward()
    assert calls.counts.get("conv_wgrad", 0) == wgrad
    assert calls.counts.get("conv_dgrad", 0) == dgrad
    assert all((p.grad is None) == (name.split(".")[0] in frozen) for name, p in block.named_parameters())


# Dtypes and layouts


@IMPLS
@KINDS
@pytest.mark.parametrize("stride", [None, 2])
def test_autocast_gives_16_bit_out_and_fp32_gradients(impl, kind, stride):
    ours, theirs = _pair(kind, stride, dtype=torch.float32)
    x = _x(ours, 4, dtype=torch.float32)
    judge = copy.deepcopy(theirs).double()
    with torch.autocast("cpu", torch.bfloat16):
        got, peer = (_run_autocast(block, x, impl) for block in (ours, theirs))
    exact = _run(judge, x.double(), impl)
    assert got[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in got[1:])
    # A ReLU that rounding switches changes a gradient by more than rounding: the norm of all of them is compared.
    for a, b, c in ((got[:1], peer[:1], exact[:1]), (got[1:], peer[1:], exact[1:])):
        a, b, c = (torch.cat([t.double().flatten() for t in values]) for values in (a, b, c))
        assert (a - c).norm() <= 2 * ((b - c).norm() + 2**-8 * c.norm())


def _run_autocast(block, x, impl):
    x = x.clone().requires_grad_()
    with fused_resnet.use(impl):
        out = block(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype))
    return [out.detach(), x.grad, *(p.grad for p in block.parameters())]


def test_statistics_under_autocast_are_not_rounded():
    """fp32 vectors of a BatchNorm stay fp32, and a mean of 100 does not eat a deviation of 0.1."""
    module = fused_resnet.FusedConvBNAct(4, 4, 1)
    with torch.no_grad():
        module.conv.weight.copy_(torch.eye(4).view(4, 4, 1, 1))
    x = (torch.randn(16, 4, 8, 8) * 8).bfloat16()
    with fused_resnet.use("reference"), torch.autocast("cpu", torch.bfloat16):
        module(x)
    mean = x.float().mean((0, 2, 3))
    torch.testing.assert_close(module.bn.running_mean, 0.1 * mean, rtol=1e-5, atol=1e-6)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_in_one_dtype(impl, dtype):
    ours, theirs = _pair(stride=2, dtype=dtype)
    judge = copy.deepcopy(theirs).double().eval()
    x = _x(ours, dtype=dtype)
    with fused_resnet.use(impl):
        out = ours.eval()(x)
    assert out.dtype == dtype
    testing.assert_within_budget(out, judge(x.double()), theirs.eval()(x))
    results = _run(ours.train(), x, impl)
    assert all(r.dtype == dtype and torch.isfinite(r).all() for r in results)


@KINDS
@pytest.mark.parametrize("stride", [None, 2])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided", "expanded"])
@pytest.mark.parametrize("training", [True, False])
def test_memory_formats(kind, stride, layout, training):
    ours, theirs = (block.train(training) for block in _pair(kind, stride))
    x = _x(ours, size=(6, 8))
    x = {
        "nchw": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": torch.cat((x, x), 3)[:, :, :, ::2],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }[layout]
    with fused_resnet.use("reference"):
        y = x.detach().requires_grad_()
        out = ours(y)
        torch.testing.assert_close(out, theirs(x), rtol=1e-9, atol=1e-9)
        out.sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        assert y.grad.is_contiguous(memory_format=torch.channels_last)


def test_weight_gradients_keep_the_layout_of_their_weights():
    block = fused_resnet.FusedBasicBlock(8, 8).to(memory_format=torch.channels_last)
    with fused_resnet.use("reference"):
        block(torch.randn(2, 8, 5, 5)).sum().backward()
    assert block.conv1.weight.grad.stride() == block.conv1.weight.stride()


@pytest.mark.parametrize("scheme", ["", "stored", "moments"])
def test_a_measured_scheme_is_taken(monkeypatch, scheme):
    """The plan's scheme runs, and a caller's own request goes before it."""
    seen = []
    forward = autograd.chain_forward
    monkeypatch.setattr(autograd, "chain_forward", lambda *a: seen.append(a[-1].scheme) or forward(*a))
    monkeypatch.setattr(autograd.ops, "plan_block", lambda *a: plan.Plan("triton", None, "", scheme=scheme))
    block, x = fused_resnet.FusedBottleneck(16, 4), torch.randn(2, 16, 5, 5)
    block(x)
    units = [conv_bn(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3)]
    fused_resnet.residual_block(x, units, scheme="moments")
    assert seen == [scheme or "stored", "moments"]


# What is saved for backward


def _saved(run, parameters):
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return list(storages.values()), out


@pytest.mark.parametrize("stride", [None, 2])
def test_moments_scheme_never_keeps_the_widest_tensors(stride):
    down = None if stride is None else nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    ours = fused_resnet.FusedBottleneck(128 if stride is None else 64, 32, stride or 1, down)
    theirs = copy.deepcopy(ours)
    fused_resnet.unfuse(theirs)
    for block in (ours, theirs):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                conv.bfloat16()
    x = torch.randn(4, ours.conv1.in_channels, 16, 16).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    with fused_resnet.use("reference"):
        kept, out = _saved(lambda: ours(x), ours.parameters())
    theirs_kept, _ = _saved(lambda: theirs(x), theirs.parameters())
    wide = [t for t in kept if t.dim() == 4 and t.shape[1] == 128 and t is not x and t.data_ptr() != x.data_ptr()]
    assert not [t for t in wide if t.dtype == torch.bfloat16 and t.shape[2:] == out.shape[2:]]
    sizes = [sum(t.untyped_storage().nbytes() for t in tensors) for tensors in (kept, theirs_kept)]
    assert sizes[0] <= 0.65 * sizes[1]
    buffers = {b.data_ptr() for b in ours.buffers()}
    assert not buffers & {t.data_ptr() for t in kept}


def test_second_derivative_is_refused():
    block, _ = _pair()
    x = _x(block).requires_grad_()
    with fused_resnet.use("reference"):
        (gradient,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            (gradient.square().sum() + x.sum()).backward()
        block(x).sum().backward(create_graph=True)  # asking without using is fine
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            torch.autograd.functional.hvp(lambda x: block(x).square().sum(), x, x)  # takes "unused" for zero


# Children of other kinds


def _weight_norm(block):
    torch.nn.utils.parametrizations.weight_norm(block.conv2)


def _prune(block):
    torch.nn.utils.prune.l1_unstructured(block.conv1, "weight", 0.5)


def _hook(block):
    block.bn2.register_forward_hook(lambda module, inputs, out: out * 2)


def _bias(block):
    block.conv3.bias = nn.Parameter(torch.ones(16, dtype=torch.double))


def _group_norm(block):
    block.bn1 = nn.GroupNorm(2, 4).double()


def _activation(block):
    block.relu = nn.SiLU()


def _own_forward(block):
    forward = block.conv1.forward
    block.conv1.forward = lambda x: forward(x) + 1


class _Subclass(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) - 1


def _subclass(block):
    block.conv1.__class__ = _Subclass


@IMPLS
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_weight_norm, "conv2, bn2: ParametrizedConv2d is not exactly nn.Conv2d"),
        (_prune, "conv1, bn1: Conv2d carries hooks"),
        (_hook, "conv2, bn2: BatchNorm2d carries hooks"),
        (_bias, "conv3, bn3: the convolution has a bias"),
        (_group_norm, "conv1, bn1: GroupNorm is not exactly"),
        (_activation, "relu is SiLU, not exactly nn.ReLU"),
        (_own_forward, "conv1, bn1: Conv2d has a forward of its own"),
        (_subclass, "conv1, bn1: _Subclass is not exactly nn.Conv2d"),
    ],
)
def test_changed_children_run_as_themselves(impl, change, reason):
    ours, theirs = _pair()
    for block in (ours, theirs):
        change(block)
    assert reason in ours.unfused_reason()
    theirs.load_state_dict(ours.state_dict())
    with fused_resnet.use(impl):
        torch.testing.assert_close(ours(_x(ours)), theirs(_x(ours)))


@IMPLS
def test_sizes_set_as_numbers(impl):
    """As code does that takes the stride out of a backbone."""
    ours, theirs = _pair()
    for block in (ours, theirs):
        block.conv2.stride, block.conv2.padding, block.conv2.dilation = 1, 2, 2
    assert ours.unfused_reason() is None
    _assert_same(ours, theirs, _x(ours), impl)


@IMPLS
def test_parameters_kept_as_plain_attributes(impl):
    """As DataParallel's replicas and sharded modules keep them."""
    ours, theirs = _pair(stride=2)
    leaves = []
    for child in [m for m in ours.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]:
        for name, parameter in list(child.named_parameters()):
            delattr(child, name)
            leaves.append(parameter.detach().requires_grad_())
            setattr(child, name, leaves[-1])
    for conv in [m for m in ours.modules() if isinstance(m, nn.Conv2d)]:
        delattr(conv, "bias")
        conv.bias = None
    assert ours.unfused_reason() is None and not list(ours.parameters())
    with fused_resnet.use(impl):
        out = ours(_x(ours))
    expected = theirs(_x(ours))
    torch.testing.assert_close(out, expected)
    for result in (out, expected):
        result.square().sum().backward()
    for leaf, parameter in zip(leaves, theirs.parameters(), strict=True):
        torch.testing.assert_close(leaf.grad, parameter.grad)
    ours.conv3.bias = torch.ones(16, dtype=torch.double)
    assert "conv3, bn3: the convolution has a bias" in ours.unfused_reason()


@IMPLS
def test_a_geometry_of_lists(impl):
    """As they come out of a configuration file."""
    block, _ = _pair()
    units = [conv_bn(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3)]
    lists = [unit._replace(geometry=fused_resnet.Geometry(*map(list, unit.geometry[:3]))) for unit in units]
    with fused_resnet.use(impl):
        outputs = [fused_resnet.residual_block(_x(block), chain) for chain in (units, lists)]
    assert torch.equal(*outputs)


@IMPLS
def test_shortcut_of_another_kind_is_called_and_the_rest_fused(impl):
    torch.manual_seed(0)
    down = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(6, 16, 1, bias=False), nn.BatchNorm2d(16))
    ours, theirs = (cls(6, 4, 2, copy.deepcopy(down)).double() for cls in (fused_resnet.FusedBottleneck, Bottleneck))
    ours.load_state_dict(theirs.state_dict())
    called = []
    ours.downsample[0].register_forward_hook(lambda *_: called.append(1))
    assert ours.unfused_reason() is None
    _assert_same(ours, theirs, _x(ours), impl)
    assert called


def test_weight_decay_split_finds_the_norms():
    model = fused_resnet.resnet18(num_classes=2)
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)]
    assert len(norms) == 40


def test_timm_builds_with_our_block():
    model = timm.create_model("resnet50", block=fused_resnet.FusedBottleneck, num_classes=3)
    blocks = [m for m in model.modules() if isinstance(m, fused_resnet.FusedBottleneck)]
    assert len(blocks) == 16 and all(block.unfused_reason() is None for block in blocks)
    assert not blocks[0].bn3.weight.any()  # timm's zero_init_last
    plain = timm.create_model("resnet50", num_classes=3)
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with fused_resnet.use("reference"):
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


# A lone convolution, and the stem


@IMPLS
@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"groups": 2}, {"dilation": 2}, {"kernel_size": 1}, {"padding": 0}, {"kernel_size": (3, 1)}],
)
def test_conv_bn_act(impl, act, residual, training, options):
    torch.manual_seed(0)
    module = fused_resnet.FusedConvBNAct(6, 8, act=act, **options).double().train(training)
    plain = copy.deepcopy(module)
    x = torch.randn(3, 6, 7, 8, dtype=torch.double)
    side = torch.randn_like(plain.conv(x)) if residual else None
    results = []
    for fused in (True, False):
        net, leaf = (module if fused else plain), x.clone().requires_grad_()
        extra = None if side is None else side.clone().requires_grad_()
        if fused:
            with fused_resnet.use(impl):
                out = net(leaf, extra)
        else:
            out = net.bn(net.conv(leaf))
            out = net.act(out if extra is None else out + extra)
        out.backward(torch.ones_like(out) * torch.arange(8).view(1, 8, 1, 1))
        results.append(
            [out.detach(), leaf.grad, *([] if extra is None else [extra.grad]), *(p.grad for p in net.parameters())]
        )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@IMPLS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(15, 17), (16, 12)])
def test_stem_equals_its_four_modules(impl, training, size):
    torch.manual_seed(0)
    four = nn.ModuleList(
        [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    ).double().train(training)  # fmt: skip
    plain = copy.deepcopy(four)
    x = torch.randn(2, 3, *size, dtype=torch.double)
    results = []
    for modules, fused in ((four, True), (plain, False)):
        leaf = x.clone().requires_grad_()
        with fused_resnet.use(impl):
            out = forward_stem(*modules, leaf) if fused else modules[3](modules[2](modules[1](modules[0](leaf))))
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in modules.parameters()), *modules.buffers()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("pool", "reason"), [(nn.MaxPool2d(2), "the pool is not 3x3"), (nn.AvgPool2d(3, 2, 1), "AvgPool2d is not exactly")]
)
def test_stem_with_another_pool_is_not_fused(pool, reason):
    four = nn.Conv2d(3, 8, 7, bias=False), nn.BatchNorm2d(8), nn.ReLU(), pool
    assert reason in stem_reason(*four)
    assert forward_stem(*four, torch.randn(1, 3, 16, 16)).shape[1] == 8


def test_units_follow_nn_batch_norm():
    conv = nn.Conv2d(4, 4, 1, bias=False)
    for bn, batch_stats, tracked in (
        (nn.BatchNorm2d(4), True, True),
        (nn.BatchNorm2d(4).eval(), False, True),
        (nn.BatchNorm2d(4, track_running_stats=False), True, False),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), True, False),
    ):
        unit = conv_bn(conv, bn)
        assert unit.batch_stats == batch_stats and (unit.running_mean is not None) == tracked


@pytest.mark.parametrize("kind", ["identity", "projection"])
def test_eval_without_measurements_leaves_all_to_the_children(kind, monkeypatch):
    down = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)) if kind == "projection" else None
    block = fused_resnet.FusedBottleneck(8 if down else 16, 4, downsample=down).eval()
    x = torch.randn(2, 8 if down else 16, 5, 5)
    want = block.forward_unfused(x)
    with monkeypatch.context() as patch:
        patch.setattr(functional, "residual_block", None)
        torch.testing.assert_close(block(x), want, rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == torch.bfloat16
    for bad in (x.double(), x[:, :3], x[0]):  # whose errors name the argument
        with pytest.raises((TypeError, ValueError), match="units|x"):
            block(bad)
    assert block(x[:0]).shape == (0, 16, 5, 5)
