"""The contender over cuDNN's graphs, assembled on a stand-in for the library that computes them with PyTorch."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision

from benchmarks import cudnn_graphs
from benchmarks.baselines import Absent

TYPES = SimpleNamespace(BFLOAT16="bf16", HALF="fp16", FLOAT="fp32", BOOLEAN="bits")


class _Symbol:
    """A tensor of a graph: an input, or what `compute` gives."""

    def __init__(self, compute=None, dim=None, stride=None, data_type=None, is_pass_by_value=False):
        self.compute, self.dim, self.stride, self.kind = compute, dim, stride, data_type
        self.by_value, self.output, self.value = is_pass_by_value, False, None

    def set_output(self, output):
        self.output = output
        return self

    def set_data_type(self, kind):
        self.kind = kind
        return self

    def get(self):
        if self.value is None:
            self.value = self.compute()
        return self.value


class _Graph:
    """Computes in fp64 what its operations say. Their parameters have the names that the frontend gives them."""

    made = []

    def __init__(self, handle, io_data_type, intermediate_data_type, compute_data_type):
        assert handle == "handle" and (intermediate_data_type, compute_data_type) == ("fp32", "fp32")
        self.symbols, self.built, self.io = [], [], io_data_type
        self.made.append(self)

    def _add(self, *arguments, **keywords):
        self.symbols.append(_Symbol(*arguments, **keywords))
        return self.symbols[-1]

    def tensor(self, name, dim, stride, data_type, is_pass_by_value=False):
        return self._add(None, dim, stride, data_type, is_pass_by_value)

    def conv_fprop(self, image, weight, padding, stride, dilation):
        return self._add(lambda: F.conv2d(image.get(), weight.get(), None, stride, padding, dilation))

    def scale(self, input, scale):
        return self._add(lambda: input.get() * scale.get())

    def bias(self, input, bias):
        return self._add(lambda: input.get() + bias.get())

    def add(self, a, b):
        return self._add(lambda: a.get() + b.get())

    def relu(self, input):
        return self._add(lambda: input.get().relu())

    def cmp_gt(self, input, comparison):
        return self._add(lambda: input.get() > comparison.get())

    def batchnorm(self, input, scale, bias, in_running_mean, in_running_var, epsilon, momentum):
        def statistics():
            var, mean = torch.var_mean(input.get(), (0, 2, 3), correction=0, keepdim=True)
            return mean, (var + epsilon.get()).rsqrt()

        def running(old, new):
            return old.get() + momentum.get() * (new - old.get())

        def variance():
            return torch.var(input.get(), (0, 2, 3), keepdim=True)

        return (
            self._add(lambda: (input.get() - statistics()[0]) * statistics()[1] * scale.get() + bias.get()),
            self._add(lambda: statistics()[0]),
            self._add(lambda: statistics()[1]),
            self._add(lambda: running(in_running_mean, statistics()[0])),
            self._add(lambda: running(in_running_var, variance())),
        )

    def batchnorm_backward(self, grad, input, scale, mean, inv_variance):
        def sums():
            xhat = (input.get() - mean.get()) * inv_variance.get()
            g = grad.get()
            return xhat, (g * xhat).sum((0, 2, 3), keepdim=True), g.sum((0, 2, 3), keepdim=True)

        def dx():
            xhat, dgamma, dbeta = sums()
            count = xhat.numel() / xhat.shape[1]
            return scale.get() * inv_variance.get() * (grad.get() - dbeta / count - xhat * dgamma / count)

        return self._add(dx), self._add(lambda: sums()[1]), self._add(lambda: sums()[2])

    def validate(self):
        assert any(symbol.output for symbol in self.symbols)
        assert all(symbol.kind is not None for symbol in self.symbols if symbol.output or symbol.compute is None)

    def build_operation_graph(self):
        pass

    def create_execution_plans(self, heuristics):
        assert heuristics == ["A", "FALLBACK"]

    def get_execution_plan_count(self):
        return 2

    def build_plan_at_index(self, index):
        if index == 0:
            raise RuntimeError("this one is not supported")
        self.built.append(index)

    def get_workspace_size_plan_at_index(self, index):
        return 0

    def execute_plan_at_index(self, tensor_dict, workspace, index, handle):
        assert handle == "handle" and index in self.built and workspace.dtype == torch.uint8
        needed = {symbol for symbol in self.symbols if symbol.compute is None or symbol.output}
        assert set(tensor_dict) == needed and not any(tensor.requires_grad for tensor in tensor_dict.values())
        for symbol in self.symbols:
            symbol.value = None
        for symbol, tensor in tensor_dict.items():
            if symbol.compute is None:
                symbol.value = self._read(symbol, tensor)
        results = {symbol: symbol.get() for symbol in tensor_dict if symbol.compute is not None}
        for symbol, value in results.items():
            if symbol.kind == "bits":
                value = (value.permute(0, 2, 3, 1).reshape(-1, 8) * 2 ** torch.arange(8)).sum(1)
                tensor_dict[symbol].copy_(value.to(torch.uint8))
            else:
                assert value.shape == tensor_dict[symbol].shape
                tensor_dict[symbol].copy_(value)

    @staticmethod
    def _read(symbol, tensor):
        if symbol.kind == "bits":
            n, c, h, w = symbol.dim
            bits = tensor.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
            return bits.reshape(n, h, w, c).permute(0, 3, 1, 2).double()
        n, c, h, w = symbol.dim
        assert list(tensor.shape) == symbol.dim and symbol.stride == (
            [1] * 4 if symbol.by_value else [h * w * c, 1, w * c, c]
        )
        assert symbol.by_value or tensor.is_contiguous(memory_format=torch.channels_last)
        assert {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[symbol.kind] == tensor.dtype
        return tensor.double()


@pytest.fixture
def library(monkeypatch):
    fake = SimpleNamespace(
        pygraph=_Graph,
        data_type=TYPES,
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        create_handle=lambda: "handle",
        cudnnGraphNotSupportedError=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(_Graph, "made", [])
    return fake


def _model(name, training):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.train(training)


def _close(got, exact, low, factor=2):
    """Error against fp64 at most `factor` times PyTorch's own at that precision."""
    error, peer = (got.double() - exact).norm(), (low.double() - exact).norm()
    assert error <= factor * peer + 1e-6 * exact.norm(), (float(error), float(peer))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_inference_is_torchvisions(library, name):
    model, x = _model(name, False), torch.randn(2, 3, 64, 64)
    run = cudnn_graphs.network(model, torch.bfloat16)
    with torch.inference_mode():
        got, exact = run(x), copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        _close(got, exact, low)
        built = len(_Graph.made)
        run(x)
        assert len(_Graph.made) == built  # by shape, once
    assert built < sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) + 5
    assert {graph.io for graph in _Graph.made} == {"bf16"}


