"""Composition with PyTorch's tools: compile, export, FX, checkpointing, copies, meta tensors, weight averaging."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_resnet

IMPLS = pytest.mark.parametrize("impl", ["auto", "reference"])


class Net(nn.Module):
    """A stem and two bottlenecks, one with a projection: every kind of fused operator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        down = nn.Sequential(nn.Conv2d(8, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.stem = fused_resnet.FusedConvBNAct(3, 8, 3)
        self.blocks = nn.Sequential(
            fused_resnet.FusedBottleneck(8, 8, 2, down),
            fused_resnet.FusedBottleneck(32, 8),
            fused_resnet.FusedBasicBlock(32, 32),
        )
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def _x(batch=3):
    return torch.randn(batch, 3, 9, 11, generator=torch.Generator().manual_seed(1)).to(
        memory_format=torch.channels_last
    )


def _step(run, x):
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return out.detach(), x.grad


def _assert_same_state(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=name)


@IMPLS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(impl, dynamic):
    torch._dynamo.reset()
    eager, model = Net(), Net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with fused_resnet.use(impl):
        for batch in (3, 4) if dynamic else (3, 3):
            for a, b in zip(_step(compiled, _x(batch)), _step(eager, _x(batch))):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)
    _assert_same_state(model, eager)
    assert model.blocks[0].bn1.num_batches_tracked == 2


def test_compile_notices_another_implementation():
    torch._dynamo.reset()
    block = fused_resnet.FusedBasicBlock(8, 8)
    seen = []

    def backend(graph, _):
        seen.extend(node.args[-1] for node in graph.graph.nodes if "residual_block" in str(node.target))
        return graph

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for impl in ("auto", "reference"):
        with fused_resnet.use(impl):
            compiled(torch.randn(2, 8, 5, 5))
    assert seen == ["auto", "reference"]


@IMPLS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export_with_a_dynamic_batch(impl, strict, training):
    model, eager = Net().train(training), Net().train(training)
    with fused_resnet.use(impl):
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (_x(),), dynamic_shapes={"x": {0: batch}}, strict=strict)
        for size in (3, 5):
            torch.testing.assert_close(program.module()(_x(size)), eager(_x(size)), rtol=1e-4, atol=1e-5)
        program.run_decompositions()


@IMPLS
def test_fx_trace_keeps_the_statistics_in_the_graph(impl):
    model, eager = Net(), Net()
    with fused_resnet.use(impl):
        traced = torch.fx.symbolic_trace(model)
        before = {name: value.clone() for name, value in model.named_buffers()}
        _assert_same_state(model, eager)  # tracing changed nothing
        for a, b in zip(_step(traced, _x()), _step(eager, _x())):
            torch.testing.assert_close(a, b)
    operators = [node.target for node in traced.graph.nodes if "fused_resnet" in str(node.target)]
    assert len(operators) == 4
    _assert_same_state(traced, eager)
    assert not torch.equal(traced.get_buffer("blocks.1.bn3.running_mean"), before["blocks.1.bn3.running_mean"])


def _forward_ad(net):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(_x(), torch.ones_like(_x())))).tangent


TRANSFORMS = {
    "vmap": lambda net: torch.func.vmap(net)(_x().unsqueeze(1)),
    "grad": lambda net: torch.func.grad(lambda x: net(x).square().sum())(_x()),
    "jvp": lambda net: torch.func.jvp(net, (_x(),), (torch.ones_like(_x()),))[1],
    "forward_ad": _forward_ad,
    "jit.trace": lambda net: torch.jit.trace(net, _x(4))(_x()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_see_the_librarys_operators(transform):
    """As torchvision's blocks under "auto"; the fused operators, asked for by name, say that they cannot."""
    model, plain = Net().eval().requires_grad_(False), fused_resnet.unfuse(Net()).eval().requires_grad_(False)
    torch.testing.assert_close(TRANSFORMS[transform](model), TRANSFORMS[transform](plain), rtol=1e-4, atol=1e-5)
    with fused_resnet.use("reference"), pytest.raises(fused_resnet.Unsupported, match="have no rules for torch.func"):
        TRANSFORMS[transform](model)


@IMPLS
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(impl, reentrant):
    model, eager = Net(), Net()
    with fused_resnet.use(impl):
        a = _step(lambda x: checkpoint(model, x, use_reentrant=reentrant), _x())
        b = _step(eager, _x())
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q)
    for p, q in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@IMPLS
def test_copies_and_meta(impl):
    model = Net().eval()
    with fused_resnet.use(impl):
        expected = model(_x())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(_x()), expected)
        assert model.to("meta").train()(_x().to("meta")).shape == (3, 4)


@IMPLS
def test_inference_mode_and_deterministic_algorithms(impl):
    model = Net().eval()
    expected = model(_x())
    torch.use_deterministic_algorithms(True)
    try:
        with fused_resnet.use(impl), torch.inference_mode():
            torch.testing.assert_close(model(_x()), expected, rtol=1e-4, atol=1e-5)
            model.train()(_x())
    finally:
        torch.use_deterministic_algorithms(False)
    assert model.blocks[0].bn1.num_batches_tracked == 1


@IMPLS
def test_weight_averaging_updates_batch_norm(impl):
    model, reference = Net(), fused_resnet.unfuse(Net())
    with fused_resnet.use(impl):
        for net in (model, reference):
            torch.optim.swa_utils.update_bn([_x(3), _x(4)], net)
    _assert_same_state(model, reference)


@IMPLS
def test_several_threads_choose_their_own_implementation(impl):
    import threading

    seen = {}

    def work():
        seen["inside"] = fused_resnet.current_impl()

    with fused_resnet.use(impl):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert fused_resnet.current_impl() == impl
    assert seen["inside"] == "auto"


@IMPLS
def test_graph_of_a_step_is_bit_equal_when_repeated(impl):
    results = []
    for _ in range(3):
        with fused_resnet.use(impl):
            model = Net()
            results.append([*_step(model, _x()), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
