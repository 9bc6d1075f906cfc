"""How fast the two operations are, next to what users could pick instead.

    python -m experiments.bench                  # tables; a GPU if there is one, else the CPU
    python -m experiments.bench --json FILE      # the same as data

First a check: the kernels must be right on this machine, or nothing is timed. Then medians of
repeated runs: attention at the four stages of a crop of 512 pixels, batch 16; the collaborative
loss at the same size; one training step. On a GPU attention and loss run as CUDA graphs, without
what launching costs, and the training step as users run it. On a CPU the contenders take turns,
for its speed drifts.

"floor" is the time that the work takes at least: the largest of bytes, matrix products and
exponentials, each at the rate that this GPU reaches (measured for the first two; for the third 16
a clock in each processor, NVIDIA's table of arithmetic throughput). kernels/README.md counts them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctclm import CTCLM, ModelConfig
from kernels import attention, collaborative_loss, force
from kernels.attention import attention_reference
from kernels.choose import triton
from kernels.distill import collaborative_loss_reference
from support.machine import keep_freed_memory

STAGES = {1: (16384, 1), 2: (4096, 2), 3: (1024, 5), 4: (256, 8)}  # N queries, h heads; M = 256
CPU_REPEATS = 20
GPU_LOSSES = [(16, K, 128) for K in (6, 7, 16)]  # B, K, side of the logits
CPU_LOSSES = [(4, 7, side) for side in (16, 32, 64)]
GPU_STEPS = [("b0", 16, 512), ("b2", 16, 512)]  # variant, B, side of the images
CPU_STEP = ("tiny", 8, 128)
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Row(NamedTuple):
    what: str
    how: str
    milliseconds: float | None  # median; None: it cannot do this
    times_ours: float | None = None  # its time as a multiple of ours
    floor: float | None = None  # milliseconds
    megabytes: float | None = None  # of memory beyond inputs and results


# --- The check ----------------------------------------------------------------------------------


def kernel_errors(device: torch.device) -> list[str]:
    """What is wrong with the kernels here; empty: nothing. Errors are judged against float64, and
    may be twice those of PyTorch's operations in the same dtype."""
    dtype, wrong = (torch.bfloat16 if device.type == "cuda" else torch.float32), []
    for name, ours, reference, inputs in (
        ("attention D=32", attention, attention_reference, qkv(2, 2, 500, 200, 32, dtype, device)),
        ("attention D=64", attention, attention_reference, qkv(2, 2, 300, 300, 64, dtype, device)),
        (
            "loss K=7",
            *losses(labels_for(2, 40, 72, 7, device)),
            logits(2, 7, 40, 72, dtype, device),
        ),
    ):
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
    shape = (2, B, K, h, w)
    both = torch.randn(shape, device=device).to(dtype)
    return [x.contiguous(memory_format=torch.channels_last) for x in both]


def labels_for(B, h, w, K, device) -> Tensor:
    labels = torch.randint(0, K, (B, 4 * h, 4 * w), device=device)
    return labels.masked_fill(torch.rand(labels.shape, device=device) < 0.1, 255)


def losses(labels: Tensor) -> tuple[Callable, Callable]:
    """Ours and the reference, as functions of both logits -> the sum of the four terms."""
    return tuple(
        lambda cnn, transformer, f=f: torch.stack(f(cnn, transformer, labels)[:4]).sum()
        for f in (collaborative_loss, collaborative_loss_reference)
    )


# --- Timing -------------------------------------------------------------------------------------


def medians(contenders: dict[str, Callable], device: torch.device) -> dict[str, float | None]:
    """Milliseconds of each; None where it raises, which some do on some shapes."""
    if device.type == "cuda":
        return {name: gpu_median(call) for name, call in contenders.items()}
    found = {name: [] for name in contenders}
    for repeat in range(2 + CPU_REPEATS):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if repeat > 1:
                found[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in found.items()}


