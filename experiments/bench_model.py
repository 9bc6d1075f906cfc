"""The whole program timed: a training step, where its time goes, inference, a scene.

    python -m experiments.bench step scene --peer

The training step is train.Run's own, from a batch in the host's memory to new weights, and the
scene goes through infer.py from file to file: what is timed is what users run. The peer is Hugging
Face's SegFormer of the same widths and depths, trained as its users do: its own cross entropy at
full size, AdamW, bf16 autocast on a GPU.

Letters: B batch, C channels, H W pixels, K classes.
"""

import io
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import infer
from ctclm import CTCLM, VARIANTS, ModelConfig, Transformer
from experiments.settings import SETTINGS
from experiments.timing import Rates, Table, attempt, release, step_median
from support import diagnostics, toy
from support.about import About
from support.layouts import POTSDAM
from support.machine import pick_device
from support.precision import at_precision
from support.replay import replayed_on
from train import Config, Run

GPU_STEPS = [("b0", 16, 512), ("b2", 16, 512)]  # variant, B, side of the images
CPU_STEPS = [("tiny", 8, 128)]
PARTS = {"both branches": "full", "Transformer alone": "transformer"}  # the setting that trains it
GPU_SCENE, CPU_SCENE = ("b0", 6000), ("tiny", 768)  # variant, side
TWO_RUNS = 6  # steps; train.py replays from the fourth on
SCENES = 3  # mapped after the first, which also starts everything up
K = len(POTSDAM.names)


# --- A training step ------------------------------------------------------------------------------


def bench_step(table: Table, rate: Rates | None, options) -> None:
    for variant, B, side in GPU_STEPS if rate else CPU_STEPS:
        batch, what = batch_of(B, side), f"training step {variant} B={B} {side}x{side}"
        for part, setting in PARTS.items():
            makers = {"ours": partial(our_step, setting, variant, batch)}
            if options.peer:
                makers["transformers"] = partial(peer_step, variant, batch, table.device)
            if options.compiled:
                makers["ours, torch.compile"] = partial(our_step, setting, variant, batch, True)
            if options.compiled and options.peer and setting == "transformer":
                compiled = partial(peer_step, variant, batch, table.device, True)
                makers["transformers, torch.compile"] = compiled
            table.compare(f"{what} {part}", makers, timer=step_median)
        bench_inference(table, variant, [(B, side), (1, side)], bool(rate), options.peer)
        attempt("two runs", partial(add_two_runs, table, what, variant, batch))
        if rate:
            attempt("profile", partial(add_profile, table, what, variant, batch))
    if not rate:
        for variant, _, side in GPU_STEPS:
            add_counts(table, variant, side, options.peer)
    torch.backends.cudnn.deterministic = False  # as before: train.Run has set it


