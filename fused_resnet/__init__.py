"""Drop-in ResNet modules whose convolutions, BatchNorms, ReLUs and residual adds run as fused GPU kernels."""

from .functional import conv_bn_act, residual_block, stem
from .modules import FusedBasicBlock, FusedBottleneck, FusedConvBNAct
from .plan import Unsupported, current_impl, use

__version__ = "0.1.0"
__all__ = [
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNAct",
    "Unsupported",
    "conv_bn_act",
    "current_impl",
    "residual_block",
    "stem",
    "use",
]
