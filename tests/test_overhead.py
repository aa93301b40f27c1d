"""Where the library's operators run, a fused module may cost little more Python than the modules it stands for."""

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet


def _down():
    return nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))


_LONE = torchvision.ops.Conv2dNormActivation(16, 16)
PAIRS = {
    "bottleneck": (fused_resnet.FusedBottleneck(16, 4), Bottleneck(16, 4)),
    "projection": (fused_resnet.FusedBottleneck(16, 4, 1, _down()), Bottleneck(16, 4, 1, _down())),
    "basic": (fused_resnet.FusedBasicBlock(16, 16), BasicBlock(16, 16)),
    "conv": (fused_resnet.FusedConvBNAct(16, 16), _LONE),
    "fused conv": (fused_resnet.fuse(copy.deepcopy(_LONE)), _LONE),
    "network": (fused_resnet.resnet18(num_classes=2), torchvision.models.resnet18(num_classes=2)),
}


def _calls(module, x):
    """How many Python and C functions module(x) calls once its plans are known."""
    events = []
    module(x)
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        module(x)
    finally:
        sys.setprofile(before)
    return events.count("call") + events.count("c_call")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_checks_and_planning_are_few_calls(pair, training):
    """Counted, not timed: a shared machine's clock says little. A call here takes about 0.1 us."""
    ours, theirs = (module.train(training) for module in PAIRS[pair])
    x = torch.randn(2, 3, 32, 32) if pair == "network" else torch.randn(2, 16, 4, 4)
    with torch.set_grad_enabled(training):
        a, b = _calls(ours, x), _calls(theirs, x)
    fused = 9 if pair == "network" else 1  # eight blocks and a stem
    assert a - b <= 100 * fused
