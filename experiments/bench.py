"""How fast the operations and the whole program are, next to what users could pick instead.

    python -m experiments.bench                             # everything; a GPU if there is one
    python -m experiments.bench attention step --peer       # next to Hugging Face's SegFormer
    python -m experiments.bench loss --compiled --json FILE # next to torch.compile; rows as data

First a check: the kernels that are used must be right on this machine, or nothing is timed. Then
the sections:

    attention     at the four stages of a crop of 512 pixels, batch 16
    loss          the collaborative loss at the same size, and the memory that it takes
    multiscale    the CNN's 11 x 11 depthwise convolution at its four stages
    norm          layer normalisation of the Transformer's tokens at its four stages
    bias          the gradient of the bias of each stage's widest layer
    upsample      256 channels from stages 2 to 4 to stage 1, as a head does it
    step          a training step as train.py runs it, where its time goes, and inference
    scene         a large picture mapped from file to file, as infer.py does it
    cpu           on a CPU: inference and training next to Hugging Face's, equal weights (bench_cpu)

Each row stands beside its target, if it has one and there is a GPU. "floor" is the time that the
work takes at least: the largest of bytes, matrix products and exponentials, each at the rate that
this GPU reaches. kernels/README.md counts them. On a CPU sizes are smaller.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.bench_cpu import bench_cpu
from experiments.bench_model import bench_scene, bench_step
from experiments.timing import (
    HEAD,
    Rates,
    Table,
    Target,
    attempt,
    both_ways,
    extra_megabytes,
    forward,
    rates,
)
from kernels import attention, collaborative_loss, group_norm, layer_norm, upsample
from kernels.attention import attention_reference
from kernels.bias import linear, row_sum, row_sum_reference
from kernels.distill import collaborative_loss_reference
from kernels.group_norm import group_norm_reference
from kernels.multiscale import multiscale_convolution, multiscale_convolution_reference
from kernels.norm import layer_norm_reference
from kernels.upsample import upsample_reference
from support import cli
from support.machine import describe, keep_freed_memory, pick_device

# What to beat. The baseline is the contender in the second place; where several match, the best of
# them. The step's and the scene's milliseconds and seconds are of the GPU that is named.
TARGETS = [
    Target("attention stage 1 * both ways", "SDPA *", times=2.5),
    Target("attention stage [234] * both ways", "SDPA *", times=1),
    Target("attention stages 1-4 * both ways", "the best SDPA", times=1.3),
    Target("loss * both ways", "eager", times=20),
    Target("loss * both ways", "torch.compile", times=10),
    Target("loss * extra memory", "eager", times=40),
    Target("multiscale stage [12] * both ways", "F.conv2d *", times=8),
    Target("multiscale stage [34] * both ways", "F.conv2d *", times=4),
    Target("training step b0 * both branches", "transformers", times=1 / 0.7),
    Target("training step b2 * both branches", "transformers", times=1),
    Target("training step * Transformer alone", "transformers", times=3),
    Target("training step * Transformer alone", "transformers, torch.compile", times=1.3),
    Target("training step b0 * both branches", "ours", most=33, gpu="H100"),
    Target("training step b0 * Transformer alone", "ours", most=15, gpu="H100"),
    Target("training step * two runs", "ours", most=0),
    Target("inference * bf16", "transformers", times=2),
    Target("inference * fp32", "transformers", times=1),
    Target("scene * file to file", "ours", most=3, gpu="H100"),
]
STAGES = {1: (16384, 1), 2: (4096, 2), 3: (1024, 5), 4: (256, 8)}  # N queries, h heads; M = 256
GPU_LOSSES = [(16, K, 128) for K in (6, 7, 16)]  # B, K, side of the logits
CPU_LOSSES = [(4, 7, side) for side in (16, 32, 64)]
GPU_UPSAMPLING, CPU_UPSAMPLING = (16, 256, 128), (2, 256, 64)  # B, C, side of the result
MAPS = {1: (32, 128), 2: (64, 64), 3: (160, 32), 4: (256, 16)}  # C, side: b0's stages
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
WAYS = {"forward": forward, "both ways": both_ways}


# --- The check ----------------------------------------------------------------------------------


def kernel_errors(device: torch.device, sections: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the kernels that these sections use, or with any; empty: nothing. Errors
    are judged against float64, and may be twice those of PyTorch's operations in the same dtype."""
    dtype, wrong = (torch.bfloat16 if device.type == "cuda" else torch.float32), []
    uses_all = not sections or {"step", "scene"} & {*sections}
    for name, ours, reference, inputs in checked(dtype, device):
        if not uses_all and name.split()[0] not in sections:
            continue
        result, again = outputs_and_gradients(ours, inputs), outputs_and_gradients(ours, inputs)
        low = outputs_and_gradients(reference, inputs)
        exact = outputs_and_gradients(reference, [x.double() for x in inputs])
        for i, (a, b, p, e) in enumerate(zip(result, again, low, exact, strict=True)):
            error, allowed = (a.double() - e).norm(), 2 * (p.double() - e).norm()
            if not error <= allowed + 1e-6 * e.norm():
                wrong.append(f"{name}: tensor {i} errs by {error:.1e}, allowed {allowed:.1e}")
            if not torch.equal(a, b):
                wrong.append(f"{name}: tensor {i} differs between two runs")
    return wrong


