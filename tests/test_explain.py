"""explain: every layer, its problem, its backend and the reason, without a GPU and without running the model."""

import threading

import pytest
import torch
import torchvision
from torch import nn

import fused_resnet


def _x(batch=2, size=64, dtype=torch.bfloat16):
    return torch.empty(batch, 3, size, size, dtype=dtype, device="meta")


def test_every_layer_of_a_fused_model_is_named():
    model = fused_resnet.fuse(torchvision.models.resnet50()).eval()
    records = fused_resnet.explain(model, _x(), arch="sm90")
    blocks = {f"layer{i + 1}.{j}" for i, count in enumerate((3, 4, 6, 3)) for j in range(count)}
    assert blocks <= {record.layer for record in records}
    assert {"avgpool", "fc"} <= {record.layer for record in records}
    assert all(record.backend and record.problem for record in records)
    assert any(record.reason == "not measured on sm90" for record in records)


def test_table_lists_one_line_per_record():
    records = fused_resnet.explain(fused_resnet.FusedBottleneck(16, 4).eval(), torch.empty(1, 16, 8, 8), arch="sm90")
    lines = str(records).splitlines()
    assert lines[0].split() == ["layer", "operator", "problem", "backend", "reason"]
    assert len(lines) == len(records) + 2
    assert "1x8x8x16" in lines[2]


def test_shared_modules_are_explained_where_they_run():
    block = fused_resnet.FusedBasicBlock(8, 8)
    records = fused_resnet.explain(nn.Sequential(block, nn.ReLU(), block), torch.empty(2, 8, 5, 5))
    assert [record.operator for record in records] == ["residual_block", "ReLU", "residual_block"]


def test_another_thread_is_not_disturbed():
    """The hooks that follow the layers are global, and fire for every module that runs meanwhile."""
    training = fused_resnet.FusedBasicBlock(8, 8)

    class Waits(nn.Module):
        def forward(self, x):
            thread = threading.Thread(target=lambda: training(torch.randn(2, 8, 5, 5)).sum().backward())
            thread.start()
            thread.join()
            return x

    model = nn.Sequential(fused_resnet.FusedBasicBlock(4, 4), Waits())
    records = fused_resnet.explain(model, torch.empty(2, 4, 5, 5), arch="sm90")
    assert [(record.layer, record.operator) for record in records] == [("0", "residual_block"), ("1", "Waits")]
    assert training.conv1.weight.grad is not None


def test_tile_of_the_heuristic_is_explained():
    model = fused_resnet.FusedBottleneck(256, 64).eval()
    records = fused_resnet.explain(model, torch.empty(8, 256, 56, 56, dtype=torch.float16), arch="sm86", impl="triton")
    reasons = [record.reason for record in records if record.operator == "conv_affine"]
    assert len(reasons) == 3
    assert all("heuristic: " in reason and "on 84 SMs" in reason for reason in reasons)


def test_backward_is_explained_in_training_mode_with_the_layer_it_belongs_to():
    model = nn.Sequential(fused_resnet.FusedBottleneck(16, 4), fused_resnet.FusedBottleneck(16, 4))
    records = fused_resnet.explain(model, torch.empty(2, 16, 8, 8, dtype=torch.bfloat16), impl="reference")
    backward = [r.layer for r in records if r.operator in ("conv_dgrad", "conv_wgrad", "cross_moments")]
    assert set(backward) == {"0", "1"}
    assert backward.index("1") < backward.index("0")
    assert all(r.backend == "reference" for r in records)


def test_unfused_block_says_why():
    model = nn.Sequential(fused_resnet.FusedBasicBlock(8, 8))
    model[0].conv2.register_forward_hook(lambda *_: None)
    records = fused_resnet.explain(model.eval(), torch.empty(1, 8, 8, 8))
    assert {r.layer for r in records} == {"0.conv1", "0.bn1", "0.relu", "0.conv2", "0.bn2"}
    assert all("0 runs unfused: conv2, bn2: Conv2d carries hooks" in r.reason for r in records)


def test_model_is_left_as_it_was():
    model = fused_resnet.FusedBottleneck(16, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused_resnet.explain(model, torch.empty(2, 16, 8, 8), arch="sm80")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_unknown_arch_and_impl():
    block = fused_resnet.FusedBottleneck(16, 4)
    with pytest.raises(ValueError, match=r"arch: expected one of sm80, .*got 'sm12'"):
        fused_resnet.explain(block, torch.empty(2, 16, 8, 8), arch="sm12")
    with pytest.raises(ValueError, match=r"impl.*'fast'"):
        fused_resnet.explain(block, torch.empty(2, 16, 8, 8), impl="fast")
