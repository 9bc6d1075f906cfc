"""What every test shares."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import cli

# torch.empty is filled with NaN, so an output that nobody wrote shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def program(capsys):
    """program(main, errors, *arguments) runs a program in this process -> (exit code, stderr)."""

    def call(main, errors, *arguments):
        with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["program.py", *map(str, arguments)])
            cli.run(main, *errors)
        return ended.value.code or 0, capsys.readouterr().err

    return call


@pytest.fixture
def write_folder():
    """write_folder(root) makes a small data set in the layout of `--data folder` -> root."""

    def write(root, splits=("train", "val"), ignore=255, names=("a", "b", "c"), size=(40, 48)):
        rng = np.random.default_rng(0)
        entry = {"classes": list(names), "ignore": ignore}
        root.mkdir(exist_ok=True)
        (root / "classes.json").write_text(json.dumps(entry))
        for split in splits:
            for kind in ("images", "masks"):
                (root / split / kind).mkdir(parents=True)
            for name in ("x", "y"):
                image = rng.integers(0, 256, (*size, 3), np.uint8)
                mask = rng.integers(0, len(names), size).astype(np.uint8)
                mask[0, 0] = ignore
                Image.fromarray(image).save(root / split / "images" / f"{name}.png")
                Image.fromarray(mask).save(root / split / "masks" / f"{name}.png")
        return root

    return write
