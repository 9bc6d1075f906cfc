"""Checkpoints: written completely or not at all, and checked before they are used.

    checkpoint.save({"kind": "ctclm-transformer", "model": state, ...}, path)
    contents = checkpoint.read(path, "ctclm-transformer")
    checkpoint.save_newest({"kind": "ctclm-training", "step": 9, ...}, folder)      # of a run
    contents = checkpoint.read_newest(folder)

`torch.save` straight to the final name leaves half a file when the process is killed or the disk
fills up. Here the bytes go to a temporary file. Once they are on the disk it is renamed. A run
keeps its last two checkpoints, for a disk can damage a file that was written completely.
"""

import csv
import json
import os
import re
import shutil
import sys
import zipfile
import zlib
from contextlib import contextmanager, suppress
from io import BytesIO, StringIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from support.cli import DISK_IS_FULL, make_folder, require

NEWEST, BEFORE = "last.pt", "previous.pt"  # a run's two checkpoints
FILES = {NEWEST, "best.pt", "config.json", "log.csv", "metrics.json"}  # of a run, as written
FILES |= {"curves.png", "samples.png", "story.png"}


class CheckpointError(ValueError):
    """The file is missing, damaged, or not what was asked for; the message names it."""


# --- Writing --------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path, before: Path | None = None):
    """A file, open for writing, that gets the name `path` when the block ends without exception.

    Until then it is a temporary file beside `path`. So `path` is always either the complete old
    file or the complete new one, also after an interruption. With `before` the old file is kept
    under that name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # make the new name itself durable
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write(data: bytes, path: Path, before: Path | None = None) -> None:
    """All of `data` or nothing. CheckpointError says how much a full disk lacks."""
    try:
        with atomic_write(path, before) as file:
            file.write(data)
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        needed, free = len(data), shutil.disk_usage(Path(path).parent).free
        missing = "a quota or a limit is lower"
        if needed > free:
            missing = f"{megabytes(needed - free)} are missing"
        raise CheckpointError(
            f"{path}: {error.strerror}: it takes {megabytes(needed)}, and {missing}; "
            f"make room and go on; what was there before is complete"
        ) from None


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size > 1e5 else f"{size / 1e6:.6f} MB"


def save(contents: dict, path: Path, before: Path | None = None) -> None:
    """Write `contents` (plain types and tensors); an interruption leaves the old file."""
    buffer = BytesIO()  # so that the size is known
    torch.save(contents, buffer)
    write(sealed(buffer.getvalue()), path, before)


def sealed(archive: bytes) -> bytes:
    """The zip with a checksum of all its bytes as its comment. Those that a zip has anyway are of
    the contents alone: PyTorch reads on, elsewhere, where a bit of the directory has flipped."""
    comment = b"crc32 %08x" % zlib.crc32(archive)
    return archive[:-2] + len(comment).to_bytes(2, "little") + comment


def seal_holds(data: bytes) -> bool:
    """False if one of the bytes has changed since `sealed`; True for a file without a checksum."""
    found = re.fullmatch(rb"crc32 ([0-9a-f]{8})", data[-14:])
    return not found or zlib.crc32(b"\0\0", zlib.crc32(data[:-16])) == int(found[1], 16)


def save_json(entry: dict, path: Path) -> None:
    """Write plain types as a file that people can read, as safely as `save`."""
    write((json.dumps(entry, indent=1) + "\n").encode(), path)


def save_csv(rows: list[dict], columns, path: Path) -> None:
    """A table with a head, as safely as `save`."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write(text.getvalue().encode(), path)


def save_picture(picture: Image.Image, path: Path) -> None:
    """A PNG, as safely as `save`."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    write(buffer.getbuffer(), path)


# --- A run's folder -------------------------------------------------------------------------------


def prepare_folder(out: Path, resume: bool) -> None:
    """Make a run's folder. UsageError where there is a run already, or none to resume.

    Of a run that goes on it removes what a killed process left half-written.
    """
    if resume:
        require_run(out)
        remove_abandoned(out)
    elif out.exists():
        is_new = out.is_dir() and {p.name for p in out.iterdir()} <= {"cache"}
        require(is_new, f"{out}: is not empty; continue it with --resume or choose another --out")
    make_folder(out)


def remove_abandoned(out: Path) -> None:
    """Remove the temporary files of a run's own files, but of a process that still lives."""
    for path in out.glob(".*.tmp"):
        found = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", path.name)  # as `atomic_write` names them
        if found and found[1] in FILES and not is_living(int(found[2])):
            with suppress(PermissionError, FileNotFoundError):  # Windows: somebody writes to it
                path.unlink()


