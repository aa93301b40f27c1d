"""The problems of every layer of every model of the ResNet family, stated without running a model."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .problem import Problem, statistics_rows

# name -> (bottleneck?, blocks per stage, groups, channels per group in the first stage)
_MODELS = {
    "resnet18": (False, (2, 2, 2, 2), 1, 64),
    "resnet34": (False, (3, 4, 6, 3), 1, 64),
    "resnet50": (True, (3, 4, 6, 3), 1, 64),
    "resnet101": (True, (3, 4, 23, 3), 1, 64),
    "resnet152": (True, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": (True, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": (True, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (True, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": (True, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": (True, (3, 4, 23, 3), 1, 128),
}
MODELS = tuple(_MODELS)


class _Conv(NamedTuple):
    """One convolution of a model: its name and shape, and the Problems of the operators around it."""

    layer: str
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 1
    stride: int = 1
    groups: int = 1
    dtype: str = "bfloat16"

    def problem(self, op: str, prologue: bool = False, epilogue: str = "") -> Problem:
        """Of an operator that reads the convolution's input and its weight."""
        return Problem(
            op,
            *(self.n, self.h, self.w, self.c, self.k, self.r, self.r),
            stride=(self.stride, self.stride),
            padding=(self.r // 2, self.r // 2),
            groups=self.groups,
            dtype=self.dtype,
            prologue=prologue,
            epilogue=epilogue,
        )

    def output(self, op: str) -> Problem:
        """Of an elementwise operator on the convolution's output."""
        return Problem(op, self.n, *self.problem("").out_hw, self.k, self.k, dtype=self.dtype)

    @property
    def plain(self) -> bool:
        """A matrix product: its operators can read deferred tensors."""
        return self.r == 1 and self.stride == 1

    def dgrad(self, epilogue: str) -> Problem:
        """Of the input gradient, whose first tensor is the gradient of the output: K channels in, C out.

        That of a strided 1x1 is computed on the pixels it has read, as if they were the whole map.
        """
        p, q = self.problem("").out_hw
        stride = 1 if self.r == 1 else self.stride
        problem = self.problem("conv_dgrad", self.plain, epilogue)
        return replace(problem, h=p, w=q, c=self.k, k=self.c, stride=(stride, stride))

    def vectors(self, op: str, kinds: int) -> Problem:
        """Of an operator on the partial statistics [T, kinds, K] of the output."""
        return Problem(op, statistics_rows(self.k), kinds, 1, self.k, self.k, dtype="float32")

    def matrix(self, op: str) -> Problem:
        """Of an operator whose first tensor is the weight [K, C, 1, 1]."""
        return Problem(op, self.k, 1, 1, self.c, self.c, dtype=self.dtype)

    def moments(self) -> Problem:
        stride = (self.stride, self.stride)
        return Problem("moments", self.n, self.h, self.w, self.c, self.c, stride=stride, dtype=self.dtype)


def model_problems(
    arch_name: str, batch: int, size: int, training: bool, dtype: str = "bfloat16"
) -> list[tuple[str, Problem]]:
    """Every problem of every layer of a ResNet, as (layer name, Problem).

    Where the package has two ways through a layer (a bottleneck's last convolution from moments or from epilogue
    statistics, a downsample inside the join or before it) both are listed, so that plans exist for either. The same
    Problem comes back for every block of a stage. ``size`` is the height and width of the image in pixels. KeyError:
    not one of `MODELS`.
    """
    bottleneck, depths, groups, width_per_group = _MODELS[arch_name]
    expansion = 4 if bottleneck else 1
    stem = _Conv("conv1", batch, size, size, 3, 64, 7, 2, dtype=dtype)
    problems = _stem_problems(stem, training)
    hw = (stem.problem("").out_hw[0] - 1) // 2 + 1
    channels = 64
    for stage, depth in enumerate(depths):
        planes = 64 << stage
        width = planes * width_per_group // 64 * groups
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            name = f"layer{stage + 1}.{index}"
            down = None
            if stride != 1 or channels != planes * expansion:
                down = _Conv(
                    f"{name}.downsample.0", batch, hw, hw, channels, planes * expansion, 1, stride, dtype=dtype
                )
            convs = [_Conv(f"{name}.conv1", batch, hw, hw, channels, planes, 3, stride, dtype=dtype)]
            out = (hw - 1) // stride + 1
            if bottleneck:
                convs = [
                    _Conv(f"{name}.conv1", batch, hw, hw, channels, width, dtype=dtype),
                    _Conv(f"{name}.conv2", batch, hw, hw, width, width, 3, stride, groups, dtype=dtype),
                    _Conv(f"{name}.conv3", batch, out, out, width, planes * 4, dtype=dtype),
                ]
            else:
                convs.append(_Conv(f"{name}.conv2", batch, out, out, planes, planes, 3, dtype=dtype))
            block = _training_problems if training else _inference_problems
            problems += block(convs, down)
            channels, hw = planes * expansion, out
    return problems


def _stem_problems(stem: _Conv, training: bool) -> list[tuple[str, Problem]]:
    if not training:
        # The second for a stem whose pool is another one.
        pooled, plain = (stem.problem(op, epilogue="affine") for op in ("conv_affine_pool", "conv_affine"))
        return [(stem.layer, pooled), (stem.layer, plain)]
    problems = [
        stem.problem("conv_stats", epilogue="stats"),
        stem.vectors("bn_finalize", 3),
        stem.output("bn_act_pool"),
        stem.output("bn_act_pool_backward"),
        stem.vectors("bn_backward_finalize", 2),
        stem.output("bn_backward_apply"),
        stem.problem("conv_wgrad"),
    ]
    return [(stem.layer, problem) for problem in problems]


def _join(last: _Conv, down: _Conv | None, prologue: bool) -> Problem:
    if down is None:
        return last.problem("conv1x1_join", prologue, "join")
    stride = (down.stride, down.stride)
    return replace(last.problem("conv1x1_join", prologue, "join_downsample"), stride=stride, side=down.c)


def _inference_problems(convs: list[_Conv], down: _Conv | None) -> list[tuple[str, Problem]]:
    problems = []
    for conv in [*convs, *filter(None, [down])]:
        problems.append((conv.layer, conv.problem("conv_affine", epilogue="affine")))
    last = convs[-1]
    problems.append((last.layer, last.problem("conv_affine", epilogue="affine+residual")))
    if last.r == 1:
        problems.append((last.layer, _join(last, down, prologue=False)))
    if last.r == 1 and convs[1].stride == 1:
        whole = convs[1].problem("bottleneck_affine", epilogue="identity" if down is None else "projection")
        problems.append((convs[1].layer, replace(whole, c=convs[0].c)))
    return problems


def _training_problems(convs: list[_Conv], down: _Conv | None) -> list[tuple[str, Problem]]:
    last, shortcut = convs[-1], [down] if down is not None else []
    problems = []
    # Epilogue statistics. A 3x3 reads its input nine times, so bn_act writes it out first; a 1x1 applies it on load.
    for i, conv in enumerate(convs):
        problems.append((conv.layer, conv.problem("conv_stats", i > 0 and conv.r == 1, "stats")))
        problems.append((conv.layer, conv.vectors("bn_finalize", 3)))
        if i + 1 < len(convs) and convs[i + 1].r == 3:
            problems.append((conv.layer, conv.output("bn_act")))
    for conv in shortcut:
        problems.append((conv.layer, conv.problem("conv_stats", epilogue="stats")))
        problems.append((conv.layer, conv.vectors("bn_finalize", 3)))
    problems.append((last.layer, last.output("bn_join")))
    problems.append((last.layer, last.output("join_sums")))
    problems += [(last.layer, last.output("relu_grad"))]
    if last.r == 1:
        problems += _moments_problems(last, down)
    # Backward. A plain 1x1 builds dc while loading; for the others it is written out.
    for conv in [*shortcut, *reversed(convs)]:
        problems.append((conv.layer, conv.vectors("bn_backward_finalize", 2)))
        if not conv.plain:
            problems.append((conv.layer, conv.output("bn_backward_apply")))
        deferred = conv is not down and conv is not convs[0]
        problems.append((conv.layer, conv.dgrad("" if conv is down else "relu" if deferred else "add")))
        problems.append((conv.layer, conv.problem("conv_wgrad", deferred)))
    for conv in convs[:-1]:
        problems.append((conv.layer, conv.output("bn_act_sums")))
    return problems


def _moments_problems(last: _Conv, down: _Conv | None) -> list[tuple[str, Problem]]:
    """The end of a bottleneck from the moments of its input, forward and backward."""
    problems = []
    for conv in [last, *filter(None, [down])]:
        deferred = conv is last
        for problem in (
            replace(conv.moments(), prologue=deferred),
            conv.matrix("moments_finalize"),
            conv.problem("cross_moments", deferred),
            conv.matrix("cross_sums"),
            replace(conv.vectors("bn_backward_finalize", 2), n=1),
            conv.matrix("moments_weights"),
            conv.problem("conv1x1_dgrad_moments", deferred),
        ):
            problems.append((conv.layer, problem))
    problems.append((last.layer, _join(last, down, prologue=True)))
    return problems
