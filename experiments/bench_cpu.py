"""A CPU, next to Hugging Face's SegFormer with the same weights: inference, and a training step.

    OMP_NUM_THREADS=2 python -m experiments.bench cpu --json FILE

Contenders take turns, in one process and with one allocator (support/machine.py), so their ratios
hold where a single time does not. Without the package transformers its rows are empty.

    inference       an image of 512 x 512 pixels -> logits, b0, as infer.py runs a window: without
                    and with --compile
    training step   4 windows of 256 x 256 pixels, b0: the Transformer alone, and both branches;
                    then what the parts of the second take by themselves
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ctclm import VARIANTS, Output, Transformer
from experiments.bench_model import PARTS, K, batch_of, our_run, our_step, peer, peer_step
from experiments.timing import Rates, Table, attempt
from infer import predict_classes
from support import pretrained, toy
from support.precision import Compiled, at_precision

VARIANT, WINDOW = "b0", 512  # of inference, one image
BATCH, CROP = 4, 256  # of a training step


def bench_cpu(table: Table, rate: Rates | None, options) -> None:
    if rate:
        return print("the section cpu is for a machine without a GPU")
    bench_inference(table)
    bench_training(table)


# --- Inference ------------------------------------------------------------------------------------


@torch.no_grad()
def bench_inference(table: Table) -> None:
    torch.manual_seed(0)
    what = f"inference {VARIANT} B=1 {WINDOW}x{WINDOW}"
    ours, fast = (Transformer(VARIANTS[VARIANT], K, 3).eval() for _ in range(2))
    theirs = attempt("transformers", lambda: peer(VARIANT).eval())
    if theirs:
        take_weights(ours, theirs)
    fast.load_state_dict(ours.state_dict())
    at_precision(fast, "auto", compiled=True)
    fast.forward = Compiled(fast.forward)

    images = 255 * torch.rand(1, 3, WINDOW, WINDOW)
    calls = {"ours": ours, "ours, --compile": fast}
    if theirs:
        calls["transformers"] = partial(logits_of, theirs)
        difference = (ours(images) - logits_of(theirs, ours.normalise(images))).abs().max()
        table.add(f"{what} logits", "largest difference", difference.item(), unit="")
    table.compare(what, {name: partial(calling, call, images) for name, call in calls.items()})
    image, _ = toy.scene(0, WINDOW)
    (plain, _), (other, _) = (predict_classes(model, image) for model in (ours, fast))
    changed = 100 * (plain != other).mean()
    table.add(f"{what} pixels of another class", "ours, --compile", changed, unit="%")


def take_weights(ours: Transformer, theirs: nn.Module) -> None:
    """Through a file, as a user does."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        pretrained.start_from(ours, pretrained.read(Path(folder) / "model.safetensors"))


def logits_of(theirs: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return theirs(pixel_values=images).logits


def calling(function: Callable, *inputs) -> Callable:
    """A call without arguments that never keeps a gradient; it is run once to see that it can."""

    @torch.no_grad()
    def call():
        function(*inputs)

    call()
    return call


# --- A training step ------------------------------------------------------------------------------


def bench_training(table: Table) -> None:
    batch = batch_of(BATCH, CROP)
    makers = {name: partial(our_step, setting, VARIANT, batch) for name, setting in PARTS.items()}
    makers["transformers"] = partial(peer_step, VARIANT, batch, table.device)
    what = f"training step {VARIANT} B={BATCH} {CROP}x{CROP}"
    table.compare(what, makers)
    table.compare(f"{what}, the parts of both branches", parts_of_a_step(batch))


def parts_of_a_step(batch) -> dict[str, Callable]:
    """Makers of calls: each branch forward and backward, the objective both ways, the update."""
    run = our_run("full", VARIANT, batch)
    images, labels = torch.from_numpy(batch[0]).float(), torch.from_numpy(batch[1])
    model, output = run.model, run.model(images)
    leaves = Output(*(detached(part) for part in output))

    def branch(module: nn.Module):
        features = module.encode(images)
        sum(x.sum() for x in (*features, module.head(features))).backward()

    def objective():
        model.objective(leaves, labels).total.backward()

    def update():
        run.clip_gradients()
        run.optimizer.step()

    objective()  # the projectors' gradients
    calls = {name: partial(branch, module) for name, module in model.branches.items()}
    calls |= {"objective": objective, "clip and AdamW": update}
    return {name: partial(warm, call) for name, call in calls.items()}


def detached(part):
    """A tensor or a list of them as leaves, which get a gradient and pass none on."""
    if isinstance(part, list):
        return [detached(x) for x in part]
    return part.detach().requires_grad_()


def warm(call: Callable) -> Callable:
    call()
    return call
