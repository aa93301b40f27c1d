"""profile: parameters, multiply-adds and saved bytes, against hand-counted numbers."""

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet


def test_resnet50_multiply_adds_and_parameters():
    model = fused_resnet.fuse(torchvision.models.resnet50()).eval()
    total = fused_resnet.profile(model).total
    assert total.parameters == 25_557_032
    assert total.multiply_adds == total.multiply_adds_fused == 4_089_184_256  # v1.5: stride on the 3x3


def test_moments_scheme_saves_half_the_activations_of_a_training_step():
    model = fused_resnet.fuse(torchvision.models.resnet50()).train()
    total = fused_resnet.profile(model, (8, 3, 224, 224), torch.bfloat16).total
    assert total.saved_bytes_fused <= 0.65 * total.saved_bytes
    assert total.multiply_adds < total.multiply_adds_fused < 1.1 * total.multiply_adds


def test_saved_bytes_of_one_block_by_hand():
    n, k, w, size = 4, 64, 16, 8
    block = nn.Sequential(fused_resnet.FusedBottleneck(k, w))
    cost = {c.layer: c for c in fused_resnet.profile(block.train(), (n, k, size, size), torch.bfloat16)}["0"]
    pixels = n * size * size
    activations = 2 * pixels * (k + w + w) + pixels * k // 8
    vectors = 4 * 5 * (w + w + k)
    assert cost.saved_bytes_fused == activations + vectors + 8 * (w + 1) ** 2


def test_flop_counter_knows_every_convolution_of_the_fused_chain():
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    counts = {}
    for impl in ("auto", "reference"):
        block = fused_resnet.FusedBasicBlock(16, 16)
        with fused_resnet.use(impl), FlopCounterMode(display=False) as counter:
            block(x).sum().backward()
        counts[impl] = counter.get_total_flops()
    assert counts["reference"] == counts["auto"] == 3 * 2 * (2 * 2 * 36 * 16 * 16 * 9)
