"""profile: parameters, multiply-adds and saved bytes, against hand-counted numbers and the paper's (He et al. 2015)."""

import pytest
import torch
import torchvision
from test_ops import SAMPLES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
from fused_resnet import reference

# The samples of test_ops, in their order: 2 images of 5 x 7 pixels, 35 channels to 24; whole bottlenecks: 36 or 35, 9.
_PIXELS, _STRIDED, _PRODUCT = 2 * 5 * 7, 2 * 3 * 4, 35 * 24
_CONVOLUTIONS = [_PIXELS * _PRODUCT, _STRIDED * _PRODUCT, 9 * _PIXELS * _PRODUCT, 9 * _STRIDED * _PRODUCT]
MULTIPLY_ADDS = {
    "conv_stats": _CONVOLUTIONS,
    "conv_affine": _CONVOLUTIONS,
    "conv_wgrad": _CONVOLUTIONS,
    "conv_affine_pool": [_STRIDED * 49 * 3 * 24, 9 * _STRIDED * _PRODUCT],
    "conv_dgrad": [_PIXELS * _PRODUCT, 9 * _PIXELS * _PRODUCT, 9 * _PIXELS * _PRODUCT],
    "bottleneck_affine": [_PIXELS * 9 * (36 + 9 * 9 + 36), _PIXELS * (9 * (35 + 9 * 9 + 36) + 35 * 36)],
    "conv1x1_join": [_PIXELS * 35 * 24, _PIXELS * (35 + 9) * 24],
    "moments": [_PIXELS * 35 * 35],
    "cross_moments": [_PIXELS * _PRODUCT],
    "conv1x1_dgrad_moments": [_PIXELS * (24 * 35 + 35 * 35)],
    "moments_finalize": [35 * 35 * 24],
    "moments_weights": [2 * 35 * 35 * 24],
}


def _network(name, **options):
    with torch.device("meta"):
        return getattr(fused_resnet, name)(**options).eval()


def _costs(model, shape=(1, 3, 224, 224)):
    return {cost.layer: cost for cost in fused_resnet.profile(model, shape)}


def test_resnet50_multiply_adds_and_parameters():
    model = fused_resnet.fuse(torchvision.models.resnet50()).eval()
    total = fused_resnet.profile(model).total
    assert total.parameters == 25_557_032
    assert total.multiply_adds == total.multiply_adds_fused == 4_089_184_256  # v1.5: stride on the 3x3


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds", "billions"),
    [
        ("resnet18", 11_689_512, 1_814_073_344, 1.8),
        ("resnet34", 21_797_672, 3_663_761_408, 3.6),
        ("resnet50", 25_557_032, 4_089_184_256, 4.1),
        ("resnet101", 44_549_160, 7_801_405_440, 7.8),
        ("resnet152", 60_192_808, 11_513_626_624, 11.5),
        ("resnext50_32x4d", 25_028_904, 4_230_479_872, 4.2),
    ],
)
def test_imagenet_networks_cost_what_theirs_do(name, parameters, multiply_adds, billions):
    total = fused_resnet.profile(_network(name)).total
    assert total.parameters == parameters
    assert total.multiply_adds == total.multiply_adds_fused == multiply_adds
    assert abs(multiply_adds / 1e9 - billions) < 0.07  # table 1 counts without the shortcuts' projections
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        getattr(torchvision.models, name)().eval()(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() == 2 * multiply_adds


@pytest.mark.parametrize(("name", "billions"), [("resnet50", 3.8), ("resnet101", 7.6), ("resnet152", 11.3)])
def test_bottlenecks_with_the_papers_stride_have_the_papers_multiply_adds(name, billions):
    """The paper strides on the first 1x1 convolution of a bottleneck, which then has a quarter of the pixels."""
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().eval()
    for block in theirs.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    total = fused_resnet.profile(fused_resnet.fuse(theirs)).total
    assert abs(total.multiply_adds / 1e9 - billions) < 0.07
    assert total.multiply_adds_fused == total.multiply_adds


@pytest.mark.parametrize(
    ("depth", "millions", "digits"),
    [(20, 0.27, 2), (32, 0.46, 2), (44, 0.66, 2), (56, 0.85, 2), (110, 1.7, 1), (1202, 19.4, 1)],
)
def test_cifar_networks_have_the_papers_parameters(depth, millions, digits):
    with torch.device("meta"):
        model = fused_resnet.cifar_resnet(depth, "A")
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6, digits) == millions
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 16 * 32 + 32 * 64 + (2 * n) * 16**2 + (2 * n - 1) * (32**2 + 64**2))
    assert parameters == convolutions + 2 * (16 + 2 * n * (16 + 32 + 64)) + 64 * 10 + 10


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_multiply_adds_of_a_cifar_network_by_hand(depth):
    total = fused_resnet.profile(fused_resnet.cifar_resnet(depth, None).eval(), (1, 3, 32, 32)).total
    n, at_16 = (depth - 2) // 6, 32 * 32 * 16 * 16 * 9  # a convolution of any stage; half of it where a stage begins
    expected = 32 * 32 * 3 * 16 * 9 + (6 * n - 2) * at_16 + 2 * at_16 // 2 + 64 * 10
    assert total.multiply_adds == total.multiply_adds_fused == expected


