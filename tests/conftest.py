"""Without a CUDA device the Triton kernels run in a strict interpreter, and tests marked ``gpu`` are skipped.

With one they are compiled, and tests marked ``interpreter``, of kernels on CPU tensors, are.
"""

import importlib.util
import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads it when a kernel is defined, so it has to be there before the first import of one.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        import harsh_interpreter

        harsh_interpreter.install()


def pytest_collection_modifyitems(items):
    wanted, reason = ("interpreter", "compiled kernels") if HAS_CUDA else ("gpu", "no CUDA device")
    for item in items:
        if wanted in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def poison():
    """Uninitialised memory holds NaN for the duration of the test."""
    from fused_resnet.testing import poisoned_allocations

    with poisoned_allocations():
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def device():
    return "cuda" if HAS_CUDA else "cpu"


def _convolutions_in(precision):
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = precision
    yield
    switch.fp32_precision = before


@pytest.fixture
def no_tf32():
    """fp32 convolutions in fp32, so that their error budget is that of fp32."""
    yield from _convolutions_in("ieee")


@pytest.fixture
def tf32():
    """fp32 convolutions on tensor cores."""
    yield from _convolutions_in("tf32")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """An empty folder in place of the plan tables that the package ships."""
    from fused_resnet import plan

    folder = tmp_path / "shipped"
    monkeypatch.setattr(plan, "PLANS", folder)
    plan.forget_tables()
    yield folder
    monkeypatch.undo()
    plan.forget_tables()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's folder of tuned plans."""
    monkeypatch.setenv("FUSED_RESNET_PLANS", str(tmp_path / "plans"))
    return tmp_path / "plans"
