"""A pretended H100: code for a CUDA device runs on CPU tensors, through PyTorch's own names and signatures.

What it asks of `torch.cuda` must be there under that name and take those arguments; a graph runs its body once, when it
is captured, and a replay does nothing. It says nothing about kernels or times.
"""

import inspect
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from fused_resnet import graphs, ops
from fused_resnet.kernels import native

_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 * 1024
)


def _here(value):
    """The CPU in place of a CUDA device."""
    if isinstance(value, (str, torch.device)) and str(value).startswith("cuda"):
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs = {name: _here(value) for name, value in kwargs.items()}
        return func(*map(_here, args), **kwargs)


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, _here(device))


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self): ...

    def elapsed_time(self, end):
        return (end.at - self.at) * 1000


class Stream:
    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class CUDAGraph:
    """`modes`: the error modes of all captures."""

    modes: list[str] = []

    def replay(self): ...

    def pool(self):
        return 0, 0


@contextmanager
def _graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    cuda_graph.modes.append(capture_error_mode)
    yield


_FUNCTIONS = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda: _PROPERTIES.name,
    "get_device_properties": lambda device: _PROPERTIES,
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda: None,
    "memory_allocated": lambda: 10,
    "memory_reserved": lambda: 12,
    "max_memory_allocated": lambda: 15,
    "current_stream": Stream,
    "get_rng_state": torch.get_rng_state,
    "set_rng_state": lambda state: None,
}


def _checked(name, value):
    """`value`, called with arguments that the function of that name takes."""
    signature = inspect.signature(getattr(torch.cuda, name))

    def call(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return value(*args, **kwargs)

    return call


@contextmanager
def pretended_card(patch):
    """`patch`: a MonkeyPatch, which undoes it."""
    for name, value in _FUNCTIONS.items():
        patch.setattr(torch.cuda, name, _checked(name, value))
    for value in (Event, Stream, CUDAGraph):
        patch.setattr(torch.cuda, value.__name__, value)
    patch.setattr(torch.cuda, "graph", _graph)
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    patch.setattr(torch.cuda, "device", lambda device: nullcontext())
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(CUDAGraph, "modes", [])
    patch.setattr(ops, "device_of", lambda x, impl: ops._cuda_device(0, False))
    patch.setattr(native, "unavailable", lambda: "not built")
    patch.setattr(graphs, "_check_cuda", lambda name, tensor: None)
    ops.forget_plans()
    with _OnCpu():
        yield
    ops.forget_plans()