def checked(dtype, device) -> list[tuple[str, Callable, Callable, list[Tensor]]]:
    """(name, ours, reference, inputs) of each operation."""
    upsampled = [partial(f, size=(64, 96)) for f in (upsample, upsample_reference)]
    normalised = [partial(f, eps=1e-6) for f in (layer_norm, layer_norm_reference)]
    grouped = [partial(on_maps, f) for f in (group_norm, group_norm_reference)]
    kernel = torch.randn(16, 1, 11, 11, device=device).to(dtype) / 11
    convolved = [*feature_maps(2, 16, 40, dtype, device)[:1], kernel]
    shapes = (3000, 96), (32, 96), (32,)
    biased = [torch.randn(*shape, device=device).to(dtype) for shape in shapes]
    return [
        ("attention D=32", attention, attention_reference, qkv(2, 2, 500, 200, 32, dtype, device)),
        ("attention D=64", attention, attention_reference, qkv(2, 2, 300, 300, 64, dtype, device)),
        (
            "loss K=7",
            *losses(labels_for(2, 40, 72, 7, device)),
            logits(2, 7, 40, 72, dtype, device),
        ),
        ("multiscale", multiscale_convolution, multiscale_convolution_reference, convolved),
        ("norm", *normalised, rows_of(500, 96, dtype, device)),
        ("norm of groups", *grouped, [convolved[0], *rows_of(1, 16, dtype, device)[1:]]),
        ("bias", linear, F.linear, biased),
        ("upsample", *upsampled, feature_maps(2, 32, 16, dtype, device)[:1]),
    ]


