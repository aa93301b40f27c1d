"""Bad input: the error names the argument, what came and what is allowed, and nothing has been changed."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import ConvBN, Geometry

IMPLS = pytest.mark.parametrize("impl", ["auto", "reference"])


def _x(c=16, **options):
    return torch.randn(2, c, 5, 5, **options)


def _unit(c=16, k=16, r=1, **changes):
    vectors = [torch.zeros(k), torch.ones(k)]
    unit = ConvBN(
        torch.randn(k, c, r, r), *torch.ones(2, k), *vectors, torch.tensor(0), Geometry(padding=(r // 2, r // 2))
    )
    return unit._replace(**changes)


BLOCK = fused_resnet.residual_block
CASES = [
    (lambda: BLOCK(torch.randn(2, 16, 5), [_unit()]), ValueError, r"x: expected 4 dimensions .*got shape \(2, 16, 5\)"),
    (
        lambda: BLOCK(_x(8), [_unit()]),
        ValueError,
        r"units\[0\].w: shape \(16, 16, 1, 1\).* reads 16 channels, .* has 8",
    ),
    (lambda: BLOCK(_x(), [_unit(), _unit(8)]), ValueError, r"units\[1\].w: .* reads 8 channels, the input has 16"),
    (
        lambda: BLOCK(_x().long(), [_unit()]),
        TypeError,
        r"x: expected float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (
        lambda: BLOCK(_x(dtype=torch.double), [_unit()]),
        TypeError,
        r"units\[0\].w: torch.float32, .*input is torch.float64",
    ),
    (lambda: BLOCK(_x(device="meta"), [_unit()]), ValueError, r"units\[0\].w: on cpu, but the input is on meta"),
    (
        lambda: BLOCK(_x(), [_unit(geometry=Geometry(groups=3))]),
        ValueError,
        r"units\[0\].geometry.groups: must divide the 16 input and 16 output channels, got 3",
    ),
    (
        lambda: BLOCK(_x(), [_unit(gamma=torch.ones(8))]),
        ValueError,
        r"units\[0\].gamma: expected shape \(16,\).*got \(8,\)",
    ),
    (
        lambda: BLOCK(_x(), [_unit(running_var=torch.ones(16, device="meta"))]),
        ValueError,
        r"units\[0\].running_var: .* on meta",
    ),
    (
        lambda: BLOCK(_x(), [_unit(running_mean=None, batch_stats=False)]),
        ValueError,
        r"units\[0\]: batch_stats=False needs running_mean and running_var",
    ),
    (
        lambda: BLOCK(_x(), [_unit(momentum=None, num_batches_tracked=None)]),
        ValueError,
        r"units\[0\].momentum: None .* needs num_batches_tracked",
    ),
    (
        lambda: BLOCK(_x(), [_unit(), _unit(k=24)]),
        ValueError,
        r"x \(identity shortcut\): shape .* cannot be added to .*24",
    ),
    (
        lambda: BLOCK(_x(), [_unit()], _unit(k=8)),
        ValueError,
        r"shortcut: shape \(2, 8, 5, 5\) cannot be added to the output of shape \(2, 16, 5, 5\)",
    ),
    (
        lambda: fused_resnet.conv_bn_act(_x(), _unit(), _x(8)),
        ValueError,
        r"residual: shape \(2, 8, 5, 5\) cannot be added",
    ),
    (
        lambda: fused_resnet.conv_bn_act(_x(), _unit(), _x().half()),
        TypeError,
        r"residual: torch.float16, but x is torch.float32",
    ),
    (
        lambda: fused_resnet.conv_bn_act(_x(), _unit(), _x(device="meta")),
        ValueError,
        r"residual: on meta, but x is on cpu",
    ),
    (
        lambda: BLOCK(_x(), [_unit()], _unit(), identity=True),
        ValueError,
        r"shortcut, residual, identity: .* at most one",
    ),
    (lambda: BLOCK(_x(), [_unit()], scheme="fast"), ValueError, r'scheme: expected "auto", .*got \'fast\''),
    (lambda: BLOCK(_x(), [_unit()], impl="fast"), ValueError, r"impl must be one of auto, .*; got 'fast'"),
    (
        lambda: BLOCK(_x()[:1, :, :1, :1], [_unit()]),
        ValueError,
        r"Expected more than 1 value per channel when training, got input size \(1, 16, 1, 1\) at units\[0\]",
    ),
    (
        lambda: BLOCK(_x()[:, :, :2, :2], [_unit(r=5, geometry=Geometry())]),
        ValueError,
        r"units\[0\]: the input's 2x2 pixels are fewer than its kernel",
    ),
    (lambda: fused_resnet.stem(_x(8), _unit()), ValueError, r"units\[0\].w: .* the input has 8"),
    (
        lambda: fused_resnet.conv_bn_act(_x(), _unit(), _x()[:, :1], relu=False),
        ValueError,
        r"residual: shape \(2, 1, 5, 5\) cannot be added",
    ),
    (
        lambda: BLOCK(_x(), [_unit(), _unit(gamma=torch.ones(16).double())]),
        TypeError,
        r"units\[1\].gamma: expected torch.float32 with activations of torch.float32, got torch.float64",
    ),
    (
        lambda: BLOCK(_x(), [_unit(running_var=None)]),
        ValueError,
        r"units\[0\]: expected running_mean and running_var, or neither, got one",
    ),
    (
        lambda: BLOCK(_x(), [_unit(geometry=Geometry(stride=(0, 1)))]),
        ValueError,
        r"units\[0\].geometry.stride: expected \(height, width\), each at least 1, got \(0, 1\)",
    ),
    (
        lambda: BLOCK(_x(), [_unit(geometry=Geometry(padding=1))]),
        ValueError,
        r"units\[0\].geometry.padding: expected \(height, width\), each at least 0, got 1",
    ),
    (lambda: BLOCK(_x(), []), ValueError, "units: expected at least one ConvBN, got none"),
    (lambda: BLOCK(_x(), [_unit()], _x()), TypeError, "shortcut: expected a ConvBN, got Tensor"),
    (lambda: BLOCK(_x(), [_unit(w=None)]), TypeError, r"units\[0\].w: expected a tensor, got NoneType"),
    (lambda: fused_resnet.FusedBasicBlock(16, 16)(None), TypeError, "x: expected a tensor, got NoneType"),
    (lambda: fused_resnet.stem(_x().to(torch.float8_e5m2), _unit()), TypeError, "x: expected float16, .*float8_e5m2"),
    (lambda: fused_resnet.explain({}, _x()), TypeError, "model: expected a torch.nn.Module, got dict"),
    (lambda: fused_resnet.explain(nn.ReLU(), [1]), TypeError, "x: expected a tensor, got list"),
    (lambda: fused_resnet.profile({}), TypeError, "model: expected a torch.nn.Module, got dict"),
    (lambda: fused_resnet.tune({}, _x()), TypeError, "model: expected a torch.nn.Module, got dict"),
    (lambda: fused_resnet.capture({}, _x()), TypeError, "model: expected a torch.nn.Module, got dict"),
]


@IMPLS
@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=range(len(CASES)))
def test_error_names_the_argument(call, error, message, impl):
    with fused_resnet.use(impl), pytest.raises(error, match=message):
        call()


def _states(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@IMPLS
@pytest.mark.parametrize(
    "x",
    [_x(8), _x(16).double(), _x(16)[0], _x(16)[:1, :, :1, :1], torch.zeros(2, 16, 5, 5, dtype=torch.long)],
    ids=["channels", "dtype", "rank", "one value", "integer"],
)
@pytest.mark.parametrize("where", ["first", "last"])
def test_no_state_changes(x, impl, where):
    """Also where the first convolutions of a block would have been fine."""
    block = fused_resnet.FusedBottleneck(16, 4)
    if where == "last":
        x = _x(16)
        block.bn3 = nn.BatchNorm2d(12)
    before = _states(block)
    with fused_resnet.use(impl), pytest.raises((ValueError, TypeError)):
        block(x)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@IMPLS
def test_no_images_give_an_empty_result_and_change_nothing(impl):
    for block in (fused_resnet.FusedBottleneck(16, 4), fused_resnet.FusedBasicBlock(16, 16)):
        before = _states(block)
        x = _x()[:0].requires_grad_()
        with fused_resnet.use(impl):
            out = block(x)
            out.sum().backward()
        assert out.shape == (0, 16, 5, 5) and x.grad.shape == x.shape
        assert all(p.grad is not None and not p.grad.any() for p in block.parameters())
        assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    model = fused_resnet.resnet18(num_classes=3)
    before = _states(model)
    with fused_resnet.use(impl):
        assert model(torch.randn(0, 3, 32, 32)).shape == (0, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_implementation():
    with (
        pytest.raises(ValueError, match="impl must be one of auto, reference, triton, cuda; got 'gpu'"),
        fused_resnet.use("gpu"),
    ):
        pass


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attn_layer": "se"}, r"FusedBottleneck: attn_layer must be None, got 'se'"),
        ({"act_layer": nn.SiLU}, r"FusedBottleneck: act_layer must be .*ReLU.*SiLU"),
    ],
)
def test_timm_options_for_another_block(keywords, message):
    with pytest.raises(ValueError, match=message):
        fused_resnet.FusedBottleneck(16, 4, **keywords)
    with pytest.raises(TypeError, match="unexpected argument 'colour'"):
        fused_resnet.FusedBasicBlock(16, 16, colour=1)


def test_moments_scheme_that_cannot_be():
    with pytest.raises(fused_resnet.Unsupported, match='scheme="moments" needs two or more convolutions'):
        BLOCK(_x(), [_unit(r=3), _unit(r=3)], scheme="moments", impl="reference")
