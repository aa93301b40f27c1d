"""The ResNet family against torchvision's: keys, shapes, order, initialisation, results; and the paper's figures."""

import copy
import inspect
import pickle

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter

import fused_resnet
from fused_resnet.models import BUILDERS, PadShortcut
from fused_resnet.modules import forward_stem


@pytest.mark.parametrize("name", BUILDERS)
def test_keys_shapes_order_and_modules_equal_torchvision(name):
    with torch.device("meta"):
        ours, theirs = getattr(fused_resnet, name)(), getattr(torchvision.models, name)()
    signature = [(key, value.shape, value.dtype) for key, value in ours.state_dict().items()]
    assert signature == [(key, value.shape, value.dtype) for key, value in theirs.state_dict().items()]
    assert [key for key, _ in ours.named_modules()] == [key for key, _ in theirs.named_modules()]
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]


def test_counts():
    with torch.device("meta"):
        assert len(fused_resnet.resnet50().state_dict()) == 320
        assert sum(p.numel() for p in fused_resnet.resnet50().parameters()) == 25_557_032
        assert len(fused_resnet.resnet18().state_dict()) == 122


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_initialisation_draws_the_same_numbers(name, zero_init_residual):
    models = []
    for library in (fused_resnet, torchvision.models):
        torch.manual_seed(7)
        models.append(getattr(library, name)(zero_init_residual=zero_init_residual).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[1])


def test_signature_begins_with_torchvisions():
    ours, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(cls).parameters.values()]
        for cls in (fused_resnet.ResNet, torchvision.models.ResNet)
    )
    assert ours[: len(theirs)] == theirs
    for name in BUILDERS:
        kinds = [(p.name, p.kind) for p in inspect.signature(getattr(fused_resnet, name)).parameters.values()]
        keyword, rest = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
        assert kinds == [("weights", keyword), ("progress", keyword), ("kwargs", rest)]


@pytest.mark.parametrize("block", [torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck])
def test_zero_initialisation_finds_other_peoples_blocks(block):
    class Sub(block):
        pass

    for cls in (block, Sub):
        model = fused_resnet.ResNet(cls, [1, 1, 1, 1], num_classes=2, zero_init_residual=True)
        for stage in (model.layer1, model.layer4):
            zeroed = [name for name, p in stage[0].named_parameters() if name.endswith("weight") and not p.any()]
            assert zeroed == ["bn2.weight" if block.expansion == 1 else "bn3.weight"]


# With at most two blocks in each stage, the other builders' networks are among these.
DISTINCT = ["resnet18", "resnet50", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2"]


@pytest.mark.parametrize(
    ("name", "impl"), [("resnet18", "auto"), ("resnext50_32x4d", "auto"), *((name, "reference") for name in DISTINCT)]
)
def test_logits_gradients_and_statistics_equal_torchvision(name, impl):
    torch.manual_seed(0)
    theirs, ours = (getattr(library, name)(num_classes=5).double() for library in (torchvision.models, fused_resnet))
    for model in (theirs, ours):
        # The blocks behind the second repeat it; the widest ones, which cost most, stand once.
        for stage, blocks in (("layer1", 2), ("layer2", 2), ("layer3", 2), ("layer4", 1)):
            setattr(model, stage, getattr(model, stage)[:blocks])
    ours.load_state_dict(theirs.state_dict())
    for step in range(2):
        x = torch.randn(3, 3, 48, 48, dtype=torch.double)
        with fused_resnet.use(impl):
            out = ours(x)
            out.square().sum().backward()
        expected = theirs(x)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8, msg=f"step {step}")
    scale = max(p.grad.abs().max() for p in theirs.parameters())
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-8 * float(scale), msg=key)
    for (key, p), q in zip(theirs.named_buffers(), ours.named_buffers()):
        torch.testing.assert_close(q[1], p, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_checkpoint_goes_both_ways(name):
    """Whole networks, running statistics other than (0, 1)."""
    torch.manual_seed(0)
    theirs, ours = (getattr(library, name)(num_classes=4).double() for library in (torchvision.models, fused_resnet))
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        theirs(x)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.eval()(x)
    ours.eval()
    for impl in ("auto", "reference"):
        with fused_resnet.use(impl):
            torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("block", ["FusedBasicBlock", "FusedBottleneck"])
def test_blocks_in_torchvisions_resnet(block):
    plain = "BasicBlock" if block == "FusedBasicBlock" else "Bottleneck"
    with torch.device("meta"):
        ours = torchvision.models.resnet.ResNet(getattr(fused_resnet, block), [2, 2, 2, 2])
        theirs = torchvision.models.resnet.ResNet(getattr(torchvision.models.resnet, plain), [2, 2, 2, 2])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.layer1[0].unfused_reason() is None


def test_stem_is_composable_and_feeds_a_layer_getter():
    model = fused_resnet.resnet18(num_classes=4).eval()
    x = torch.randn(2, 3, 40, 40)
    with fused_resnet.use("reference"):
        by_hand = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        torch.testing.assert_close(forward_stem(model.conv1, model.bn1, model.relu, model.maxpool, x), by_hand)
        body = IntermediateLayerGetter(model, {"layer1": "a", "layer4": "b"})
        features = body(x)
    assert [tuple(features[k].shape) for k in ("a", "b")] == [(2, 64, 10, 10), (2, 512, 2, 2)]
    torch.testing.assert_close(features["a"], model.layer1(by_hand))


def test_dilation_instead_of_stride():
    keywords = {"replace_stride_with_dilation": [False, True, True], "num_classes": 3}
    ours, theirs = fused_resnet.resnet50(**keywords).double(), torchvision.models.resnet50(**keywords).double()
    ours.load_state_dict(theirs.state_dict())
    assert [m.dilation for m in ours.modules() if isinstance(m, torch.nn.Conv2d)] == [
        m.dilation for m in theirs.modules() if isinstance(m, torch.nn.Conv2d)
    ]
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    with fused_resnet.use("reference"):
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    with pytest.raises(ValueError, match="3-element tuple, got"):
        fused_resnet.resnet50(replace_stride_with_dilation=[True])


def test_deepcopy_pickle_and_meta():
    model = fused_resnet.resnet18(num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    assert model.to("meta")(x.to("meta")).shape == (1, 3)


def test_basic_block_refuses_what_torchvisions_does():
    with pytest.raises(ValueError, match="groups=1 and base_width=64, got groups=2"):
        fused_resnet.FusedBasicBlock(64, 64, groups=2)
    with pytest.raises(ValueError, match="base_width=128"):
        fused_resnet.resnet18(width_per_group=128)
    with pytest.raises(NotImplementedError, match="dilation must be 1, got 2"):
        fused_resnet.FusedBasicBlock(64, 64, dilation=2)
    with pytest.raises(ValueError, match="groups: resnext50_32x4d has 32, got 8"):
        fused_resnet.resnext50_32x4d(groups=8)


# The paper's experiments


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_parameters_are_the_papers(depth, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in fused_resnet.cifar_resnet(depth).parameters())
        plain = sum(p.numel() for p in fused_resnet.cifar_resnet(depth, None).parameters())
    assert f"{count / 1e6:.2f}".startswith(str(millions)[:4]) and count == plain


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet18", 1.814), ("resnet34", 3.664), ("resnet50", 4.089), ("resnet101", 7.801), ("resnet152", 11.514)],
)
def test_multiply_adds(name, billions):
    """The paper says 1.8, 3.6, 3.8, 7.6 and 11.3; v1.5 has a bottleneck's stride on the 3x3 and computes more."""
    with torch.device("meta"):
        model, x = getattr(fused_resnet, name)().eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet18", 1.8), ("resnet34", 3.6), ("resnet50", 3.8), ("resnet101", 7.6), ("resnet152", 11.3)],
)
def test_multiply_adds_with_the_papers_stride_are_the_papers(name, billions):
    with torch.device("meta"):
        model, x = getattr(fused_resnet, name)().eval(), torch.empty(1, 3, 224, 224)
    for block in model.modules():
        if isinstance(block, fused_resnet.FusedBottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, abs=0.07)  # the paper cuts some, rounds others


