"""How a call is timed, and the table that keeps what was found, each row beside its target.

    table = Table(device, about, targets, path)          # prints; path: a file of the rows as data
    table.compare("upsampling forward", {"ours": make, "PyTorch": make_other})
    table.add("launches a step", "ours", 812, unit="kernels")

Every row is printed, and the file written, when its time is known: an interrupted run keeps what it
has. Times are medians. On a GPU an operation runs in a CUDA graph, without what launching it costs,
and whole programs run as users run them. On a CPU the contenders take turns, for its speed drifts.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.choose import triton
from support import checkpoint
from support.machine import ask_gpu

CPU_REPEATS = 20
GPU_MILLISECONDS = 10  # of calls in one graph, which is replayed ten times
STEP_BLOCKS, STEPS_PER_BLOCK = 5, 4


# --- Targets and rows -----------------------------------------------------------------------------


class Target(NamedTuple):
    """What a row is held against. `what` and `how` are patterns of its names."""

    what: str
    how: str
    times: float | None = None  # its value must be at least so many times ours
    most: float | None = None  # or its value at most this, in the row's unit
    gpu: str = ""  # on such a GPU alone

    def __str__(self) -> str:
        return f"{self.times:g}x" if self.most is None else f"<= {self.most:g}"


class Row(NamedTuple):
    what: str
    how: str
    value: float | None  # a median; None: it cannot do this
    unit: str = "ms"
    times_ours: float | None = None  # its value as a multiple of ours
    target: str | None = None
    met: bool | None = None
    floor: float | None = None  # what the work takes at least, in the row's unit

    def __str__(self) -> str:
        def cell(value, form, suffix=""):
            return "-" if value is None else f"{value:{form}}{suffix}"

        share = self.floor / self.value if self.floor and self.value else None
        met = {None: "-", True: "yes", False: "no"}[self.met]
        return (
            f"| {self.what} | {self.how} | {cell(self.value, '.4g', ' ' + self.unit)} | "
            f"{cell(self.times_ours, '.2f')} | {self.target or '-'} | {met} | "
            f"{cell(share, '.0%')} |"
        )


HEAD = "| what | how | median | times ours | target | met | of the floor |\n" + "| --- " * 7 + "|"


class Table:
    """Rows as they are measured; `about` is what the file says beside them."""

    def __init__(self, device: torch.device, about: dict, targets=(), path: Path | None = None):
        self.device, self.about, self.path = device, about, path
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.targets = [t for t in targets if gpu and t.gpu in gpu]  # all are of a GPU
        self.rows: list[Row] = []
        self.save()  # a file that cannot be written is known before the first row

    def add(self, what: str, how: str, value: float | None, ours=None, unit="ms", floor=None):
        """One row; `ours` is the value that it is compared with."""
        times = value / ours if value is not None and ours else None
        target = self.target_of(what, how)
        met = None
        if target and target.most is not None:
            met = value is not None and value <= target.most
        elif target and value is not None:  # it can do this: if ours cannot, ours misses
            met = times is not None and times >= target.times
        text = str(target) if target else None
        self.rows.append(Row(what, how, value, unit, times, text, met, floor))
        print(self.rows[-1], flush=True)
        self.save()

    def target_of(self, what: str, how: str) -> Target | None:
        for target in self.targets:
            if fnmatchcase(what, target.what) and fnmatchcase(how, target.how):
                return target
        return None

    def compare(self, what: str, makers: dict[str, Callable], floor=None, timer=None) -> dict:
        """A row a contender, ours first -> their milliseconds. A maker returns the call to time;
        `timer` is how it is timed on a GPU."""
        found, ours = {}, None
        for name, ms in medians(makers, self.device, timer or graph_median):
            ours = ms if not found else ours
            found[name] = ms
            self.add(what, name, ms, ours, floor=floor)
        return found

    def save(self) -> None:
        if self.path:
            rows = [row._asdict() for row in self.rows]
            checkpoint.save_json(self.about | {"rows": rows}, self.path)

    def summary(self) -> str:
        missed = [f"{row.what}, {row.how}" for row in self.rows if row.met is False]
        behind = [
            f"{row.what}, {row.how}"
            for row in self.rows
            if row.times_ours is not None and row.times_ours < 1
        ]
        lines = {"behind": behind, "targets missed": missed}
        return "\n".join(f"{name}: {'; '.join(rows) or 'none'}" for name, rows in lines.items())


# --- Time -----------------------------------------------------------------------------------------


def medians(
    makers: dict[str, Callable], device: torch.device, timer: Callable
) -> Iterator[tuple[str, float | None]]:
    """(name, milliseconds) of each call that a maker returns; None where it raises, which some do
    on some shapes. On a GPU one contender at a time is alive, and its time known at once."""
    if device.type == "cuda":
        for name, make in makers.items():
            yield name, attempt(name, lambda make=make: timer(make()))
        return
    calls = {name: attempt(name, make) for name, make in makers.items()}
    times = {name: [] for name in makers}
    for repeat in range(2 + CPU_REPEATS):
        for name, call in calls.items():
            begin = time.perf_counter()
            if call:
                call()
            if repeat > 1:
                times[name].append(1000 * (time.perf_counter() - begin))
    for name, call in calls.items():
        yield name, statistics.median(times[name]) if call else None


def attempt(name: str, make: Callable):
    """make(), or None and a line on stderr: one contender's failure is no reason to time nobody."""
    try:
        return make()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        print(f"  {name}: {type(error).__name__}: {reason[:200]}", file=sys.stderr)
        return None


