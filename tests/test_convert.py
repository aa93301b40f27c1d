"""fuse and unfuse: in place, exact both ways, on torchvision's, timm's and a detector's modules."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

import fused_resnet
from fused_resnet.convert import conv_bn_runs
from fused_resnet.modules import FusedBlock

TIMM = ("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152")


def _images(size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _randomise_bn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif "bn" in name and tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + ("weight" in name))
    return model


def _types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def _fused_blocks(model: nn.Module) -> int:
    return sum(isinstance(m, FusedBlock) and m.unfused_reason() is None for m in model.modules())


def _assert_round_trip(model: nn.Module, x: torch.Tensor, blocks: int) -> None:
    model.double().eval()
    x = x.double()
    types, parameters = _types(model), dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    assert fused_resnet.fuse(model) is model
    assert _fused_blocks(model) == blocks
    assert all(p is parameters[name] for name, p in model.named_parameters())
    with fused_resnet.use("reference"):
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert fused_resnet.unfuse(model) is model
    assert _types(model) == types
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16), ("resnext50_32x4d", 16)])
def test_torchvision_round_trip(name, blocks):
    _assert_round_trip(_randomise_bn(torchvision.models.get_model(name, num_classes=10)), _images(), blocks)


@pytest.mark.parametrize("name", TIMM)
def test_timm_plain_resnets_round_trip(name):
    model = _randomise_bn(timm.create_model(name, num_classes=10))
    blocks = sum(type(m).__name__ in ("BasicBlock", "Bottleneck") for m in model.modules())
    _assert_round_trip(model, _images(), blocks)


def test_timm_extras_keep_a_block_unfused():
    model = fused_resnet.fuse(timm.create_model("seresnet50", num_classes=10))
    reasons = {m.unfused_reason() for m in model.modules() if isinstance(m, FusedBlock)}
    assert reasons == {"se is a SEModule"}


def test_timm_average_pool_shortcut_is_called_and_its_block_fused():
    _assert_round_trip(_randomise_bn(timm.create_model("resnet26d", num_classes=10)), _images(), 8)


def test_detector_backbone_with_frozen_bn():
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    detector = _randomise_bn(detector).double().eval()
    x = _images(64, 1).double()
    expected = detector.backbone(x)
    fused_resnet.fuse(detector)
    assert _fused_blocks(detector) == 16
    with fused_resnet.use("reference"):
        features = detector.backbone(x)
    assert list(features) == list(expected)
    for name, value in features.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_training_gradients_and_statistics_after_fuse():
    plain = _randomise_bn(torchvision.models.resnet18(num_classes=10)).double()
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    x, target = _images(64, 3).double(), torch.tensor([1, 7, 3])
    for model in (plain, fused):
        with fused_resnet.use("reference"):
            nn.functional.cross_entropy(model(x), target).backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)
    for p, q in zip(plain.buffers(), fused.buffers()):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)


def test_sequential_runs_are_fused_and_the_rest_is_called():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.0),
        nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Sigmoid(),
    )  # fmt: skip
    assert conv_bn_runs(list(model)) == [(0, 3), (4, 2)]
    x = _images(9)
    expected = copy.deepcopy(model)(x)
    fused_resnet.fuse(model)
    with fused_resnet.use("reference"):
        torch.testing.assert_close(model(x), expected)
    calls = []
    model[6].register_forward_hook(lambda *_: calls.append("sigmoid"))
    model[1].register_forward_hook(lambda *_: calls.append("bn"))
    model(x)
    assert calls == ["bn", "sigmoid"]


def test_isinstance_pickle_and_deepcopy_of_swapped_modules():
    model = fused_resnet.fuse(torchvision.models.resnet18(num_classes=10)).eval()
    block = model.layer1[0]
    assert isinstance(block, torchvision.models.resnet.BasicBlock) and isinstance(block, FusedBlock)
    x = _images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _types(other) == _types(model)
        assert torch.equal(other(x), model(x))
        assert type(fused_resnet.unfuse(other).layer1[0]) is torchvision.models.resnet.BasicBlock


def test_sequential_keeps_its_argument_name():
    run = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    expected = run(input=_images())
    torch.testing.assert_close(fused_resnet.fuse(run)(input=_images()), expected)


def test_copies_of_a_compiled_model():
    """Module.compile leaves a function in the module that cannot be pickled."""
    model = fused_resnet.fuse(torchvision.models.resnet18(num_classes=10)).eval()
    expected = model(_images())
    model.compile(backend="eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(_images()), expected)


def test_stages_of_other_kinds():
    """A block alone, and a stage that something wraps: both cannot be iterated over."""
    model = torchvision.models.resnet18(num_classes=10).eval()
    model.layer1 = model.layer1[0]
    expected = model(_images())
    fused_resnet.fuse(model)
    model.layer2 = torch.compile(model.layer2, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(_images()), expected)


def test_unfuse_refuses_a_class_derived_since():
    """fully_shard derives a class for each module that it manages; restoring the original would take that away."""
    model = fused_resnet.fuse(torchvision.models.resnet18(num_classes=10))
    block = model.layer2[0]
    block.__class__ = type("Sharded", (type(block),), {})
    types = _types(model)
    with pytest.raises(ValueError, match=r"model: layer2\.0 has become a Sharded since it was fused"):
        fused_resnet.unfuse(model)
    assert _types(model) == types


def test_own_resnet_is_unfused_with_its_stem():
    model = fused_resnet.unfuse(fused_resnet.resnet18(num_classes=10))
    x = _images(64).requires_grad_()
    with fused_resnet.use("reference"):
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()  # which the fused operators refuse
    assert model.conv1.weight.grad.any()


def test_own_modules_switch_off_and_on():
    block = fused_resnet.FusedBottleneck(16, 4)
    assert block.unfused_reason() is None
    fused_resnet.unfuse(block)
    assert block.unfused_reason() == "switched off by unfuse()"
    fused_resnet.fuse(block)
    assert block.unfused_reason() is None and "fused" not in block.__dict__


def test_subclasses_stay_as_they_are():
    class Custom(torchvision.models.resnet.BasicBlock):
        def forward(self, x):
            return super().forward(x) + 1

    block = Custom(8, 8).eval()
    x = torch.randn(1, 8, 5, 5)
    expected = block(x)
    with pytest.warns(UserWarning, match="nothing in this Custom is known"):
        assert type(fused_resnet.fuse(block)) is Custom
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("function", [fused_resnet.fuse, fused_resnet.unfuse])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        function({})