@pytest.mark.parametrize("size", [8, 9])
def test_padded_shortcut_keeps_channels_last(size):
    x = torch.randn(2, 4, size, size).contiguous(memory_format=torch.channels_last)
    out = PadShortcut(4, 10, 2)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out[:, 3:7], x[:, :, ::2, ::2]) and not out[:, :3].any() and not out[:, 7:].any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("shortcut", ["A", "B", "C", None])
def test_shortcuts_compute_what_they_say(shortcut, impl):
    torch.manual_seed(0)
    model = fused_resnet.cifar_resnet(8, shortcut).double()
    block = model.layer2[0]
    x = torch.randn(2, 16, 9, 9, dtype=torch.double)
    with fused_resnet.use(impl):
        out = block(x)
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    if shortcut == "A":
        branch[:, 8:24] += x[:, :, ::2, ::2]
    elif shortcut is not None:
        branch = branch + block.downsample(x)
    torch.testing.assert_close(out, torch.relu(branch))
    assert (model.layer1[0].downsample is not None) == (shortcut == "C")


@pytest.mark.parametrize("shortcut", ["A", "C", None])
@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_imagenet_depths_take_every_shortcut(name, shortcut):
    with torch.device("meta"):
        model = getattr(fused_resnet, name)(shortcut=shortcut, num_classes=7)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)
        plain = getattr(fused_resnet, name)(shortcut=None, num_classes=7)
    projections = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert (projections == 0) == (shortcut != "C")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fused_resnet.cifar_resnet(21), r"depth: expected 6n \+ 2 .*got 21"),
        (lambda: fused_resnet.cifar_resnet(2), r"depth: expected 6n \+ 2 .*got 2"),
        (lambda: fused_resnet.cifar_resnet("20"), r"depth: expected 6n \+ 2 .*got '20'"),
        (lambda: fused_resnet.cifar_resnet(20.0), r"depth: expected 6n \+ 2 .*got 20.0"),
        (
            lambda: fused_resnet.resnet18(shortcut=None, zero_init_residual=True),
            r"zero_init_residual: must be False with shortcut=None, got True",
        ),
        (lambda: fused_resnet.cifar_resnet(20, "D"), r"shortcut: expected one of 'A', 'B', 'C', None, got 'D'"),
        (lambda: fused_resnet.resnet18(shortcut="E"), r"shortcut: expected one of .*got 'E'"),
        (lambda: fused_resnet.resnet50(shortcut="A"), r"shortcut: 'A' needs networks of basic blocks"),
    ],
)
def test_bad_depth_and_shortcut(call, message):
    with pytest.raises(ValueError, match=message):
        call()