def gpu_median(call: Callable) -> float | None:
    try:
        return triton.testing.do_bench_cudagraph(call, rep=50, return_mode="median")
    except RuntimeError as error:
        print(f"  {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def extra_megabytes(call: Callable) -> float:
    """GPU memory at its highest during a call, beyond what there was before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def rows_of(what, contenders, device, floor=None, memory=None) -> list[Row]:
    """One row a contender, ours first; `memory` measures one."""
    times = medians(contenders, device)
    ours = next(iter(times.values()))
    rows = []
    for name, ms in times.items():
        megabytes = memory(name) if memory and ms is not None else None
        rows.append(Row(what, name, ms, ms / ours if ms and ours else None, floor, megabytes))
        print(line(rows[-1]), flush=True)
    return rows


def both_ways(function: Callable, inputs: list[Tensor]) -> Callable:
    """Forward and backward, in one call without arguments."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    upstream = torch.randn_like(function(*inputs))

    def call():
        torch.autograd.grad(function(*inputs), inputs, upstream)

    return call


class Rates(NamedTuple):
    bytes: float  # a second
    products: float  # operations a second, bf16
    exponentials: float

    def milliseconds(self, nbytes: float, products: float, exponentials: float) -> float:
        return 1000 * max(
            nbytes / self.bytes, products / self.products, exponentials / self.exponentials
        )


def rates() -> Rates:
    properties = torch.cuda.get_device_properties(0)
    x = torch.empty(2**29, device="cuda", dtype=torch.uint8)
    copied = 2 * x.numel() / (gpu_median(lambda: x.clone()) / 1000)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    products = 2 * 8192**3 / (gpu_median(lambda: a @ a) / 1000)
    clock = 1e6 * float(ask_gpu("clocks.max.sm") or "inf")  # unknown: no floor by exponentials
    return Rates(copied, products, 16 * clock * properties.multi_processor_count)


def ask_gpu(what: str) -> str | None:
    """One number or name from nvidia-smi, if it is there and knows."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return printed.splitlines()[0].strip() if printed.strip() else None


# --- What is timed ------------------------------------------------------------------------------


def bench_attention(device: torch.device, rate: Rates | None) -> list[Row]:
    rows, B, dtype = [], (16 if rate else 2), (torch.bfloat16 if rate else torch.float32)
    for D in (32, 64):
        for stage, (N, h) in STAGES.items():
            inputs = qkv(B, h, N, 256, D, dtype, device)
            functions = {"ours" if rate else "SDPA (ours on a CPU)": attention}
            if rate:
                functions |= {name: partial(on_backend, b) for name, b in BACKENDS.items()}
            functions |= {"eager": attention_reference}
            if rate:
                functions |= {"torch.compile": torch.compile(attention_reference)}
            size, pairs = B * h * (N + 256) * D * 2 * dtype.itemsize, B * h * N * 256
            for way, wrap, passes in (("forward", partial, 1), ("both ways", both_ways, 3.5)):
                calls = {}
                for name, f in functions.items():
                    try:
                        calls[name] = wrap(f, *inputs) if wrap is partial else wrap(f, inputs)
                    except RuntimeError:  # a backend that cannot do this shape
                        calls[name] = None
                calls = {name: call for name, call in calls.items() if call}
                floor = None
                if rate:  # backward: 2.5 times the products, the exponentials again
                    exps = pairs * (1 if passes == 1 else 2)
                    floor = rate.milliseconds(size * passes, 4 * pairs * D * passes, exps)
                rows += rows_of(f"attention stage {stage} D={D} {way}", calls, device, floor)
    return rows


def on_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def bench_loss(device: torch.device, rate: Rates | None) -> list[Row]:
    rows = []
    for B, K, side in GPU_LOSSES if rate else CPU_LOSSES:
        dtype = torch.bfloat16 if rate else torch.float32
        inputs, labels = (
            logits(B, K, side, side, dtype, device),
            labels_for(B, side, side, K, device),
        )
        ours, reference = losses(labels)
        calls = {"ours": both_ways(ours, inputs), "eager": both_ways(reference, inputs)}
        floor, memory = None, partial(cpu_megabytes, B, K, side)
        if rate:
            compiled = torch.compile(reference)
            calls["torch.compile"] = both_ways(compiled, inputs)
            traffic = 3 * sum(x.nbytes for x in inputs) + 3 * labels.nbytes
            floor = rate.milliseconds(traffic, 0, 4 * K * labels.numel() * 1.5)
            memory = lambda name, calls=calls: extra_megabytes(calls[name])  # noqa: E731
        what = f"loss K={K} B={B} {4 * side}x{4 * side} both ways"
        rows += rows_of(what, calls, device, floor, memory)
    return rows


CPU_MEMORY = """
import sys, torch
from pathlib import Path
from experiments import bench
B, K, side, name = *map(int, sys.argv[1:4]), sys.argv[4]
def resident(what):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(what + ":")[2].split()[0])
def call(B, side):
    torch.manual_seed(0)
    inputs = bench.logits(B, K, side, side, torch.float32, "cpu")
    functions = bench.losses(bench.labels_for(B, side, side, K, "cpu"))
    both_ways = bench.both_ways(dict(zip(("ours", "eager"), functions))[name], inputs)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    before = resident("VmRSS")
    both_ways()
    return resident("VmHWM") - before
