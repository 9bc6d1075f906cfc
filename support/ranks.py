"""Several processes that train one model, or share out scenes: what torchrun starts.

    torchrun --nproc-per-node 8 train.py ...        # a process and a GPU each; on CPUs gloo

    ranks = Ranks.join()            # alone without torchrun: then nothing below does anything
    ranks.add_up(x)                 # the sum of all ranks' x; gradients flow through it
    ranks.average(gradients)        # in place
    ranks.agree(number)             # the largest; once a step
    ranks.from_first(function)      # done by rank 0, known to all

Each rank computes the loss of the whole batch: where the loss adds up pixels or positions, the
ranks' sums are added (CTCLM.add_up), and batch statistics are those of all ranks. So every rank has
the same loss, and the mean of their gradients is its gradient. DistributedDataParallel would
average them too, while the backward pass still runs. One call after it is simpler, and 8 million
gradients are 30 MB.

Only rank 0 writes and prints. A rank that does not answer ends the run: the others wait for
TIMEOUT and name it.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.cli import require

TIMEOUT = 600.0  # seconds without an answer; decoding a data set may take minutes
GRACE = 5.0  # within which the others notice too


class StalledError(RuntimeError):
    """A rank does not answer; the message names it."""


class Ranks:
    """This process among `count`, as number `rank`."""

    def __init__(self, rank: int = 0, count: int = 1, store=None):
        self.rank, self.count, self.store = rank, count, store

    @classmethod
    def join(cls, quiet: bool = True) -> "Ranks":
        """Meet the processes that torchrun started with this one. quiet: only rank 0 prints."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

        timeout = datetime.timedelta(seconds=TIMEOUT)
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        on_gpus = torch.cuda.is_available()
        if on_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        if quiet and rank > 0:
            sys.stdout = open(os.devnull, "w")
        inner = dist.PrefixStore("torch", store)
        dist.init_process_group(backend, store=inner, rank=rank, world_size=count, timeout=timeout)
        return cls(rank, count, dist.PrefixStore("ctclm", store))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share_of_batch(self, batch: int) -> int:
        """How many of its windows are this rank's; UsageError unless all ranks have as many."""
        fits = batch % self.count == 0
        require(fits, f"--batch {batch} is not a multiple of {self.count}, the number of processes")
        return batch // self.count

    def share_of(self, scenes):
        """Every `count`-th of them: the ones of this rank."""
        return scenes[self.rank :: self.count]

    # --- What is added up ---

    def share_batch(self, model: nn.Module) -> None:
        """The model's batch statistics and its objective become those of all ranks' windows."""
        if self.count == 1:
            return
        model.add_up = self.add_up
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__, module.ranks = SharedBatchNorm, self

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over ranks of x, float. Its backward pass is a sum over ranks too."""
        return AddUp.apply(x, self)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its mean over ranks: one call for all of them."""
        if self.count == 1:
            return
        tensors = [*tensors]
        flat = torch.cat([x.flatten() for x in tensors])
        self.reduce(flat)
        flat /= self.count
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))

    def agree(self, number: int) -> int:
        """The largest `number` of all ranks: one that was told to stop stops all of them."""
        if self.count == 1:
            return number
        numbers = torch.tensor([number])
        self.reduce(numbers, "MAX")
        return int(numbers)

    def gather(self, entry) -> list:
        """What each rank has, from rank 0 on."""
        if self.count == 1:
            return [entry]
        found = [None] * self.count
        self.together(dist.all_gather_object, found, entry)
        return found

    def from_first(self, function: Callable):
        """What function() returns on rank 0, on all ranks. Its exception ends all of them."""
        if self.count == 1:
            return function()
        found, error = [None], None
        if self.is_first:
            try:
                found = [(function(),)]
            except (Exception, SystemExit) as caught:
                error = caught
        self.together(dist.broadcast_object_list, found)
        if error:
            raise error
        if found[0] is None:
            sys.exit(2)  # rank 0 says why
        return found[0][0]

    def reduce(self, x: Tensor, operation: str = "SUM") -> None:
        self.together(dist.all_reduce, x, getattr(dist.ReduceOp, operation))

    # --- Who does not answer ---

    def together(self, operation: Callable, *arguments) -> None:
        """operation(*arguments), which waits for the others; StalledError if one stays away."""
        try:
            operation(*arguments)
        except RuntimeError as error:
            if not (missing := self.missing()):  # everyone waits: the network
                raise
            raise StalledError(
                f"rank {', '.join(map(str, missing))} of {self.count} does not answer: it has "
                f"ended, or it hangs for more than {TIMEOUT:.0f} s; find out why, then go on with "
                f"--resume"
            ) from error

    def missing(self) -> list[int]:
        """The ranks that do not say in the store that they, too, have waited in vain. Some find out
        later than others: as long as two are missing there is GRACE."""
        others, end = {*range(self.count)} - {self.rank}, time.monotonic() + GRACE
        try:
            self.store.set(f"waited {self.rank}", "")
            while True:
                missing = [rank for rank in others if not self.store.check([f"waited {rank}"])]
                if len(missing) < 2 or time.monotonic() > end:
                    return missing
                time.sleep(0.1)
        except RuntimeError:  # without torchrun rank 0 has the store, and is gone
            return [0]


ALONE = Ranks()


class AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, total = ranks, x.clone()
        ranks.reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        total = gradient.clone(memory_format=torch.contiguous_format)
        ctx.ranks.reduce(total)
        return total, None


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all ranks' batches, which are of one size.

    nn.SyncBatchNorm does the same, but on GPUs only. Ranks.share_batch sets `ranks`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()  # (B, C, H, W)
        n = values.numel() / x.shape[1] * self.ranks.count
        mean = self.ranks.add_up(values.sum((0, 2, 3))) / n
        centred = values - mean[:, None, None]
        variance = self.ranks.add_up(centred.square().sum((0, 2, 3))) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        y = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)
