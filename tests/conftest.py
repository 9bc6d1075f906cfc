"""What every test shares."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

# Without a GPU Triton's kernels run in its interpreter, which is chosen when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import cli  # noqa: E402
import kernels  # noqa: E402

# torch.empty is filled with NaN, so an output that nobody wrote shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_triton():
    """The interpreter is slow: a test that wants the kernels says so by `force("triton")`."""
    with kernels.force("pytorch"):
        yield


@pytest.fixture
def device():
    """Where Triton's kernels run: on the GPU, or in the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def no_worse():
    """no_worse(ours, theirs, exact, summands, name): our error is at most twice that of PyTorch's
    operations in the same dtype (the criterion of FlashAttention's tests), in the Frobenius norm.
    `exact` is float64; `summands` the size of what it adds up, itself where nothing cancels: 8
    roundings of it in float32 are allowed where PyTorch happens to err by nothing."""

    def check(ours, theirs, exact, summands, name=""):
        assert ours.dtype == theirs.dtype and ours.shape == exact.shape, name
        error, allowed = ((x.double() - exact).norm().item() for x in (ours, theirs))
        slack = 8 * torch.finfo(torch.float32).eps * summands.norm().item() + 1e-30
        assert error <= 2 * allowed + slack, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"

    return check


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