@pytest.mark.parametrize("training", [False, True])
def test_identity_shortcuts_cost_nothing_in_any_layer(training):
    """Shortcut A against the plain network: no parameters and no multiply-adds; the add is neither."""
    layers = {}
    for shortcut in (None, "A"):
        costs = _costs(fused_resnet.cifar_resnet(20, shortcut).train(training), (2, 3, 32, 32))
        if shortcut == "A":
            pads = [costs.pop(f"layer{stage}.0.downsample") for stage in (2, 3)]
            assert all((c.parameters, c.multiply_adds, c.multiply_adds_fused) == (0, 0, 0) for c in pads)
        layers[shortcut] = {n: (c.parameters, c.multiply_adds, c.multiply_adds_fused) for n, c in costs.items()}
    assert layers["A"] == layers[None] and len(layers["A"]) >= 9 + 2
    for depth in (18, 34):
        plain, identity = (
            fused_resnet.profile(_network(f"resnet{depth}", shortcut=shortcut)).total for shortcut in (None, "A")
        )
        assert plain == identity


@pytest.mark.parametrize(("shortcut", "projected"), [("B", {4, 7}), ("C", {1, 2, 3, 4, 5, 6, 7, 8, 9})])
def test_projection_shortcuts_add_their_convolutions(shortcut, projected):
    """Each 1x1 projection with its BatchNorm, in the block that has it and nowhere else."""
    shape = (1, 3, 32, 32)
    plain, costs = (_costs(fused_resnet.cifar_resnet(20, s).eval(), shape) for s in (None, shortcut))
    number = 0
    for stage, (width, size) in enumerate(((16, 32), (32, 16), (64, 8)), start=1):
        for i in range(3):
            number += 1
            added = number in projected
            inputs = width // 2 if i == 0 and stage > 1 else width
            before, after = plain[f"layer{stage}.{i}"], costs[f"layer{stage}.{i}"]
            assert after.parameters - before.parameters == added * (inputs * width + 2 * width)
            for kind in ("multiply_adds", "multiply_adds_fused"):
                assert getattr(after, kind) - getattr(before, kind) == added * size * size * inputs * width


def test_bottleneck_of_256_channels_costs_about_a_basic_block_of_64():
    """Figure 5: 1x1 from 256 to 64, 3x3 at 64, 1x1 to 256, against two 3x3 at 64."""
    pixels = 56 * 56
    blocks = (fused_resnet.FusedBasicBlock(64, 64), 64), (fused_resnet.FusedBottleneck(256, 64), 256)
    basic, bottleneck = (
        fused_resnet.profile(nn.Sequential(block).eval(), (1, channels, 56, 56)).total for block, channels in blocks
    )
    assert basic.parameters == 2 * 9 * 64 * 64 + 2 * (64 + 64)
    assert bottleneck.parameters == 2 * 256 * 64 + 9 * 64 * 64 + 2 * (64 + 64 + 256)
    for cost, weights in ((basic, 18 * 64 * 64), (bottleneck, 2 * 256 * 64 + 9 * 64 * 64)):
        assert cost.multiply_adds == cost.multiply_adds_fused == pixels * weights
    assert 0.9 < bottleneck.multiply_adds / basic.multiply_adds < 1
    assert 0.9 < bottleneck.parameters / basic.parameters < 1


