"""Drop-in ResNet modules whose convolutions, BatchNorms, ReLUs and residual adds run as fused GPU kernels."""

from .modules import FusedBasicBlock, FusedBottleneck

__version__ = "0.1.0"
__all__ = ["FusedBasicBlock", "FusedBottleneck"]
