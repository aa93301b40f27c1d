"""Proof before speed: logits, loss and gradients of fused against torchvision, then both trained on real images; in
inference the logits.

Both networks have the same weights and see the same batch. It is smaller than the batch that is timed, but runs by the
same plans: the kernel, tile and scheme that were chosen for each problem of that one.

The judge is torchvision in float64, and the error of the fused network may be at most twice torchvision's own at the
same precision, plus rounding. A value that rounding carries over a ReLU's edge changes a gradient by far more than the
rounding itself, in either network, now and then. So both run several times on images that differ by about a rounding:
torchvision's worst run is the peer, the fused network's median run is judged, which a wrong kernel spoils and a rare
flip does not. The images are scikit-learn's bundled handwritten digits (8 x 8, ten classes), upscaled and repeated to
three channels: real, and no download.
"""

from __future__ import annotations

import copy
import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet
from fused_resnet import ops, plan, tuning
from fused_resnet.plan import Device, Measured, Problem
from fused_resnet.tracing import run_on_meta

from .baselines import DTYPES, Case, torchvision_model
from .tune import runs

STEPS = 20
BATCH = 16  # as divisible as the batches that are timed, so that the same compiled kernels run
_RUNS = 5
_LEARNING_RATE = 0.002
_CLASSES = 10


@dataclass(frozen=True)
class Check:
    """One compared quantity: relative errors (norm) against float64, the limit, and whether the fused one keeps it."""

    what: str
    error: float
    peer_error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass
class Parity:
    """Outcome for one network: the checks, and, in training, three loss curves on digits: fused, torchvision, and
    torchvision on images that differ by about a rounding, which shows how far apart two runs of a network drift."""

    model: str
    mode: str
    impl: str
    dtype: str
    checks: list[Check]
    losses_fused: list[float]
    losses_torchvision: list[float]
    losses_nudged: list[float]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict:
        """Plain values for a results file."""
        return {**asdict(self), "passed": self.passed}


def digits(count: int, size: int) -> tuple[Tensor, Tensor]:
    """The first `count` digits as images [count, 3, size, size] with mean 0 and deviation 1, and their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images[:count]).float().unsqueeze(1)
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    x = ((x - x.mean()) / x.std()).contiguous(memory_format=torch.channels_last)
    return x, torch.from_numpy(bunch.target[:count])


def plans_of(case: Case, impl: str, device: Device | None, graph: bool = False) -> dict[Problem, Measured]:
    """What to plan as (`tuning.planned_as`) for `BATCH` images to run by the plans of a case's batch; `graph`: by those
    of a CUDA graph. Nothing without a device. `Unsupported`: impl cannot run the case."""
    found: dict[Problem, Measured] = {}

    def note(problem: Problem, chosen: plan.Plan) -> None:
        if problem.op == plan.STAGE_OP:
            return  # a part of a stage has problems of its own
        problem = replace(problem, epilogue=problem.epilogue.removeprefix(plan.GRAPH))
        if problem.op not in plan.VECTOR_OPS and problem.h * problem.w > 1:  # n counts images
            problem = replace(problem, n=BATCH)
        backend = f"{chosen.backend} {chosen.scheme}".strip()
        found[problem] = Measured({"library": 1.0} | {backend: 0.5}, chosen.config, "the batch that is timed")

    if device is not None:
        ((model, x),) = runs([case.model], [case.batch], [case.dtype], [case.mode], case.size)
        with plan.use(impl), plan.replayed() if graph else nullcontext(), ops.record(note, device):
            run_on_meta(model, x)
    return found


def _relative(value: Tensor, judge: Tensor) -> float:
    return float((value.double() - judge).norm() / judge.norm().clamp(min=1e-30))


def _forward(model: nn.Module, x: Tensor, case: Case) -> Tensor:
    with nullcontext() if x.dtype == torch.float64 else case.autocast():
        return model(x)


def _forward_backward(model: nn.Module, x: Tensor, target: Tensor, case: Case, impl: str) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with fused_resnet.use(impl):
        logits = _forward(model, x, case)
        loss = F.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), target)
        loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"logits": logits.detach(), "loss": loss.detach(), "gradients": gradients}


@torch.no_grad()
def _infer(model: nn.Module, x: Tensor, target: Tensor, case: Case, impl: str) -> dict[str, Tensor]:
    with fused_resnet.use(impl):
        return {"logits": _forward(model, x, case)}


def _train(model: nn.Module, x: Tensor, target: Tensor, batch: int, case: Case, impl: str) -> list[float]:
    """SGD with momentum over consecutive batches; the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), _LEARNING_RATE, momentum=0.9)
    losses = []
    for step in range(STEPS):
        rows = slice(step * batch % len(x), step * batch % len(x) + batch)
        losses.append(float(_forward_backward(model, x[rows], target[rows], case, impl)["loss"]))
        optimizer.step()
    return losses