@pytest.mark.parametrize("fused", [True, False])
def test_layers_of_resnet18_and_their_sum(fused):
    model = _network("resnet18")
    profile = fused_resnet.profile(model if fused else fused_resnet.unfuse(model))
    kind = "multiply_adds_fused" if fused else "multiply_adds"
    layers = {cost.layer: cost for cost in profile}
    if not fused:
        convolutions = ("conv1", "conv2", "downsample.0")
        assert getattr(layers["layer2.0.conv2"], kind) == 28 * 28 * 9 * 128 * 128
        merged = sum(getattr(layers[f"layer2.0.{name}"], kind) for name in convolutions)
    else:
        merged = getattr(layers["layer2.0"], kind)
    assert merged == 28 * 28 * (9 * 64 * 128 + 9 * 128 * 128 + 64 * 128)
    stem = layers["ResNet" if fused else "conv1"]  # run as one, outside of the model's children
    assert getattr(stem, kind) == 112 * 112 * 49 * 3 * 64
    assert stem.parameters == 49 * 3 * 64 + (2 * 64 if fused else 0)
    assert getattr(layers["fc"], kind) == 512 * 1000 and layers["fc"].parameters == 513_000
    assert sum(cost.parameters for cost in profile) == profile.total.parameters == 11_689_512
    assert sum(getattr(cost, kind) for cost in profile) == getattr(profile.total, kind) == 1_814_073_344


def test_moments_scheme_saves_half_the_activations_of_a_training_step():
    model = fused_resnet.fuse(torchvision.models.resnet50()).train()
    total = fused_resnet.profile(model, (32, 3, 224, 224), torch.bfloat16).total
    assert total.saved_bytes_fused <= 0.5 * total.saved_bytes
    assert total.multiply_adds < total.multiply_adds_fused < 1.1 * total.multiply_adds


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_training_step_in_fp32_costs_the_convolutions_three_times(name):
    """Fused or not, with groups or without: all but the first, whose input needs no gradient."""
    model = _network(name)
    forward = fused_resnet.profile(model, (2, 3, 64, 64)).total.multiply_adds
    total = fused_resnet.profile(model.train(), (2, 3, 64, 64)).total
    assert total.multiply_adds == total.multiply_adds_fused == 3 * forward - 2 * 32 * 32 * 64 * 3 * 49


def test_training_step_of_a_bottleneck_by_hand():
    """Moments scheme: the convolutions three times, but S = a^T g for dW of the last one, and what the moments add."""
    n, k, w, pixels = 4, 64, 16, 4 * 8 * 8
    block = nn.Sequential(fused_resnet.FusedBottleneck(k, w)).train()
    total = fused_resnet.profile(block, (n, k, 8, 8), torch.bfloat16).total
    first, second, last = pixels * k * w, pixels * 9 * w * w, pixels * w * k
    # The block's input is the model's: no gradient goes on from the first convolution.
    assert total.multiply_adds == 2 * first + 3 * (second + last)
    added = 2 * pixels * w * w + 3 * w * w * k  # M and a W diag(B) W^T; Cov W, M W and W diag(B) W^T
    assert total.multiply_adds_fused == total.multiply_adds + added


def test_saved_bytes_of_one_block_by_hand():
    n, k, w, size = 4, 64, 16, 8
    block = nn.Sequential(fused_resnet.FusedBottleneck(k, w))
    cost = {c.layer: c for c in fused_resnet.profile(block.train(), (n, k, size, size), torch.bfloat16)}["0"]
    pixels = n * size * size
    activations = 2 * pixels * (k + w + w) + pixels * k // 8
    vectors = 4 * 5 * (w + w + k)
    assert cost.saved_bytes_fused == activations + vectors + 8 * (w + 1) ** 2


@pytest.mark.parametrize("op", sorted({op for op, _ in SAMPLES}))
def test_every_operator_reports_its_multiply_adds(op, monkeypatch):
    """Those with matrix products by hand. The others count nothing, and their references multiply no matrices."""
    function, calls = getattr(reference, op), []
    monkeypatch.setattr(reference, op, lambda *arguments: calls.append(arguments) or function(*arguments))
    counts = []
    for name, arguments in SAMPLES:
        if name == op:
            with FlopCounterMode(display=False) as counter:
                getattr(torch.ops.fused_resnet, op)(*arguments, "reference")
            counts.append(counter.get_total_flops() / 2)
    assert len(calls) == len(counts)
    assert counts == MULTIPLY_ADDS.get(op, [0] * len(counts))
    for arguments in calls:
        with FlopCounterMode(display=False) as counter:
            function(*arguments)
        assert (counter.get_total_flops() > 0) == (op in MULTIPLY_ADDS)


def test_flop_counter_knows_every_convolution_of_the_fused_chain():
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    counts = {}
    for impl in ("auto", "reference"):
        block = fused_resnet.FusedBasicBlock(16, 16)
        with fused_resnet.use(impl), FlopCounterMode(display=False) as counter:
            block(x).sum().backward()
        counts[impl] = counter.get_total_flops()
    assert counts["reference"] == counts["auto"] == 3 * 2 * (2 * 2 * 36 * 16 * 16 * 9)