call(B, side)  # what a first call loads does not count
print(call(B, side))
"""


def cpu_megabytes(B: int, K: int, side: int, name: str) -> float | None:
    """Resident memory at its highest during a call beyond that before it, in a process of its own
    which gives freed memory back at once, so that none is hidden. Linux tells; others do not."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-c", CPU_MEMORY, *map(str, (B, K, side, name))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(process.stdout) * 1024 / 1e6


def bench_step(device: torch.device) -> list[Row]:
    """A training step, forward, objective, backward, AdamW, in the precision of train.py."""
    rows = []
    on_gpu = device.type == "cuda"
    for variant, B, side in GPU_STEPS if on_gpu else [CPU_STEP]:
        torch.manual_seed(0)
        model = CTCLM(ModelConfig(variant=variant)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        images = 255 * torch.rand(B, 3, side, side, device=device)
        labels = labels_for(B, side // 4, side // 4, 6, device)

        def step(path, forward=model, model=model, optimizer=optimizer, x=images, y=labels):
            with force(path), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                losses = model.objective(forward(x), y)
                losses.total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if on_gpu:
            compiled = torch.compile(model)
            calls = {
                "ours": partial(step, "triton"),
                "PyTorch": partial(step, "pytorch"),
                "PyTorch, torch.compile": partial(step, "pytorch", compiled),
            }
            times = {name: step_median(call) for name, call in calls.items()}
        else:
            times = medians({"ours": partial(step, "pytorch")}, device)
        ours = times["ours"]
        for name, ms in times.items():
            what = f"training step {variant} B={B} {side}x{side}"
            rows.append(Row(what, name, ms, ms / ours))
            print(line(rows[-1]), flush=True)
    return rows


def step_median(call: Callable) -> float:
    """With everything that the host does, unlike a graph."""
    for _ in range(5):
        call()
    times = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


# --- What is printed ----------------------------------------------------------------------------


def line(row: Row) -> str:
    def cell(value, form, suffix=""):
        return "-" if value is None else f"{value:{form}}{suffix}"

    share = row.floor / row.milliseconds if row.floor and row.milliseconds else None
    return (
        f"| {row.what} | {row.how} | {cell(row.milliseconds, '.3f')} | "
        f"{cell(row.times_ours, '.2f')} | {cell(share, '.0%')} | {cell(row.megabytes, '.0f')} |"
    )


HEAD = "| what | how | ms | times ours | of the floor | extra MB |\n" + "| --- " * 6 + "|"


def machine(device: torch.device) -> dict:
    entry = {"python": platform.python_version(), "torch": torch.__version__}
    entry["triton"] = triton.__version__ if triton else None
    if device.type == "cuda":
        entry |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        entry["driver"] = ask_gpu("driver_version")
    else:
        entry["cpu"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as data too")
    options = parser.parse_args()
    keep_freed_memory()  # as every program here does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = machine(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    torch.manual_seed(0)
    if wrong := kernel_errors(device):
        sys.exit("not timed, for the kernels are wrong here:\n  " + "\n  ".join(wrong))
    print("correct here, and the same bits twice\n")
    print(HEAD)
    rate = rates() if device.type == "cuda" else None
    rows = bench_attention(device, rate) + bench_loss(device, rate) + bench_step(device)
    lost = {row.what for row in rows if row.times_ours is not None and row.times_ours < 1}
    print("\nslower than another in: " + (", ".join(sorted(lost)) or "nothing"))
    if options.json:
        entry = about | {"rates": rate and rate._asdict(), "rows": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(entry, indent=1) + "\n")


if __name__ == "__main__":
    main()