def test_training_step_is_torchvisions(library):
    model, x, target = _model("resnet18", True), torch.randn(4, 3, 64, 64), torch.tensor([1, 2, 3, 4])
    models = {name: copy.deepcopy(model) for name in ("got", "low", "exact")}
    models["exact"].double()
    logits = {"got": cudnn_graphs.network(models["got"], torch.bfloat16)(x), "exact": models["exact"](x.double())}
    with torch.autocast("cpu", torch.bfloat16):
        logits["low"] = models["low"](x)
    for value in logits.values():
        F.cross_entropy(value.double(), target).backward()
    _close(logits["got"], logits["exact"], logits["low"])
    for (name, p), low, exact in zip(
        models["got"].named_parameters(), models["low"].parameters(), models["exact"].parameters()
    ):
        assert p.grad is not None and p.grad.dtype == torch.float32, name
        _close(p.grad, exact.grad, low.grad, 3)


def test_running_statistics_follow(library):
    model, x = _model("resnet18", True), torch.randn(4, 3, 64, 64)
    other = copy.deepcopy(model)
    run = cudnn_graphs.network(model, torch.bfloat16)
    run(x)  # builds the graphs, which updates them more than once
    model.load_state_dict(other.state_dict())
    run(x)
    with torch.autocast("cpu", torch.bfloat16):
        other(x)
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers()):
        # Both run in bf16, whose rounding (0.004) adds up over the layers.
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02, msg=name)
    assert model.bn1.num_batches_tracked == 1


def test_what_it_cannot_run_is_absent(library, monkeypatch):
    with pytest.raises(Absent, match="bf16 and fp16, not torch.float32"):
        cudnn_graphs.network(_model("resnet18", False), torch.float32)
    with pytest.raises(Absent, match="one group"):
        cudnn_graphs.network(_model("resnext50_32x4d", False), torch.bfloat16)
    monkeypatch.setattr(_Graph, "get_execution_plan_count", lambda self: 1)
    with torch.inference_mode(), pytest.raises(Absent, match="no plan for a graph"):
        cudnn_graphs.network(_model("resnet18", False), torch.bfloat16)(torch.randn(1, 3, 32, 32))
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(Absent, match="nvidia-cudnn-frontend is not installed"):
        cudnn_graphs.network(_model("resnet18", False), torch.bfloat16)
