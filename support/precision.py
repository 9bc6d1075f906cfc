"""How the deployed model computes: in which precision, and compiled or not.

    model = at_precision(model, "auto")
    model.forward = Compiled(model.forward)     # on a CPU, for a large scene or many

Weights are cast once, for autocast's casts in every call cost more than they save.
"""

import sys

import torch
from torch import Tensor, nn

from support.cli import require


def at_precision(model: nn.Module, precision: str, compiled: bool = False) -> nn.Module:
    """Casts a model's weights and features in place, to auto, fp32, bf16 or fp16; returns it.

    auto is fp16 on a GPU: as fast as bf16, with an eighth of its rounding error. On a CPU it is
    fp32, and bf16 if the model will be `compiled` and the CPU multiplies matrices of bf16. The
    image is normalised in float32, and softmax and blending follow in float32.
    """
    on_gpu = model.normalise.mean.is_cuda
    if precision == "auto":
        on_cpu = "bf16" if compiled and multiplies_bf16() else "fp32"
        precision = "fp16" if on_gpu else on_cpu
    require(precision != "fp16" or on_gpu, "--precision fp16 is for a GPU; a CPU takes bf16")
    if precision != "fp32":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.LayerNorm):
                module.to(dtype)
        model.normalise.register_forward_hook(lambda module, images, output: output.to(dtype))
    return model


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it (AMX, AVX512_BF16); without, bf16 is slower."""
    known = torch.cpu.get_capabilities()
    return known.get("amx_bf16", False) or known.get("avx512_bf16", False)


CPU_OPTIONS = {
    "freezing": True,
    "max_autotune": True,  # times products in C++ against the library's and takes the faster
    "max_autotune_gemm_backends": "CPP,ATEN",
    "autotune_num_choices_displayed": 0,
}


class Compiled:
    """A model's forward pass through torch.compile, its weights constants.

    The first call at each shape compiles, which takes a minute or two. Where that fails, as without
    a C++ compiler, a sentence says so once and the function runs as it is. Call it under no_grad.
    """

    def __init__(self, forward):
        self.forward = forward
        self.compiled = torch.compile(forward, dynamic=False, options=CPU_OPTIONS)

    def __call__(self, images: Tensor) -> Tensor:
        if self.compiled:
            try:
                return self.compiled(images)
            except RuntimeError as error:  # torch.compile's are of this class
                reason = str(error).splitlines()[0]
                print(f"  note: not compiled, so slower: {reason}", file=sys.stderr)
                self.compiled = None
        return self.forward(images)
