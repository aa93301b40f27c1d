"""Every Triton operator at the extremes of its shapes, with the heuristic's tile, against float64.

One channel in or out, one pixel, a map of one row, a stride beyond the map, more padding than map.
"""

import importlib

import pytest
from few_rows import FewRows

from fused_resnet.plan import FAMILIES, Device, Problem, triton_plan
from fused_resnet.testing import check_operator

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.usefixtures("poison", "no_tf32"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]


POINTWISE = {"r": 1, "s": 1}
STRIDED = POINTWISE | {"stride": (3, 3)}
PADDED = POINTWISE | {"padding": (1, 0)}
SQUARE = {"r": 3, "s": 3, "padding": (1, 1)}
HALVING = SQUARE | {"stride": (2, 2)}
STEM = {"r": 7, "s": 7, "stride": (2, 2), "padding": (3, 3)}
DEFERRED = {"prologue": True}
# Operators and their variants.
VARIANTS = [
    *(("conv_stats", form | {"epilogue": "stats"}) for form in (STRIDED | DEFERRED, HALVING | DEFERRED, SQUARE, STEM)),
    *(("conv_affine", form | {"epilogue": "affine+residual"}) for form in (POINTWISE, STRIDED, HALVING, STEM)),
    ("conv_affine_pool", STEM),
    ("conv_affine_pool", HALVING),
    *(("conv_dgrad", POINTWISE | DEFERRED | {"epilogue": epilogue}) for epilogue in ("", "reluadd")),
    *(("conv_dgrad", HALVING | {"epilogue": epilogue}) for epilogue in ("", "reluadd")),
    *(("conv_wgrad", form) for form in (POINTWISE | DEFERRED, STRIDED, PADDED, HALVING | DEFERRED, STEM)),
    ("conv1x1_join", POINTWISE | DEFERRED | {"epilogue": "join"}),
    ("conv1x1_join", STRIDED | {"epilogue": "join_downsample", "side": 1}),
    ("conv1x1_dgrad_moments", POINTWISE | DEFERRED),
    ("conv1x1_dgrad_moments", STRIDED),
    ("moments", {"stride": (3, 3)}),
    ("cross_moments", STRIDED | DEFERRED),
    *((op, {}) for op in ("moments_finalize", "moments_weights", "cross_sums", "bn_act", "bn_join", "bn_act_pool")),
    *((op, {}) for op in ("bn_act_pool_backward", "bn_act_sums", "join_sums", "relu_grad", "bn_backward_apply")),
    *((op, {}) for op in ("bn_finalize", "merge_partials", "bn_frozen", "bn_backward_finalize")),
]
# Images, height, width, channels in and out.
SHAPES = [(1, 1, 1, 1, 1), (2, 1, 9, 1, 40), (1, 2, 3, 33, 1)]


@pytest.mark.parametrize(("op", "variant"), VARIANTS, ids=lambda value: value if isinstance(value, str) else None)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_extremes(shape, op, variant, generator, device):
    problem = Problem(op, *shape, **variant)
    plan = triton_plan(problem, None, Device.default(90), "test")
    launch = getattr(importlib.import_module(f"fused_resnet.kernels.{plan.module}"), plan.launch)
    chosen = FewRows("triton", plan.config, plan.reason, plan.module, plan.launch)
    check_operator(problem, lambda *arguments: launch(*arguments, plan=chosen), generator, device)


def test_no_operator_is_left_out():
    assert {op for op, _ in VARIANTS} == {op for family in FAMILIES for op in family.launches}
