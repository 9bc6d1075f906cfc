"""Which implementation runs. The model never asks: the public functions of this package do.

    CUDA tensors (A100 and later)         the Triton kernels
    CPU tensors with TRITON_INTERPRET=1   the Triton kernels, in Triton's interpreter (for tests)
    everything else                       PyTorch

and PyTorch where no kernel fits (float64, a head dimension without a kernel, a loss of more than 16
classes or of logits that are not at a quarter of the labels' size), where Triton is not installed,
or where PyTorch is much faster (attention in float32 of which no gradient is wanted). `force`
overrides the rule. Below it are the few functions that all kernels share.
"""

import os
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS and Windows
    triton = tl = None

# Triton reads the variable when a kernel is defined; later changes have no effect.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
_forced: str | None = None
OLDEST = 8, 0  # compute capability: a program has too little shared memory before, and no bf16


def jit(function):
    """triton.jit where there is Triton; without it a kernel is a function nobody calls."""
    return triton.jit(function) if triton else function


@torch.compiler.assume_constant_result
def computes_bf16(device: torch.device) -> bool:
    """Whether it is a GPU, and one from the A100 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST


def has_kernels(device: torch.device) -> bool:
    """Whether it is a GPU that the kernels were made for, and Triton is there to compile them."""
    return triton is not None and computes_bf16(device)


def use_triton(x: Tensor, fits: bool = True, faster: bool = True) -> bool:
    """Whether an operation on x runs as a Triton kernel. `fits`: there is one for these shapes;
    `faster`: than PyTorch, there. Only `force` makes a slower one run."""
    possible = fits and triton is not None and (INTERPRETED or has_kernels(x.device))
    if _forced == "triton" and not possible:
        raise ValueError(
            f'force("triton"): no kernel can run on {x.dtype} of shape {tuple(x.shape)}, {x.device}'
        )
    return possible and _forced != "pytorch" and (faster or _forced == "triton")


def on_device_of(x: Tensor):
    """Kernels are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) in memory as (B, H, W, C), which is how the model's maps lie."""
    return x.contiguous(memory_format=torch.channels_last)


def refuse_second_derivative(operation, name: str, file: str, where: str = " on a GPU") -> None:
    """Differentiating `operation`, the backward pass of `name`, says which function of `file` can
    be differentiated twice."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{name} has no second derivative{where}; {name}_reference in kernels/{file} has one"
        )

    operation.register_autograd(refuse)


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that one program may have."""
    if not x.is_cuda:
        return 2**20
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin


@contextmanager
def force(path: str):
    """Within the block run "pytorch" or "triton", whatever the rule says: for tests and benches."""
    global _forced
    if path not in ("pytorch", "triton"):
        raise ValueError(f'force takes "pytorch" or "triton"; got {path!r}')
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before