def is_living(process: int) -> bool:
    """Whether another process has this number. Never on Windows, where asking would end it."""
    if os.name != "posix" or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def require_run(out: Path) -> None:
    """UsageError unless a run was started in the folder."""
    started = (out / "config.json").exists() or was_saved(out)
    require(started, f"{out}: has no config.json, so there is nothing to resume")


def read_options(out: Path) -> dict:
    """What a run was started with: its config.json. Empty where somebody deleted that."""
    require_run(out)
    if not (out / "config.json").exists():
        return {}
    try:
        return dict(json.loads((out / "config.json").read_text()))
    except (ValueError, TypeError):
        raise CheckpointError(
            f"{out / 'config.json'}: is damaged; delete it and give all of the run's options"
        ) from None


def save_newest(contents: dict, out: Path) -> None:
    """A run's checkpoint; the one before it is kept."""
    save(contents, out / NEWEST, out / BEFORE)


def was_saved(out: Path) -> bool:
    """Whether there is a checkpoint in a run's folder, damaged or not."""
    return any((out / name).exists() for name in (NEWEST, BEFORE))


def read_newest(out: Path) -> dict | None:
    """A run's last checkpoint; None if it was stopped before the first, which stdout says.

    Where it is damaged, stderr says so, and the one before it takes its place: or the next save
    would keep the damaged one instead. CheckpointError where that is damaged too.
    """
    if not was_saved(out):
        print(f"{out}: was stopped before it was saved for the first time, so it starts again")
        return None
    faults = []
    for path in (out / NEWEST, out / BEFORE):
        try:
            contents = read(path, "ctclm-training")
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if faults:
            going_on = f"{path.name} takes its place: going on from step {contents['step']}"
            print(f"  note: {faults[0]}; {going_on}", file=sys.stderr)
            os.replace(path, out / NEWEST)
        return contents
    raise CheckpointError(f"{faults[0]}; {faults[1]}; start again with another --out")


# --- Reading --------------------------------------------------------------------------------------


def read(path: Path, *kinds: str) -> dict:
    """The dict that `save` wrote, on the CPU, after checking it. Its "kind" is one of `kinds`.

    Raises CheckpointError when the file is missing, damaged or not ours, or when weights are not
    finite. Only tensors and plain types are ever unpickled (weights_only=True).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    data = path.read_bytes()
    if not seal_holds(data):
        raise CheckpointError(f"{path}: damaged (its checksum does not match)")
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            damaged = archive.testzip()  # torch.load does not check the checksums
        contents = None if damaged else torch.load(BytesIO(data), "cpu", weights_only=True)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError):
        raise CheckpointError(f"{path}: not a checkpoint (or a truncated one)") from None
    except Exception:  # bytes that are no pickle may raise anything
        raise CheckpointError(f"{path}: not a checkpoint of this project") from None
    if damaged:
        raise CheckpointError(f"{path}: damaged (the checksum of {damaged} does not match)")
    if not isinstance(contents, dict) or "kind" not in contents:
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    if contents["kind"] not in kinds:
        files = {"ctclm-transformer": ": take best.pt", "ctclm-training": ": take last.pt"}
        hint = files.get(kinds[0], "")
        raise CheckpointError(f"{path}: holds {contents['kind']!r}, not {kinds[0]!r}{hint}")
    check_tensors(path, contents.get("model"))
    return contents


FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
NUMBERS = FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def is_plain(tensor: Tensor) -> bool:
    """Whether each number is there, with a place of its own: not sparse, not on "meta", not a
    single number that claims to be 2^40 of them."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in NUMBERS:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def check_tensors(path: Path, state) -> None:
    """CheckpointError unless `state` is {name: tensor}, and each number in it is finite in float32.

    A variance must not be negative, either: its root would be NaN.
    """
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds no dict of tensors")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise CheckpointError(f"{path}: its entry {name!r} is no tensor")
        if not is_plain(tensor):
            raise CheckpointError(f"{path}: {name} is no plain tensor, but {tensor.type()}")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise CheckpointError(f"{path}: the weights of {name} are not finite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise CheckpointError(f"{path}: the variance {name} is negative")