def release() -> None:
    """Give back the GPU memory of whoever is gone, also of those that refer to themselves, as a
    train.Run does. Takes a tenth of a second."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def graph_median(call: Callable) -> float:
    """Milliseconds of a call in a CUDA graph."""
    return triton.testing.do_bench_cudagraph(call, rep=GPU_MILLISECONDS, return_mode="median")


def step_median(call: Callable) -> float:
    """Milliseconds with everything that the host does, unlike an operation's: blocks of calls that
    nothing waits for in between, as a program makes them."""
    for _ in range(5):  # train.py's steps are captured at the fourth
        call()
    times = []
    for _ in range(STEP_BLOCKS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(STEPS_PER_BLOCK):
            call()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin) / STEPS_PER_BLOCK)
    return statistics.median(times)


# --- Calls ----------------------------------------------------------------------------------------


def forward(function: Callable, inputs: list[Tensor]) -> Callable:
    """The forward pass alone, as a call without arguments; it is run once to see that it can."""
    call = partial(function, *inputs)
    call()
    return call


def both_ways(function: Callable, inputs: list[Tensor]) -> Callable:
    """Forward and backward pass, in one call without arguments."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    upstream = torch.randn_like(function(*inputs))

    def call():
        torch.autograd.grad(function(*inputs), inputs, upstream)

    call()
    return call


# --- Bounds and memory ----------------------------------------------------------------------------


class Rates(NamedTuple):
    """What this GPU reaches; exponentials by NVIDIA's table of arithmetic throughput, 16 a clock in
    each processor."""

    bytes: float  # a second
    products: float  # operations a second, bf16
    exponentials: float

    def milliseconds(self, nbytes: float, products: float, exponentials: float = 0) -> float:
        return 1000 * max(
            nbytes / self.bytes, products / self.products, exponentials / self.exponentials
        )


def rates() -> Rates:
    properties = torch.cuda.get_device_properties(0)
    x = torch.empty(2**29, device="cuda", dtype=torch.uint8)
    copied = 2 * x.numel() / (graph_median(lambda: x.clone()) / 1000)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    products = 2 * 8192**3 / (graph_median(lambda: a @ a) / 1000)
    clock = 1e6 * float(ask_gpu("clocks.max.sm") or "inf")  # unknown: no floor by exponentials
    return Rates(copied, products, 16 * clock * properties.multi_processor_count)


def extra_megabytes(call: Callable) -> float:
    """GPU memory at its highest during a call, beyond what there was before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
