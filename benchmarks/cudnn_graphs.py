"""cuDNN's own fused graphs as a contender: a torchvision ResNet through `nvidia-cudnn-frontend`.

Inference: convolution, scale, bias, residual add and ReLU are one graph. BatchNorm's running statistics become fp32
vectors, scale = gamma / sqrt(var + eps) and bias = beta - mean scale; weights stay what they are.
Training: BatchNorm with batch statistics, residual add, ReLU and its 1-bit mask are one graph, and so is their backward
(He et al. 2015, figure 5: behind each convolution). Convolutions and their gradients are PyTorch's, which are cuDNN's.

Of a graph's first plans, in the order of cuDNN's heuristic, the fastest is used. 16 bit and one group only. The graphs
were seen to build for an H100 (cuDNN 9.19, frontend 1.32), and their assembly is tested against torchvision with a
stand-in for the library; **they have not run on a GPU yet, and nothing here is measured**.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .environment import Absent
from .timing import seconds

_PLANS = 3
_BITS = "mask"  # the name of packed booleans, one bit a value


def _load() -> ModuleType:
    try:
        import cudnn
    except ImportError as error:
        raise Absent(f"nvidia-cudnn-frontend is not installed: {error}") from error
    return cudnn


class Graph:
    """A built graph, called with PyTorch tensors under the names that it was assembled with.

    `assemble(pygraph, symbols)` states the operations on the symbols of `inputs` and returns the outputs' by name;
    `outputs` are buffers like those of later calls. `values`: numbers that are fixed, passed by value.
    """

    def __init__(
        self,
        library: Library,
        assemble: Callable,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        values: dict[str, float],
    ) -> None:
        cudnn = library.cudnn
        kinds = cudnn.data_type
        self.handle, types = library.handle, {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}
        io = types[inputs["x"].dtype]
        graph = library.graph(io_data_type=io, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT)
        symbols = {}
        for name, tensor in inputs.items():
            bits = name == _BITS
            n, c, h, w = inputs["x"].shape if bits else tensor.shape
            kind = kinds.BOOLEAN if bits else types.get(tensor.dtype, kinds.FLOAT)
            # Spelled out, for PyTorch's strides of an extent 1 are arbitrary.
            stride = [h * w * c, 1, w * c, c]
            symbols[name] = graph.tensor(name=name, dim=[n, c, h, w], stride=stride, data_type=kind)
        one = {"dim": [1] * 4, "stride": [1] * 4, "data_type": kinds.FLOAT, "is_pass_by_value": True}
        symbols |= {name: graph.tensor(name=name, **one) for name in values}
        for name, symbol in assemble(graph, symbols).items():
            kind = kinds.BOOLEAN if name == _BITS else types.get(outputs[name].dtype, kinds.FLOAT)
            symbol.set_output(True).set_data_type(kind)
            symbols[name] = symbol
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self._graph, self._symbols = graph, symbols
        self._values = {name: torch.full((1, 1, 1, 1), value) for name, value in values.items()}
        self._choose(library, {**inputs, **outputs})

    def _choose(self, library: Library, tensors: dict[str, Tensor]) -> None:
        times = {}
        device = tensors["x"].device
        for index in range(min(_PLANS, self._graph.get_execution_plan_count())):
            try:
                self._graph.build_plan_at_index(index)
            except library.cudnn.cudnnGraphNotSupportedError:
                continue
            size = self._graph.get_workspace_size_plan_at_index(index)
            self._index, self._workspace = index, torch.empty(max(1, size), dtype=torch.uint8, device=device)
            self(tensors)
            times[min(seconds(partial(self, tensors), device.type) for _ in range(3))] = index, self._workspace
        if not times:
            raise Absent("cuDNN has no plan for a graph of this network")
        self._index, self._workspace = times[min(times)]

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        """Compute the outputs into their buffers, on the current stream."""
        # Detached, for older frontends go through DLPack, which refuses tensors that need gradients.
        pack = {self._symbols[name]: tensor.detach() for name, tensor in (tensors | self._values).items()}
        self._graph.execute_plan_at_index(pack, self._workspace, self._index, handle=self.handle)


class Library:
    """The frontend, a handle, and the graphs built so far by what they compute on which shapes."""

    def __init__(self) -> None:
        self.cudnn = _load()
        self.handle = self.cudnn.create_handle()
        self._graphs: dict[tuple, Graph] = {}

    def graph(self, **types):
        """An empty graph."""
        return self.cudnn.pygraph(handle=self.handle, **types)

    def run(
        self,
        assemble: Callable,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        values: dict[str, float] | None = None,
        **options,
    ) -> None:
        """Run `assemble(graph, symbols, **options)`, building it when it is new."""
        values = values or {}
        shapes = tuple((name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in inputs.items())
        key = assemble, shapes, tuple(values.items()), tuple(options.items())
        if inputs["x"].is_cuda:
            self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        if key not in self._graphs:
            self._graphs[key] = Graph(self, partial(assemble, **options), inputs, outputs, values)
        self._graphs[key]({**inputs, **outputs})


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


# Inference


def conv_affine_graph(graph, t: dict, padding, stride, dilation, relu: bool) -> dict:
    """y = relu?(conv(x, w) * scale + bias (+ side))."""
    y = graph.conv_fprop(image=t["x"], weight=t["w"], padding=padding, stride=stride, dilation=dilation)
    y = graph.bias(input=graph.scale(input=y, scale=t["scale"]), bias=t["bias"])
    if "side" in t:
        y = graph.add(a=y, b=t["side"])
    return {"y": graph.relu(input=y) if relu else y}


class Inference:
    """The unit (convolution, BatchNorm, what follows) of a network in eval mode."""

    def __init__(self, library: Library) -> None:
        self._library, self._folded = library, {}

    def _fold(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if conv not in self._folded:
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
            w = conv.weight.to(dtype, memory_format=torch.channels_last)
            self._folded[conv] = w, _column(scale), _column(bn.bias - bn.running_mean * scale)
        return self._folded[conv]

    def __call__(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, side: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        w, scale, bias = self._fold(conv, bn, x.dtype)
        h, w_out = (
            (extent + 2 * pad - dilation * (taps - 1) - 1) // step + 1
            for extent, pad, dilation, taps, step in zip(
                x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride
            )
        )
        y = torch.empty(
            (x.shape[0], conv.out_channels, h, w_out), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        inputs = {"x": x, "w": w, "scale": scale, "bias": bias} | ({} if side is None else {"side": side})
        geometry = {"padding": conv.padding, "stride": conv.stride, "dilation": conv.dilation}
        self._library.run(conv_affine_graph, inputs, {"y": y}, **geometry, relu=relu)
        return y


# Training


def norm_graph(graph, t: dict, relu: bool) -> dict:
    """y = relu?(BN(x) (+ side)) with batch statistics, the statistics, new running ones, and the bits of y > 0."""
    names = {"input": "x", "scale": "gamma", "bias": "beta", "in_running_mean": "mean", "in_running_var": "var"}
    ports = {port: t[name] for port, name in names.items()}
    y, mean, rstd, next_mean, next_var = graph.batchnorm(**ports, epsilon=t["eps"], momentum=t["momentum"])
    outputs = {"batch_mean": mean, "rstd": rstd, "next_mean": next_mean, "next_var": next_var}
    if "side" in t:
        y = graph.add(a=y, b=t["side"])
    if relu:
        y = graph.relu(input=y)
        outputs[_BITS] = graph.cmp_gt(input=y, comparison=t["zero"])
    return {"y": y, **outputs}


def norm_backward_graph(graph, t: dict, kind, side: bool) -> dict:
    """g = dy where the bits are set, which is the gradient of `side`; the gradients of x, gamma and beta from it."""
    g, outputs = t["dy"], {}
    if _BITS in t:
        g = graph.scale(input=g, scale=t[_BITS]).set_data_type(kind)
        if side:
            outputs["g"] = g
    ports = {"input": t["x"], "scale": t["gamma"], "mean": t["batch_mean"], "inv_variance": t["rstd"]}
    dx, dgamma, dbeta = graph.batchnorm_backward(grad=g, **ports)
    return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta, **outputs}


class _Norm(torch.autograd.Function):
    """relu?(BN(x) (+ side)) and its backward, a graph each."""

    @staticmethod
    def forward(ctx, library, bn, relu, x, side, gamma, beta):
        y, statistics = torch.empty_like(x), {name: torch.empty_like(_column(gamma)) for name in ("batch_mean", "rstd")}
        mean, var = _column(bn.running_mean), _column(bn.running_var)
        inputs = {"x": x, "gamma": _column(gamma), "beta": _column(beta), "mean": mean, "var": var}
        outputs = {"y": y, **statistics, "next_mean": mean, "next_var": var}
        if relu:
            inputs["zero"] = x.new_zeros(1, 1, 1, 1)
            outputs[_BITS] = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
        if side is not None:
            inputs["side"] = side
        values = {"eps": bn.eps, "momentum": bn.momentum}
        library.run(norm_graph, inputs, outputs, values, relu=relu)
        ctx.save_for_backward(x, gamma, *statistics.values(), outputs.get(_BITS))
        ctx.library, ctx.side = library, side is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gamma, batch_mean, rstd, bits = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        inputs = {"x": x, "dy": dy, "gamma": _column(gamma), "batch_mean": batch_mean, "rstd": rstd}
        inputs |= {} if bits is None else {_BITS: bits}
        dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(rstd), torch.empty_like(rstd)
        outputs = {"dx": dx, "dgamma": dgamma, "dbeta": dbeta} | ({"g": torch.empty_like(x)} if ctx.side else {})
        kinds = ctx.library.cudnn.data_type
        kind = kinds.BFLOAT16 if x.dtype == torch.bfloat16 else kinds.HALF
        ctx.library.run(norm_backward_graph, inputs, outputs, kind=kind, side=ctx.side)
        return None, None, None, dx, outputs.get("g"), dgamma.flatten(), dbeta.flatten()


class Training:
    """The unit of a network in training mode."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def __call__(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, side: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        c = F.conv2d(x, conv.weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation)
        bn.num_batches_tracked.add_(1)
        return _Norm.apply(self._library, bn, relu, c, side, bn.weight, bn.bias)


