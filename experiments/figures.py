"""The pictures for pages and slides, drawn by this script and never by hand.

    python -m experiments.figures                   # all of them, into docs/figures/; trains for
    python -m experiments.figures method dual_cell  # the last one, some minutes on a CPU

method       one training step from the image to the losses
multiscale   the CNN's block: five depthwise kernels and their sum
attention    the tall score matrix, and how a program walks along it
dual_cell    upsampling by four: what depends on what, forward and backward
teaching     who teaches whom on a toy scene

A picture that a script draws changes together with the method.
"""

import sys
from pathlib import Path

from experiments.figures_method import method
from experiments.figures_parts import attention, dual_cell, multiscale
from experiments.figures_teaching import teaching

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
FIGURES = {
    "method": method,
    "multiscale": multiscale,
    "attention": attention,
    "dual_cell": dual_cell,
    "teaching": teaching,
}


def main(names: list[str]) -> None:
    if unknown := sorted({*names} - {*FIGURES}):
        sys.exit(f"figures.py: there is no figure {unknown[0]}; there are {', '.join(FIGURES)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names or FIGURES:
        path = FOLDER / f"{name}.png"
        FIGURES[name]().finished().save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
