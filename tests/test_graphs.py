"""CUDA-graph capture: what can be said without a device, and on one the equality with eager execution."""

import copy
import threading

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import plan
from fused_resnet.graphs import Snapshot, check_capturable


def _model():
    torch.manual_seed(0)
    return nn.Sequential(fused_resnet.FusedBottleneck(16, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def _step(model, optimizer, x, target):
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, 0.9, fused=True), lambda p: torch.optim.AdamW(p)])
def test_snapshot_makes_warm_up_invisible(make):
    x, target = torch.randn(4, 16, 5, 5), torch.tensor([0, 1, 2, 0])
    model, twin = _model(), _model()
    optimizer, twin_optimizer = make(model.parameters()), make(twin.parameters())
    snapshot = Snapshot(model, optimizer)
    for _ in range(3):
        _step(model, optimizer, torch.randn_like(x), target)
    snapshot.restore()
    assert all(p.grad is None for p in model.parameters())
    for a, b in zip(model.state_dict().values(), twin.state_dict().values()):
        assert torch.equal(a, b)
    for _ in range(3):
        assert torch.equal(_step(model, optimizer, x, target), _step(twin, twin_optimizer, x, target))


def test_snapshot_keeps_existing_optimizer_state():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    x, target = torch.randn(4, 16, 5, 5), torch.tensor([0, 1, 2, 0])
    _step(model, optimizer, x, target)
    before = copy.deepcopy(optimizer.state_dict())
    snapshot = Snapshot(model, optimizer)
    _step(model, optimizer, x, target)
    snapshot.restore()
    for i, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], before["state"][i]["momentum_buffer"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), r"group 0 has lr=0.1, which a graph would freeze"),
        (lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.1, fused=True), r"dampening=0.1"),
        (lambda p: torch.optim.AdamW(p), r"capturable=False"),
    ],
)
def test_unfit_optimizers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        check_capturable(make(_model().parameters()))


def test_capture_needs_a_cuda_tensor_and_the_right_mode():
    x, target = torch.randn(2, 16, 5, 5), torch.tensor([0, 1])
    model = _model()
    with pytest.raises(ValueError, match="example: on cpu; a CUDA graph needs"):
        fused_resnet.capture(model.eval(), x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    with pytest.raises(ValueError, match="x: on cpu"):
        fused_resnet.capture_step(model.train(), optimizer, nn.functional.cross_entropy, x, target)
    with pytest.raises(TypeError, match="example: expected a tensor, got list"):
        fused_resnet.capture(model, [x])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_captured_model_follows_weights_and_refuses_other_shapes(impl):
    model = _model().cuda().eval()
    x = torch.randn(2, 16, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    with fused_resnet.use(impl), torch.no_grad():
        captured = fused_resnet.capture(model, x)
        other = torch.randn_like(x)
        assert torch.equal(captured(other), model(other))
        for p in model.parameters():
            p.mul_(1.5)
        model[0].bn1.running_mean.add_(0.25)
        assert torch.equal(captured(other), model(other))
    with pytest.raises(ValueError, match=r"x: captured for shape \(2, 16, 8, 8\)"):
        captured(other[:1])


@pytest.mark.gpu
def test_captured_step_equals_eager_steps():
    x = torch.randn(8, 16, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    target = torch.randint(3, (8,), device="cuda")
    eager, captured = _model().cuda(), _model().cuda()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9, fused=True) for m in (eager, captured)]
    step = fused_resnet.capture_step(captured, optimizers[1], nn.functional.cross_entropy, x, target)
    assert all(torch.equal(a, b) for a, b in zip(captured.state_dict().values(), eager.state_dict().values()))
    for _ in range(4):
        batch = torch.randn_like(x)
        torch.testing.assert_close(step(batch, target), _step(eager, optimizers[0], batch, target))
    for a, b in zip(captured.state_dict().values(), eager.state_dict().values()):
        torch.testing.assert_close(a, b)


def test_all_threads_plan_for_the_graph():
    """Autograd runs a checkpointed block again on a thread of its own."""
    seen = []
    with plan.replayed():
        thread = threading.Thread(target=lambda: seen.append(plan.is_replayed()))
        thread.start()
        thread.join()
    assert seen == [True] and not plan.is_replayed()
