"""What every test shares."""

import importlib.util
import inspect
import json
import os
import struct
import sys
import zlib
from contextlib import nullcontext
from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

# Without a GPU Triton's kernels run in its interpreter, which is chosen when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import kernels  # noqa: E402
from kernels.choose import triton  # noqa: E402
from support import cli, toy  # noqa: E402
from support.labels import encode_colours  # noqa: E402
from support.layouts import ISPRS, POTSDAM, SPLITS  # noqa: E402


def quicken_interpreter():
    """The interpreter replaces Triton's builtins whenever one Triton function calls another, and
    looks through whole modules for them: 40 % of its time. Here it looks once for each module."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def builtins_of(module):
        return [(name, member) for name, member in inspect.getmembers(module) if is_builtin(member)]

    def patch_builtin(module, *how):
        for name, member in builtins_of(module):
            if getattr(module, name) is member:
                interpreter._patch_attr(module, name, member, *how)

    interpreter._patch_builtin = patch_builtin


if os.environ.get("TRITON_INTERPRET") == "1" and triton:
    quicken_interpreter()

# torch.empty is filled with NaN, so an output that nobody wrote shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.backends.cudnn.allow_tf32 = False  # float32 convolutions are held to float64's on a GPU too


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_triton(request):
    """The interpreter is slow: a test that wants the kernels says so by `force("triton")`. On a GPU
    the rule holds that users have."""
    on_gpu = request.node.get_closest_marker("gpu")
    with nullcontext() if on_gpu else kernels.force("pytorch"):
        yield


@pytest.fixture
def any_algorithm():
    """As in the programs: they do not ask PyTorch for the deterministic versions of operations."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def towns():
    """The first 30 toy scenes, read-only: a quarter of a second each, so they are made once."""
    found = [toy.scene(seed) for seed in range(30)]
    for array in chain.from_iterable(found):
        array.flags.writeable = False
    return found


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
def rasterio_python():
    """A Python with rasterio, the oracle: this one, or that which RASTERIO_PYTHON names. Neither
    the software nor its other tests need it."""
    python = os.environ.get("RASTERIO_PYTHON")
    if not python and importlib.util.find_spec("rasterio"):
        python = sys.executable
    if not python:
        pytest.skip("rasterio is not installed, and RASTERIO_PYTHON names no Python that has it")
    return python


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


@pytest.fixture
def small(tmp_path, write_folder):
    """small(**options) -> a train.Config for a run of a second, on 2 + 2 images of 96 x 64."""
    import train

    root = write_folder(tmp_path / "data", size=(64, 96))

    def config(**options):
        settings = {"data": "folder", "root": root, "steps": 6, "batch": 2, "crop": 32}
        return train.Config(**settings | {"out": tmp_path / "run", "device": "cpu"} | options)

    return config


@pytest.fixture
def write_tiff():
    """write_tiff(path, pixels (H, W, C), ...) writes what Pillow cannot -> path.

    rows a strip, or tiles (height, width); planes apart; deflate; big-endian; BigTIFF; `tags` are
    {number: (type, values)} that are added or replace ours.
    """
    letters = {1: "B", 2: "s", 3: "H", 4: "I", 12: "d", 16: "Q"}

    def write(
        path,
        pixels,
        rows=None,
        tile=None,
        planar=False,
        deflate=False,
        order="<",
        big=False,
        tags=(),
    ):
        H, W, C = pixels.shape
        height, width = tile or (rows or H, W)
        chunks = []
        for bands in [[band] for band in range(C)] if planar else [[*range(C)]]:
            for y in range(0, H, height):
                for x in range(0, W, width):
                    chunk = pixels[y : y + height, x : x + width][..., bands]
                    if tile:
                        missing = ((0, height - chunk.shape[0]), (0, width - chunk.shape[1]))
                        chunk = np.pad(chunk, (*missing, (0, 0)))
                    data = chunk.astype(chunk.dtype.newbyteorder(order)).tobytes()
                    chunks.append(zlib.compress(data) if deflate else data)
        body, offsets = b"".join(chunks), [16]  # a gap after the header of 8 or 16 bytes
        for chunk in chunks:
            offsets.append(offsets[-1] + len(chunk))
        number = 16 if big else 4
        entries = {
            256: (4, [W]),
            257: (4, [H]),
            258: (3, [8 * pixels.itemsize] * C),
            259: (3, [8 if deflate else 1]),
            262: (3, [2 if C > 2 else 1]),
            277: (3, [C]),
            284: (3, [2 if planar else 1]),
            324 if tile else 273: (number, offsets[:-1]),
            325 if tile else 279: (number, [*map(len, chunks)]),
        }
        entries |= {322: (4, [width]), 323: (4, [height])} if tile else {278: (4, [height])}
        entries |= {338: (3, [0] * (C - 3))} if C > 3 else {}
        entries |= dict(tags)
        count, entry, room = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
        start = 16 + len(body)
        after = start + struct.calcsize(order + count) + len(entries) * (4 + 2 * room) + room
        table, values = struct.pack(order + count, len(entries)), b""
        for tag, (kind, value) in sorted(entries.items()):
            n = len(value)
            data = value if kind == 2 else struct.pack(f"{order}{n}{letters[kind]}", *value)
            if len(data) > room:
                place = struct.pack(order + ("Q" if big else "I"), after + len(values))
                values += data
            else:
                place = data.ljust(room, b"\0")
            table += struct.pack(order + entry, tag, kind, n) + place
        name = b"II" if order == "<" else b"MM"
        head = struct.pack(order + "2sH", name, 43 if big else 42)
        head += (
            struct.pack(order + "HHQ", 8, 0, start) if big else struct.pack(order + "I8x", start)
        )
        path.write_bytes(head + body + table + bytes(room) + values)
        return path

    return write


@pytest.fixture
def write_isprs(write_tiff):
    """write_isprs(root, ...) makes a small ISPRS data set, one toy scene a split -> root.

    Each image in each of `kinds`: RGB, IRRG (the red band stands for infrared) or RGBIR.
    """

    def write(root, data="potsdam", kinds=("RGB",), eroded=False, size=128, splits=SPLITS):
        for number, split in enumerate(splits):
            image, label = toy.scene(number, size)
            tile = ISPRS[data].splits[split].split()[0]
            infrared = (255 - image[..., 2:3] // 2).astype(np.uint8)  # bright where blue is not
            images = {
                "RGB": image,
                "IRRG": np.concatenate([infrared, image[..., :2]], axis=2),
                "RGBIR": np.concatenate([image, infrared], axis=2),
            }
            if data == "potsdam":
                paths = {k: f"{k}/top_potsdam_{tile}_{k}.tif" for k in kinds}
                labels = f"5_Labels_all/top_potsdam_{tile}_label.tif"
            else:
                paths = {"IRRG": f"top/top_mosaic_09cm_area{tile}.tif"}
                labels = f"gts_for_participants/top_mosaic_09cm_area{tile}.tif"
            for kind, path in paths.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                write_tiff(root / path, images[kind], rows=16, deflate=True)
            colours = encode_colours(label, POTSDAM.colours)
            for path in [labels] + [labels.replace(".tif", "_noBoundary.tif")] * eroded:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                if "noBoundary" in path:
                    colours[::8] = 0
                Image.fromarray(colours).save(root / path, compression="tiff_lzw")
        return root

    return write
