"""Checkpoints: written completely or not at all, and checked before they are used.

    checkpoint.save({"kind": "ctclm-training", "model": state, ...}, path)
    contents = checkpoint.read(path, "ctclm-training")

`torch.save` straight to the final name leaves half a file when the process is killed or the disk
fills up. Here the bytes go to a temporary file. Once they are on the disk it is renamed.
"""

import csv
import json
import os
import pickle
import zipfile
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import torch

from support.cli import require


class CheckpointError(ValueError):
    """The file is missing, damaged, or not what was asked for; the message names it."""


@contextmanager
def atomic_write(path: Path):
    """A file, open for writing, that gets the name `path` when the block ends without exception.

    Until then it is a temporary file beside `path`. So `path` is always either the complete old
    file or the complete new one, also after an interruption.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # make the new name itself durable
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save(contents: dict, path: Path) -> None:
    """Write `contents` (plain types and tensors); an interruption leaves the old file."""
    with atomic_write(path) as file:
        torch.save(contents, file)


def save_json(entry: dict, path: Path) -> None:
    """Write plain types as a file that people can read, as safely as `save`."""
    with atomic_write(path) as file:
        file.write((json.dumps(entry, indent=1) + "\n").encode())


def save_csv(rows: list[dict], columns, path: Path) -> None:
    """A table with a head, as safely as `save`."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def prepare_folder(out: Path, resume: bool) -> None:
    """Make a run's folder. UsageError where there is a run already, or none to resume."""
    if resume:
        last = out / "last.pt"
        require(last.exists(), f"{last}: no such file, so there is nothing to resume")
    elif out.exists():
        is_new = out.is_dir() and {p.name for p in out.iterdir()} <= {"cache"}
        require(is_new, f"{out}: is not empty; continue it with --resume or choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def read(path: Path, kind: str) -> dict:
    """The dict that `save` wrote, on the CPU, after checking it. `kind` is its "kind" entry.

    Raises CheckpointError when the file is missing, damaged or not ours, or when weights are not
    finite. Only tensors and plain types are ever unpickled (weights_only=True).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not check the checksums
        contents = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError):
        raise CheckpointError(f"{path}: not a checkpoint (or a truncated one)") from None
    except (pickle.UnpicklingError, RuntimeError):
        raise CheckpointError(f"{path}: not a checkpoint of this project") from None
    if damaged:
        raise CheckpointError(f"{path}: damaged (the checksum of {damaged} does not match)")
    if not isinstance(contents, dict) or "kind" not in contents:
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    if contents["kind"] != kind:
        hint = {"ctclm-transformer": "best.pt", "ctclm-training": "last.pt"}[kind]
        raise CheckpointError(f"{path}: holds {contents['kind']!r}, not {kind!r}: take {hint}")
    if name := not_finite(contents["model"]):
        raise CheckpointError(f"{path}: the weights of {name} are not finite")
    return contents


def not_finite(state: dict) -> str | None:
    """The name of the first tensor with a NaN or an infinity, if there is one."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None
