"""Every operator on trial: random arguments for a Problem, and the error budget that an implementation must keep.

A kernel is right when its error against float64 is at most twice that of plain PyTorch at the same precision, plus
rounding; a fixed tolerance would either hide a loss of precision or fail on honest rounding.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from . import reference
from .plan import Problem
from .reference import Deferred, Frozen, Geometry, Gradient, Running, bn_act_pool, merge_partials, pack_mask


def random_weight(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """A convolution weight [N, K, R, S] with He scaling, in channels_last memory."""
    fan_in = shape[1] * shape[2] * shape[3]
    w = torch.randn(shape, generator=generator, dtype=torch.float64) * (2.0 / fan_in) ** 0.5
    return w.to(device, dtype).contiguous(memory_format=torch.channels_last)


def random_affine(channels: int, generator: torch.Generator, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """gamma and beta [C], fp32, with a negative and a zero gamma among them."""
    gamma = torch.randn(channels, generator=generator) * 0.5 + 1
    gamma[0] = -0.7
    gamma[channels // 2] = 0.0
    return gamma.to(device), torch.randn(channels, generator=generator).to(device)


def random_frozen(channels: int, generator: torch.Generator, device: str = "cpu", eps: float = 1e-5) -> Frozen:
    """Running statistics and parameters of a BatchNorm, fp32 [C], with a negative and a zero gamma among them."""
    mean = torch.randn(channels, generator=generator).to(device)
    var = torch.rand(channels, generator=generator).to(device) * 1.5 + 0.5
    return Frozen(mean, var, *random_affine(channels, generator, device), eps)


def assert_within_budget(got: Tensor, ref64: Tensor, lowprec: Tensor, what: str = "result") -> None:
    """Assert error(got) <= 2 * (error(lowprec) + rounding), errors against ``ref64``, in maximum and in norm.

    ``lowprec`` is plain PyTorch's answer at the precision of the kernel. Rounding is one unit of got's dtype at the
    size of the reference. For maps [N, C, H, W] the border pixels are checked once more on their own, where a mistake
    in padding would drown among the interior.
    """
    # Raised, not asserted: tuning rests on it, under `python -O` too.
    if got.shape != ref64.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(ref64.shape)}")
    if not torch.isfinite(got).all():
        raise AssertionError(f"{what}: {(~torch.isfinite(got)).sum()} values are not finite")
    regions = [("", (...,))]
    if got.dim() == 4 and min(got.shape[2:]) > 2:
        edges = ((..., 0, slice(None)), (..., -1, slice(None)), (..., 0), (..., -1))
        regions += [(f" at border {i}", edge) for i, edge in enumerate(edges)]
    eps = torch.finfo(got.dtype).eps
    for where, index in regions:
        ref = ref64[index].double()
        error, peer = got[index].double() - ref, lowprec[index].double() - ref
        for name, size in (("maximum", lambda t: t.abs().max()), ("norm", torch.linalg.vector_norm)):
            limit = 2 * (size(peer) + eps * size(ref))
            if not size(error) <= limit:
                raise AssertionError(f"{what}{where}: {name} error {size(error):.3e}, limit {limit:.3e}")


def operator_arguments(problem: Problem, generator: torch.Generator, device: str = "cuda") -> tuple:
    """Random arguments of the operator's reference and launch function, with the shapes that `problem` stands for.

    Activations have correlated channels with means of their own, BatchNorm vectors come from them, gradients are
    random, masks have every kind of byte. Optional arguments are those of the residual blocks (`autograd`). On "meta"
    there are shapes alone. Raises ValueError for an operator without a recipe.
    """
    make = _Samples(problem, generator, device)
    recipe = getattr(make, problem.op, None)
    if recipe is None:
        raise ValueError(f"no recipe for the arguments of {problem.op}")
    return recipe()


class _Samples:
    """One method per operator: its arguments, in the order of `reference`."""

    def __init__(self, problem: Problem, generator: torch.Generator, device: str) -> None:
        self.p, self.generator, self.device = problem, generator, device
        self.dtype = getattr(torch, problem.dtype)
        self.geometry = Geometry(problem.stride, problem.padding, problem.dilation, problem.groups)
        self.input = problem.n, problem.c, problem.h, problem.w
        self.output = problem.n, problem.k, *problem.out_hw

    def _map(self, shape: tuple[int, ...]) -> Tensor:
        """Drawn on the device: a map of 200 million values would take a CPU minutes."""
        n, c, h, w = shape
        seed = int(torch.randint(2**31, (), generator=self.generator))
        device_generator = None if self.device == "meta" else torch.Generator(self.device).manual_seed(seed)
        rows = torch.randn(n * h * w, c + 1, generator=device_generator, device=self.device)
        means = torch.randn(c, generator=device_generator, device=self.device) * 0.5 + 0.5
        values = (rows[:, :c] + rows[:, c:]) * 0.7 + means
        return values.to(self.dtype).view(n, h, w, c).permute(0, 3, 1, 2)

    def _bn(self, c: Tensor) -> Tensor:
        var, mean = torch.var_mean(c.float(), (0, 2, 3), correction=0)
        gamma, beta = random_affine(c.shape[1], self.generator, self.device)
        rstd = (var + 1e-5).rsqrt()
        inv_count = torch.full_like(mean, c.shape[1] / c.numel())
        return torch.stack((mean, rstd, gamma * rstd, beta - mean * gamma * rstd, inv_count))

    def _vectors(self, channels: int) -> Tensor:
        """bn [5, C] of an output that is not there."""
        mean = torch.randn(channels, generator=self.generator)
        rstd = torch.rand(channels, generator=self.generator) + 0.5
        gamma, beta = random_affine(channels, self.generator)
        inv_count = torch.full_like(mean, 1 / (self.p.n * self.p.h * self.p.w))
        return torch.stack((mean, rstd, gamma * rstd, beta - mean * gamma * rstd, inv_count)).to(self.device)

    def _deferred(self, shape: tuple[int, ...], bn: bool = True) -> Deferred:
        c = self._map(shape)
        return Deferred(c, self._bn(c) if bn else None)

    def _weight(self, k: int, c: int, r: int = 1, s: int = 1) -> Tensor:
        return random_weight((k, c, r, s), self.dtype, self.generator, self.device)

    def _mask(self, shape: tuple[int, ...]) -> Tensor:
        return pack_mask(self._map(shape) > 0.5)

    def _coef(self, channels: int) -> Tensor:
        return torch.randn(3, channels, generator=self.generator).mul_(0.5).to(self.device)

    def _conv_weight(self) -> Tensor:
        return self._weight(self.p.k, self.p.c // self.p.groups, self.p.r, self.p.s)

    def conv_stats(self):
        return self._deferred(self.input, self.p.prologue), self._conv_weight(), self.geometry

    def conv_affine(self):
        residual = self._map(self.output) if self.p.epilogue.endswith("+residual") else None
        frozen = random_frozen(self.p.k, self.generator, self.device)
        return self._map(self.input), self._conv_weight(), frozen, residual, True, self.geometry

    def conv_affine_pool(self):
        frozen = random_frozen(self.p.k, self.generator, self.device)
        return self._map(self.input), self._conv_weight(), frozen, self.geometry

    def bottleneck_affine(self):
        c, k = self.p.c, self.p.k
        weights = [self._weight(k, c), self._weight(k, k // self.p.groups, self.p.r, self.p.s), self._weight(4 * k, k)]
        if self.p.epilogue == "projection":
            weights.append(self._weight(4 * k, c))
        frozen = tuple(random_frozen(w.shape[0], self.generator, self.device) for w in weights)
        return self._map(self.input), tuple(weights), frozen, self.geometry

    def conv1x1_join(self):
        a, w, bn = (
            self._deferred(self.input, self.p.prologue),
            self._weight(self.p.k, self.p.c),
            self._vectors(self.p.k),
        )
        if self.p.epilogue == "join":
            return a, w, bn, self._map(self.output), None, None, 1
        stride = self.p.stride[0]
        shortcut = self._map((self.p.n, self.p.side, self.p.h * stride, self.p.w * stride))
        return a, w, bn, shortcut, self._weight(self.p.k, self.p.side), self._vectors(self.p.k), stride

    def _partials(self, kinds: int) -> Tensor:
        rows = torch.rand(self.p.n, kinds, self.p.c, generator=self.generator) + 0.5
        if kinds == 3:
            rows[:, 0] = torch.randint(1, 300, (self.p.n, 1), generator=self.generator).float()
        return rows.to(self.device)

    def bn_finalize(self):
        gamma, beta = random_affine(self.p.c, self.generator, self.device)
        counter = torch.zeros((), dtype=torch.int64, device=self.device)
        running = Running(torch.zeros(self.p.c, device=self.device), torch.ones(self.p.c, device=self.device), counter)
        return self._partials(3), gamma, beta, running, 0.1, 1e-5

    def merge_partials(self):
        return (self._partials(3),)

    def bn_frozen(self):
        return tuple(random_frozen(self.p.c, self.generator, self.device))

    def bn_act(self):
        return self._deferred(self.input), True

    def bn_join(self):
        return self._deferred(self.input), Deferred(self._map(self.input), None)

    def bn_act_pool(self):
        return (self._deferred(self.input),)

    def moments(self):
        return self._deferred(self.input, self.p.prologue), self.p.stride[0]

    def bn_act_sums(self):
        return self._map(self.input), self._deferred(self.input)

    def join_sums(self):
        return self._map(self.input), self._mask(self.input), self._deferred(self.input), Deferred(None, None)

    def relu_grad(self):
        return self._map(self.input), self._mask(self.input)

    def bn_backward_finalize(self):
        return self._partials(2), self._vectors(self.p.c), None

    def bn_backward_apply(self):
        return (Gradient(self._map(self.input), None, self._map(self.input), self._coef(self.p.c)),)

    def conv_dgrad(self):
        g = Gradient(self._map(self.input))
        if self.p.prologue:
            g = Gradient(g.g, None, self._map(self.input), self._coef(self.p.c))
        relu_of = self._deferred(self.output) if "relu" in self.p.epilogue else None
        addend = Gradient(self._map(self.output), self._mask(self.output)) if "add" in self.p.epilogue else None
        # The weight of the forward convolution: from the k channels of the result to the c of the gradient.
        w = self._weight(self.p.c, self.p.k // self.p.groups, self.p.r, self.p.s)
        return g, w, self.geometry, self.output[2:], relu_of, addend, 1

    def conv_wgrad(self):
        a, g = self._deferred(self.input, self.p.prologue), Gradient(self._map(self.output))
        shape = self.p.r, self.p.s, self.p.stride, self.p.padding, self.p.groups
        if shape == (1, 1, (1, 1), (0, 0), 1):  # a matrix product, which reads it deferred
            g = Gradient(g.g, None, self._map(self.output), self._coef(self.p.k))
        return a, g, (self.p.k, self.p.c // self.p.groups, self.p.r, self.p.s), self.geometry

    def cross_moments(self):
        stride = self.p.stride[0]
        g = (self.p.n, self.p.k, -(-self.p.h // stride), -(-self.p.w // stride))
        return self._deferred(self.input, self.p.prologue), self._map(g), self._mask(g), stride

    def conv1x1_dgrad_moments(self):
        k, n, stride = self.p.c, self.p.k, self.p.stride[0]
        shape = (self.p.n, n, -(-self.p.h // stride), -(-self.p.w // stride))
        w_g, w_a = self._weight(n, k).flatten(1), self._weight(k, k).flatten(1)
        w_1 = torch.randn(k, generator=self.generator).to(self.device)
        return self._map(shape), self._mask(shape), w_g, self._deferred(self.input, self.p.prologue), w_a, w_1, stride

    def bn_act_pool_backward(self):
        a = self._deferred(self.input)
        n, c, h, w = self.input
        shape = (n, c, (h + 1) // 2, (w + 1) // 2)
        _, index = bn_act_pool(a)
        return self._map(shape), index, a

    def _moment_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """w [N, K, 1, 1] and, of random a and g, gram [K+1, K+1] and cross [K+1, N]."""
        k, n = self.p.c, self.p.n
        a = torch.rand(2 * k + 64, k, generator=self.generator, dtype=torch.float64) + 0.25
        a = torch.cat((a, torch.ones(a.shape[0], 1, dtype=torch.float64)), 1)
        g = torch.randn(a.shape[0], n, generator=self.generator, dtype=torch.float64)
        return self._weight(n, k), (a.T @ a).to(self.device), (a.T @ g).to(self.device)

    def moments_finalize(self):
        w, gram, _ = self._moment_inputs()
        gamma, beta = random_affine(self.p.n, self.generator, self.device)
        counter = torch.zeros((), dtype=torch.int64, device=self.device)
        running = Running(torch.zeros(self.p.n, device=self.device), torch.ones(self.p.n, device=self.device), counter)
        return gram, w, gamma, beta, running, 0.1, 1e-5

    def cross_sums(self):
        w, _, cross = self._moment_inputs()
        return cross, w, self._vectors(self.p.n)

    def moments_weights(self):
        w, gram, cross = self._moment_inputs()
        return cross, gram, w, self._coef(self.p.n)


def as_double(value):
    """The same arguments in float64: every floating tensor inside nested tuples; what is updated in place is cloned."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, tuple):
        items = [as_double(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


_STATISTICS = {
    "conv_stats": 1,
    "bn_act_sums": 1,
    "conv_dgrad": 1,
    "conv1x1_dgrad_moments": 1,
    "bn_act_pool_backward": 1,
}


def comparable(op: str, result) -> list[Tensor]:
    """An operator's floating results, with partial statistics and sums merged: each backend chunks its own way."""
    results = list(result) if isinstance(result, tuple) else [result]
    for i, value in enumerate(results):
        if op == "conv_stats" and i == 1:
            results[i] = merge_partials(value)
        elif op == "join_sums" or _STATISTICS.get(op) == i:
            results[i] = None if value is None else value.sum(0)
    return [value for value in results if value is not None and value.is_floating_point()]


class Trial:
    """Random arguments of one operator with two answers: the reference's in float64, the judge, and the reference's at
    the same precision, the peer."""

    def __init__(self, problem: Problem, generator: torch.Generator, device: str) -> None:
        function = getattr(reference, problem.op)
        self.op, self._arguments = problem.op, operator_arguments(problem, generator, device)
        self._judge = comparable(self.op, function(*as_double(self._arguments)))
        self._peer = comparable(self.op, function(*copy.deepcopy(self._arguments)))

    def check(self, run) -> None:
        """AssertionError unless `run`, a launch function bound to its plan, keeps the error budget."""
        got = comparable(self.op, run(*copy.deepcopy(self._arguments)))
        if len(got) != len(self._judge):
            raise AssertionError(f"{self.op}: {len(got)} results, expected {len(self._judge)}")
        for i, (value, exact, low) in enumerate(zip(got, self._judge, self._peer)):
            if value.dtype == torch.float64:
                value = value.float()  # moments are kept in fp64 as they cancel later; products are added up in fp32
            assert_within_budget(value, exact, low, f"{self.op} result {i}")


def check_operator(problem: Problem, run, generator: torch.Generator, device: str) -> None:
    """A `Trial` of one implementation."""
    Trial(problem, generator, device).check(run)
