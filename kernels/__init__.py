"""The operations that CTCLM spends its time in, each beside the PyTorch lines it must equal.

    from kernels import attention, collaborative_loss, conv2d, group_norm, layer_norm, linear
    from kernels import multiscale_convolution, upsample

The model imports these names only and never asks what hardware there is: choose.py has the one
rule. `force("pytorch")` and `force("triton")` override it. `python -m experiments.bench` measures.
"""

from kernels.attention import attention
from kernels.bias import conv2d, linear
from kernels.choose import computes_bf16, force, has_kernels
from kernels.distill import CollaborativeLoss, collaborative_loss, gate
from kernels.group_norm import group_norm
from kernels.multiscale import multiscale_convolution
from kernels.norm import layer_norm
from kernels.upsample import upsample

__all__ = [
    "CollaborativeLoss",
    "attention",
    "collaborative_loss",
    "computes_bf16",
    "conv2d",
    "force",
    "gate",
    "group_norm",
    "has_kernels",
    "layer_norm",
    "linear",
    "multiscale_convolution",
    "upsample",
]