def batch_of(B: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """As the windows come: images (B, 3, H, W) and labels (B, H, W), uint8; a tenth ignored."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (B, 3, side, side), np.uint8)
    labels = rng.integers(0, K, (B, side, side), np.uint8)
    labels[rng.random(labels.shape, np.float32) < 0.1] = 255
    return images, labels


def our_run(setting: str, variant: str, batch, compiled: bool = False) -> Run:
    """A run of train.py whose windows are always the same."""
    release()
    B, _, side, _ = batch[0].shape
    torch.manual_seed(0)
    with pick_device("auto"):  # made where it runs: initial weights take long on a CPU
        model = SETTINGS[setting].build(ModelConfig(variant=variant, num_classes=K))
    config = Config(variant=variant, batch=B, crop=side, lr=1e-4, compile=compiled)
    return Run(config, model, windows=None, val_set=None)


def our_step(setting: str, variant: str, batch, compiled: bool = False) -> Callable:
    return partial(our_run(setting, variant, batch, compiled).train_step, *batch)


def peer_step(variant: str, batch, device: torch.device, compiled: bool = False) -> Callable:
    release()
    torch.backends.cudnn.deterministic = False  # its users let cuDNN choose; train.Run does not
    with device:
        model = peer(variant).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    forward = torch.compile(model) if compiled else model

    def step():
        images, labels = (torch.from_numpy(x).to(device) for x in batch)
        with autocast:
            loss = forward(pixel_values=images.float(), labels=labels.long()).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def peer(variant: str, classes: int = K) -> nn.Module:
    """Hugging Face's SegFormer of this variant, random weights. Not imported by name: nothing here
    needs the package unless it is asked for."""
    v, transformers = VARIANTS[variant], import_module("transformers")
    config = transformers.SegformerConfig(
        depths=list(v.depths),
        hidden_sizes=list(v.channels),
        num_attention_heads=list(v.heads),
        decoder_hidden_size=v.head_width,
        num_labels=classes,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def add_two_runs(table: Table, what: str, variant: str, batch) -> None:
    """How many tensors of the weights differ between two runs of a few steps."""
    runs = []
    for _ in range(2):
        run = None  # one at a time
        run = our_run("full", variant, batch)
        for _ in range(TWO_RUNS):
            run.train_step(*batch)
        runs.append([p.detach().cpu() for p in run.model.parameters()])
    differ = sum(not torch.equal(a, b) for a, b in zip(*runs, strict=True))
    table.add(f"{what} weights, two runs", "ours", differ, unit="tensors")


# --- Inference ------------------------------------------------------------------------------------


def bench_inference(table: Table, variant: str, sizes, on_gpu: bool, with_peer: bool) -> None:
    """Images on the device -> logits, the whole model in one precision, as infer.py runs it."""
    for precision in ("bf16", "fp32") if on_gpu else ("fp32",):
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        models = {"ours": (partial(deployed, variant, precision), torch.float32)}
        if on_gpu:
            called = partial(deployed, variant, precision, replayed=False)
            models["ours, call by call"] = called, torch.float32
        if with_peer:
            models["transformers"] = (lambda dtype=dtype: peer(variant).to(dtype), dtype)
        for B, side in sizes:
            shape, device = (B, 3, side, side), table.device
            makers = {
                how: partial(inference, make, shape, images, device)
                for how, (make, images) in models.items()
            }
            what = f"inference {variant} B={B} {side}x{side} {precision}"
            table.compare(what, makers, timer=step_median)


def deployed(variant: str, precision: str, replayed: bool = True) -> nn.Module:
    model = at_precision(Transformer(VARIANTS[variant], K, 3), precision)
    if replayed:
        model.forward = replayed_on(model.normalise.mean.device, model.forward)
    return model


def inference(make: Callable, shape, dtype: torch.dtype, device: torch.device) -> Callable:
    release()
    torch.backends.cudnn.deterministic = False  # train.Run has set it
    with device:
        model, images = make().eval(), torch.randint(256, shape).to(dtype)

    @torch.no_grad()
    def call():
        return model(images)

    return call


# --- Where a step's time goes ---------------------------------------------------------------------


def add_profile(table: Table, what: str, variant: str, batch) -> None:
    """The kernels' share of the GPU's time in one step, what else takes most, and launches. Call by
    call, not replayed: a graph does not say which operation a kernel belongs to."""
    run = our_run("full", variant, batch)
    numbers = map(torch.tensor, (run.learning_rate(run.step), 1.0))
    inputs = [x.to(table.device) for x in (*map(torch.from_numpy, batch), *numbers)]
    for _ in range(3):
        run.update(*inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run.update(*inputs)
        torch.cuda.synchronize()
    milliseconds, launches = device_times(profiled.events())
    total = sum(milliseconds.values())
    ours = Counter({name: ms for name, ms in milliseconds.items() if name.startswith("ctclm::")})
    others = Counter({name: ms for name, ms in milliseconds.items() if name not in ours})
    table.add(f"{what} launches", "ours", launches, unit="")
    table.add(f"{what} on the GPU", "ours", total)
    what = f"{what} share of the GPU's time"
    table.add(what, "our kernels", 100 * ours.total() / total, unit="%")
    for name, ms in [*ours.most_common(), *others.most_common(12)]:
        table.add(what, name, 100 * ms / total, unit="%")


def device_times(events) -> tuple[dict[str, float], int]:
    """Milliseconds on the GPU by operation, and the number of launches, from a profiler's events.

    What runs inside one of our operations is its own: sums and copies too. What no operation of the
    host has launched, as in a graph, goes by its kernel's name."""
    times, total, launches = Counter(), Counter(), 0
    for event in events:
        if event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                times[owner(event)] += kernel.duration / 1000
        elif not event.is_user_annotation:
            launches += 1
            total[event.name[:60]] += event.device_time_total / 1000
    return dict(times if times else total), launches


def owner(event) -> str:
    """The name of an operation, or of the one of ours that it is a part of."""
    outer = event
    while outer is not None:
        if outer.name.startswith("ctclm::"):
            return outer.name
        outer = outer.cpu_parent
    return event.name


# --- What a step does, counted without a GPU ------------------------------------------------------


NO_WORK = ("aten._unsafe_view", "aten.empty", "aten.new_empty")


class Operations(TorchDispatchMode):
    """Counts what PyTorch runs that makes new values: on a GPU about one launch each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or str(func).startswith(NO_WORK))
        return func(*args, **(kwargs or {}))


def add_counts(table: Table, variant: str, side: int, with_peer: bool) -> None:
    """Operations of a step's forward and backward pass, which do not depend on the size, and
    multiply-adds of the forward pass for one image."""
    images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64).long()
    models = {part: SETTINGS[PARTS[part]].build(ModelConfig(variant, K)) for part in PARTS}
    losses = {part: partial(loss_of, model) for part, model in models.items()}
    if with_peer:
        models["transformers"] = model = peer(variant)
        losses["transformers"] = lambda x, y: model(pixel_values=x, labels=y).loss
    for name, model in models.items():
        with Operations() as counter:
            losses[name](images, labels).backward()
        table.add(f"step {variant}, operations", name, counter.count, unit="")
        after = getattr(model, "shared_space", None)
        cost = diagnostics.count(model, (3, side, side), after)["multiply_adds"]
        what = f"image {variant} {side}x{side} forward, multiply-adds"
        table.add(what, name, cost / 1e9, unit="G")


def loss_of(model: nn.Module, images, labels) -> torch.Tensor:
    return model.objective(model(images), labels).total


# --- A scene --------------------------------------------------------------------------------------


def bench_scene(table: Table, rate: Rates | None, options) -> None:
    variant, side = GPU_SCENE if rate else CPU_SCENE
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_scene(folder / "scene.tif", side)
        model = CTCLM(ModelConfig(variant=variant, num_classes=K))
        about = About(POTSDAM, "toy", "rgb", step=0, val_miou=0.0)
        infer.save_transformer(model, folder / "best.pt", about)
        arguments = [
            str(folder / "best.pt"),
            str(folder / "scene.tif"),
            "--out",
            str(folder / "maps"),
        ]
        seconds = []
        for _ in range(1 + SCENES):
            begin = time.perf_counter()
            with redirect_stdout(io.StringIO()):
                infer.main(arguments)
            seconds.append(time.perf_counter() - begin)
    what, median = f"scene {variant} {side}x{side}", statistics.median(seconds[1:])
    table.add(f"{what} file to file, first", "ours", seconds[0], unit="s")
    table.add(f"{what} file to file", "ours", median, unit="s")
    table.add(f"{what} speed", "ours", side**2 / 1e6 / median, unit="Mpx/s")


def write_scene(path: Path, side: int) -> None:
    """An uncompressed TIFF of toy scenes, side by side."""
    image, _ = toy.scene(0, 512)
    repeats = -(-side // 512)
    Image.fromarray(np.tile(image, (repeats, repeats, 1))[:side, :side]).save(path)
