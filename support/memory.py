"""Memory of a training step: what it took, what half the batch would take, and how to take less.

    peak_bytes(device)                              # of this process so far, for metrics.json
    bytes_for_backward(function, parameters)        # what a step keeps, from a smaller one
    encode_in_parts(model.branches.values(), 4)     # they keep a quarter of the batch at a time

What a training step needs most is the features that its forward pass keeps for its backward pass.
"""

import re
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_again

from support.checkpoint import megabytes
from support.cli import UsageError, require

# --- What a step takes ----------------------------------------------------------------------------


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that this process has had on `device`; None on a CPU under Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # on Linux ru_maxrss may be that of the process's parent
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bytes_for_backward(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """What forward() keeps for the backward pass, without the parameters themselves."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}  # bytes of each storage, however many tensors share it

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()  # held, so that no address is used twice
    del output
    return sum(kept.values())


def ran_out(error: RuntimeError) -> bool:
    """Whether a GPU had too little memory, or a CPU."""
    is_gpu = isinstance(error, torch.OutOfMemoryError)
    return is_gpu or "DefaultCPUAllocator: can't allocate memory" in str(error)


def explained(error: RuntimeError, run) -> RuntimeError | UsageError:
    """The error of a train.Run; of one that ran out of memory what to change, and what it gains."""
    if not ran_out(error):
        return error
    c = run.config
    traceback.clear_frames(error.__traceback__)  # they hold what did not fit
    text = f"out of memory: {c.batch} windows of {c.crop} x {c.crop} do not fit"
    if c.batch == 1:
        return UsageError(f"{text}; lower --crop")
    takes, half = "", c.batch // 2
    if run.ranks.count == c.accumulate == 1:  # several would wait for one another's sums
        with suppress(RuntimeError):  # two windows may be too many
            takes = f" (--batch {half} takes about {megabytes(bytes_of_step(run, half))})"
    share = run.ranks.share_of_batch(c.batch)
    more = [parts for parts in range(2 * c.accumulate, share + 1) if share % parts == 0]
    keep_both = f", or keep both with --accumulate {more[0]}" if more else ""
    return UsageError(f"{text}; lower --batch or --crop{takes}{keep_both}")


def bytes_of_step(run, batch: int) -> int:
    """What a step of so many windows takes, worked out from the forward pass of two."""
    run.one_update = run.last_output = None
    run.optimizer.zero_grad()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    learning = [p for p in run.model.parameters() if p.requires_grad]
    side, channels = run.config.crop, run.windows.scenes[0].image.shape[2]
    images = torch.zeros(2, channels, side, side, device=run.device)
    labels = torch.zeros(2, side, side, dtype=torch.uint8, device=run.device)
    with run.autocast:
        kept = bytes_for_backward(lambda: run.forward(images, labels, 1.0), learning)
    copies = 4  # the weights, their gradients, AdamW's two moments
    return copies * sum(p.nbytes for p in learning) + kept * batch // 2


# --- How it takes less ----------------------------------------------------------------------------


def require_equal_parts(windows: int, parts: int) -> None:
    """UsageError unless so many windows, of one process, can be cut into so many equal parts."""
    possible = ", ".join(str(n) for n in range(1, windows + 1) if windows % n == 0)
    require(
        windows % parts == 0,
        f"--accumulate {parts} does not divide the {windows} windows of a process; take one of "
        f"{possible}",
    )


def encode_in_parts(branches: Iterable[nn.Module], parts: int) -> None:
    """Each branch's `encode` takes `parts` of a batch in turn, and keeps nothing but the features.

    The backward pass computes a part again when it comes to it. No image depends on another before
    the head, whose batch statistics stay those of the whole batch. So do the gradients.
    """
    if parts > 1:
        for branch in branches:
            branch.encode = in_parts(branch.encode, parts)


def in_parts(encode: Callable[[Tensor], list[Tensor]], parts: int):
    """`encode`, images (B, ...) -> a list of features (B, ...), part by part."""

    def encode_parts(images: Tensor) -> list[Tensor]:
        options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is random
        found = [computed_again(encode, part, **options) for part in images.chunk(parts)]
        return [torch.cat(features) for features in zip(*found, strict=True)]

    return encode_parts