def _as_trained(model: nn.Module) -> None:
    """Statistics and parameters of every BatchNorm as if it had seen data."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for vector, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.0),
                (module.bias, -0.2, 0.2),
            ):
                nn.init.uniform_(vector, low, high)


def check(case: Case, impl: str, plans: dict[Problem, Measured] | None = None, device: Device | None = None) -> Parity:
    """Compare the case's network with torchvision's; nothing is timed. Images are case.size pixels wide, a batch has
    `BATCH`. plans: of `plans_of`, for that device."""
    torch.manual_seed(0)
    theirs = torchvision_model(case.model, num_classes=_CLASSES).to(case.device, memory_format=torch.channels_last)
    training = case.mode == "training"
    if not training:
        _as_trained(theirs)
    ours = getattr(fused_resnet, case.model)(num_classes=_CLASSES).to(case.device, memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    judge = copy.deepcopy(theirs).double()
    for model in (theirs, ours, judge):
        model.train(training)
    with nullcontext() if device is None else tuning.planned_as(device, plans or {}):
        return _compare(case, impl, ours, theirs, judge, training)


def _compare(case: Case, impl: str, ours: nn.Module, theirs: nn.Module, judge: nn.Module, training: bool) -> Parity:
    x, target = (t.to(case.device) for t in digits(BATCH * STEPS if training else BATCH, case.size))
    eps = torch.finfo(DTYPES[case.dtype]).eps
    first, labels = x[:BATCH], target[:BATCH]
    run = _forward_backward if training else _infer
    exact = run(judge, first.double(), labels, case, "auto")
    nudged = [first * (1 + eps * i * torch.randn_like(first)) for i in range(_RUNS)]
    mine = [run(ours, images, labels, case, impl) for images in nudged]
    peers = [run(theirs, images, labels, case, "auto") for images in nudged]
    checks = []
    for what, value in exact.items():
        error = statistics.median(_relative(result[what], value) for result in mine)
        peer = max(_relative(result[what], value) for result in peers)
        checks.append(Check(what, error, peer, 2 * (peer + eps)))
    if not training:
        return Parity(case.model, case.mode, impl, case.dtype, checks, [], [], [])
    start = copy.deepcopy(judge.float().state_dict())
    curves = []
    for model, images, used in (
        (ours, x, impl),
        (theirs, x, "auto"),
        (judge, x * (1 + eps * torch.randn_like(x)), "auto"),
    ):
        model.load_state_dict(start)
        curves.append(_train(model, images, target, BATCH, case, used))
    gap, peer_gap = (
        statistics.median(abs(a - b) for a, b in zip(curves[1], curve)) for curve in (curves[0], curves[2])
    )
    # Training amplifies rounding, each run's in its own direction: a tenth of a nat is the same curve.
    checks.append(Check(f"loss curve, {STEPS} steps", gap, peer_gap, 2 * peer_gap + 0.1))
    return Parity(case.model, case.mode, impl, case.dtype, checks, *curves)
