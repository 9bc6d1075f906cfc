"""Gradients that are not finite: named without waiting for a GPU, which finds them in its own time.

require_finite(norms, names, first=100, what="windows 0..7 of that step, seed 0")
"""

import math

from torch import Tensor


class DivergedError(ArithmeticError):
    """Training cannot go on; the message says where and what to try."""


def require_finite(recent: list[Tensor], names: list[str], first: int, what: str) -> None:
    """DivergedError for the first step whose gradient is not finite.

    recent: of the steps from `first` on, the norms of the parts called `names`. `what` are the
    windows of each.
    """
    for step, norms in enumerate(recent, first):
        for name, norm in zip(names, norms.tolist(), strict=True):
            if not math.isfinite(norm):
                raise DivergedError(
                    f"the gradient of the {name} is not finite at step {step} ({what}); last.pt, "
                    f"if there is one, is of an earlier step; try a lower --lr in another --out"
                )