# Both


def _block(block: nn.Module, x: Tensor, unit: Callable) -> Tensor:
    names = [name for name in ("1", "2", "3") if hasattr(block, f"conv{name}")]
    *inner, last = [(getattr(block, f"conv{name}"), getattr(block, f"bn{name}")) for name in names]
    side = x if block.downsample is None else unit(*block.downsample, x, relu=False)
    for conv, bn in inner:
        x = unit(conv, bn, x)
    return unit(*last, x, side)


def network(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The forward of a torchvision ResNet over cuDNN's graphs; `Absent` if they cannot run it.

    It takes images [N, 3, H, W] and gives logits; in training mode gradients reach the model's parameters.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise Absent(f"cuDNN's fused graphs here are for bf16 and fp16, not {dtype}")
    if any(conv.groups != 1 for conv in model.modules() if isinstance(conv, nn.Conv2d)):
        raise Absent("cuDNN's fused graphs here have one group")
    unit = (Training if model.training else Inference)(Library())

    def forward(images: Tensor) -> Tensor:
        x = unit(model.conv1, model.bn1, images.to(dtype, memory_format=torch.channels_last))
        x = model.maxpool(x)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                x = _block(block, x, unit)
        x = torch.flatten(model.avgpool(x), 1)
        return F.linear(x, model.fc.weight.to(dtype), model.fc.bias.to(dtype))

    return forward