def on_maps(function: Callable, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return function(x, 8, weight, bias, 1e-5)


def outputs_and_gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    torch.manual_seed(0)
    upstream = torch.randn(out.shape, device=out.device).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def qkv(B, h, N, M, D, dtype, device) -> list[Tensor]:
    """As the model makes them: q a view of (B, N, h, D), k and v of one projection."""
    q = torch.randn(B, N, h, D, device=device).to(dtype).transpose(1, 2)
    k, v = torch.randn(B, M, 2, h, D, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    return [q, k, v]


def logits(B, K, h, w, dtype, device) -> list[Tensor]:
    both = torch.randn(2, B, K, h, w, device=device).to(dtype)
    return [x.contiguous(memory_format=torch.channels_last) for x in both]


def labels_for(B, h, w, K, device) -> Tensor:
    """(B, 4 h, 4 w) uint8, as `train.py` has them; a tenth is ignored."""
    labels = torch.randint(0, K, (B, 4 * h, 4 * w), device=device, dtype=torch.uint8)
    return labels.masked_fill(torch.rand(labels.shape, device=device) < 0.1, 255)


def feature_maps(B, C, side, dtype, device) -> list[Tensor]:
    """The same map (B, C, side, side) channels-last and contiguous."""
    x = torch.randn(B, C, side, side, device=device).to(dtype)
    return [x.contiguous(memory_format=torch.channels_last), x]


def rows_of(rows, C, dtype, device) -> list[Tensor]:
    """x (rows, C), and a weight and a bias (C,), for a normalisation."""
    return [torch.randn(*shape, device=device).to(dtype) for shape in ((rows, C), (C,), (C,))]


def losses(labels: Tensor) -> tuple[Callable, Callable]:
    """Ours and the reference, as functions of both logits -> the sum of the four terms."""
    return tuple(
        lambda cnn, transformer, f=f: torch.stack(f(cnn, transformer, labels)[:4]).sum()
        for f in (collaborative_loss, collaborative_loss_reference)
    )


# --- The operations -----------------------------------------------------------------------------
#
# A section takes the table, the rates of this GPU (None: on a CPU) and the program's options.


def bench_attention(table: Table, rate: Rates | None, config: "Config") -> None:
    B, dtype = (16, torch.bfloat16) if rate else (2, torch.float32)
    functions = {"ours" if rate else "SDPA (ours on a CPU)": attention}
    if rate:
        functions |= {name: partial(on_backend, b) for name, b in BACKENDS.items()}
    functions |= {"eager": attention_reference}
    for D in (32, 64):
        stages = []
        for stage, (N, h) in STAGES.items():
            inputs, pairs = qkv(B, h, N, 256, D, dtype, table.device), B * h * N * 256
            size = B * h * (N + 256) * D * 2 * dtype.itemsize
            for way, passes in (("forward", 1), ("both ways", 3.5)):
                makers = {name: partial(WAYS[way], f, inputs) for name, f in functions.items()}
                if config.compiled:
                    makers["torch.compile"] = compiled(way, attention_reference, inputs)
                floor = None
                if rate:  # backward: 2.5 times the products, the exponentials again
                    exps = pairs * (1 if passes == 1 else 2)
                    floor = rate.milliseconds(size * passes, 4 * pairs * D * passes, exps)
                found = table.compare(f"attention stage {stage} D={D} {way}", makers, floor)
            stages.append(found)  # of both ways
        add_all_stages(table, D, stages)


def add_all_stages(table: Table, D: int, stages: list[dict]) -> None:
    """The stages' sum, next to a user's who takes PyTorch's best backend at each of them."""
    best = [[ms for name, ms in found.items() if name in BACKENDS and ms] for found in stages]
    ours = [next(iter(found.values())) for found in stages]
    if all(best) and all(ours):
        what, total = f"attention stages 1-4 D={D} both ways", sum(ours)
        table.add(what, "ours", total, total)
        table.add(what, "the best SDPA", sum(map(min, best)), total)


def on_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def compiled(way: str, function: Callable, inputs: list[Tensor]) -> Callable:
    """A maker of the compiled function's call. What was compiled for other shapes is forgotten:
    beyond a few of them PyTorch gives up and runs the function as it is."""

    def make():
        torch.compiler.reset()
        return WAYS[way](torch.compile(function), inputs)

    return make


def bench_loss(table: Table, rate: Rates | None, config: "Config") -> None:
    dtype = torch.bfloat16 if rate else torch.float32
    for B, K, side in GPU_LOSSES if rate else CPU_LOSSES:
        inputs = logits(B, K, side, side, dtype, table.device)
        labels = labels_for(B, side, side, K, table.device)
        ours, reference = losses(labels)
        makers = {"ours": partial(both_ways, ours, inputs)}
        makers["eager"] = partial(both_ways, reference, inputs)
        if config.compiled:
            makers["torch.compile"] = compiled("both ways", reference, inputs)
        makers = {name: cache(make) for name, make in makers.items()}  # timed, then measured
        floor, what = None, f"loss K={K} B={B} {4 * side}x{4 * side}"
        if rate:
            traffic = 3 * sum(x.nbytes for x in inputs) + 3 * labels.nbytes
            floor = rate.milliseconds(traffic, 0, 4 * K * labels.numel() * 1.5)
        table.compare(f"{what} both ways", makers, floor)
        if rate:
            megabytes = {
                name: attempt(name, lambda make=make: extra_megabytes(make()))
                for name, make in makers.items()
            }
        else:
            megabytes = cpu_megabytes(B, K, side)
        for name, value in megabytes.items():
            table.add(f"{what} extra memory", name, value, megabytes["ours"], unit="MB")


CPU_MEMORY = """
import sys, torch
from pathlib import Path
from experiments import bench
B, K, side = map(int, sys.argv[1:])
def resident(what):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(what + ":")[2].split()[0])
def kilobytes(function, side):
    inputs = [x.requires_grad_() for x in bench.logits(B, K, side, side, torch.float32, "cpu")]
    call = bench.losses(bench.labels_for(B, side, side, K, "cpu"))[function]
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    before = resident("VmRSS")
    call(*inputs).backward()
    return resident("VmHWM") - before
for function in (0, 1):
    kilobytes(function, 8)  # what a first call loads does not count
    print(kilobytes(function, side))
"""


def cpu_megabytes(B: int, K: int, side: int) -> dict[str, float]:
    """Resident memory at its highest during a call beyond that before it, ours and eager, in a
    process which gives freed memory back at once, so that none is hidden. Linux tells; others do
    not, and the result is empty."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    command = [sys.executable, "-c", CPU_MEMORY, *map(str, (B, K, side))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kilobytes = map(int, process.stdout.split())
    return dict(zip(("ours", "eager"), (1024 * n / 1e6 for n in kilobytes), strict=True))


def bench_multiscale(table: Table, rate: Rates | None, config: "Config") -> None:
    B, dtype = (16, torch.bfloat16) if rate else (2, torch.float32)
    theirs = multiscale_convolution_reference
    for stage, (C, side) in MAPS.items():
        x, contiguous = feature_maps(B, C, side, dtype, table.device)
        kernel = torch.randn(C, 1, 11, 11, device=table.device).to(dtype) / 11
        for way, maps, products in (("forward", 2, 1), ("both ways", 5, 3)):
            measure = WAYS[way]
            makers = {
                "ours": partial(measure, multiscale_convolution, [x, kernel]),
                "F.conv2d channels-last": partial(measure, theirs, [x, kernel]),
                "F.conv2d contiguous": partial(measure, theirs, [contiguous, kernel]),
            }
            floor = rate and rate.milliseconds(maps * x.nbytes, products * 242 * x.numel())
            table.compare(f"multiscale stage {stage} C={C} {way}", makers, floor)


def bench_norm(table: Table, rate: Rates | None, config: "Config") -> None:
    """float32 in, as the residual stream is, and out what the products after it take."""
    B, dtype = (16, torch.bfloat16) if rate else (2, torch.float32)
    ours = partial(layer_norm, eps=1e-6, dtype=dtype)

    def theirs(x, weight, bias):
        return layer_norm_reference(x, weight, bias, eps=1e-6).to(dtype)

    for stage, (C, side) in MAPS.items():
        inputs = rows_of(B * side * side, C, torch.float32, table.device)
        for way, nbytes in (
            ("forward", 4 + dtype.itemsize),
            ("both ways", 12 + 2 * dtype.itemsize),
        ):
            functions = {"ours": ours, "F.layer_norm": theirs}
            makers = {name: partial(WAYS[way], f, inputs) for name, f in functions.items()}
            floor = rate and rate.milliseconds(nbytes * inputs[0].numel(), 0)
            table.compare(f"norm stage {stage} C={C} {way}", makers, floor)


def bench_bias(table: Table, rate: Rates | None, config: "Config") -> None:
    """The sum of all rows, on a GPU alone: a CPU has PyTorch's."""
    if not rate:
        return
    for stage, (C, side) in MAPS.items():
        dy = torch.randn(16 * side * side, 4 * C, device=table.device).bfloat16()
        functions = {"ours": row_sum, "sum": lambda rows, dtype: row_sum_reference(rows).to(dtype)}
        makers = {name: partial(forward, f, [dy, torch.float32]) for name, f in functions.items()}
        table.compare(f"bias stage {stage} C={4 * C}", makers, rate.milliseconds(dy.nbytes, 0))


def bench_upsample(table: Table, rate: Rates | None, config: "Config") -> None:
    B, C, size = GPU_UPSAMPLING if rate else CPU_UPSAMPLING
    ours, theirs = (partial(f, size=(size, size)) for f in (upsample, upsample_reference))
    for side in (size // 2, size // 4, size // 8):
        dtype = torch.bfloat16 if rate else torch.float32
        x, contiguous = feature_maps(B, C, side, dtype, table.device)
        for way, passes in (("forward", 1), ("both ways", 2)):
            measure = WAYS[way]
            makers = {
                "ours": partial(measure, ours, [x]),
                "F.interpolate channels-last": partial(measure, theirs, [x]),
                "F.interpolate contiguous": partial(measure, theirs, [contiguous]),
            }
            nbytes = passes * x.nbytes * (1 + (size / side) ** 2)
            floor = rate and rate.milliseconds(nbytes, 0)
            table.compare(f"upsample {C} x {side}^2 to {size}^2 {way}", makers, floor)


# --- The program ----------------------------------------------------------------------------------

SECTIONS = {
    "attention": bench_attention,
    "loss": bench_loss,
    "multiscale": bench_multiscale,
    "norm": bench_norm,
    "bias": bench_bias,
    "upsample": bench_upsample,
    "step": bench_step,
    "scene": bench_scene,
    "cpu": bench_cpu,
}


@dataclass
class Config:
    sections: tuple[str, ...] = cli.option((), f"of {', '.join(SECTIONS)} (all)", positional=True)
    compiled: bool = cli.option(False, "time torch.compile's versions too: minutes of compiling")
    peer: bool = cli.option(False, "time Hugging Face's SegFormer too (the package transformers)")
    json: Path = cli.option(None, "write the rows as data, each when it is known")

    def __post_init__(self):
        for name in self.sections:
            known = name in SECTIONS
            cli.require(known, f"there is no section {name}; there are {', '.join(SECTIONS)}")
        if self.peer:
            try:
                import_module("transformers")
            except ImportError as error:
                raise cli.UsageError(f"--peer takes the package transformers: {error}") from None


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    keep_freed_memory()  # as every program here does
    device = pick_device("auto")
    about = describe(device)
    table = Table(device, about, TARGETS, config.json)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    torch.manual_seed(0)
    if wrong := kernel_errors(device, config.sections):
        sys.exit("not timed, for the kernels are wrong here:\n  " + "\n  ".join(wrong))
    print("correct here, and the same bits twice\n")
    rate = rates() if device.type == "cuda" else None
    table.about["rates"] = rate and rate._asdict()
    print(HEAD)
    for name in config.sections or SECTIONS:
        SECTIONS[name](table, rate, config)
    print("\n" + table.summary())


if __name__ == "__main__":
    cli.run(main)
