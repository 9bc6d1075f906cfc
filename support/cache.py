"""Decoded arrays on disk: written once, completely or not at all, and read piece by piece.

    cache = Cache(Path("runs/potsdam/cache"))
    name = cache.name(source, "image")                  # changes when the source file changes
    image = cache.find(name)                            # a MappedArray, or None
    image = cache.store(name, shape, dtype, blocks)     # writes blocks of rows -> MappedArray
    image[1000:1512, 2000:2512]                         # reads these pixels, and no others

Any number of processes may share a folder. A file is written under a temporary name and renamed
when it is complete, so a file with its final name is always a complete array. A second process that
writes the same name replaces it by the same bytes. An interrupted decode removes its temporary
file. What a killed process left is removed by a later one. Nothing else is ever removed: delete the
folder when no run needs it.
"""

import hashlib
import mmap
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from support.cli import DISK_IS_FULL
from support.raster import DataError

VERSION = 1  # of the decoding: files of an older version are not found
ABANDONED = 600  # a temporary file that nobody has written to for so many seconds is removed


class MappedArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array in a .npy file. Every access maps the file again and reads the part asked for.

    So no file stays open: LoveDA has more images than a process may have open files. And no page
    stays resident: a memory map that stays open grows with every pixel that was ever read, up to
    the size of the whole data set. With np.memmap opening again cost a sixth of the windows' rate
    (experiments/NOTES.md); mmap alone opens in a third of its time.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0}[version]
            self.shape, _, self.dtype = read(file)
            self.offset = file.tell()
        self.size = int(np.prod(self.shape))
        self.ndim = len(self.shape)
        if path.stat().st_size != self.offset + self.size * self.dtype.itemsize:
            raise ValueError(f"{path} is not complete")

    def open(self) -> np.ndarray:
        try:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise DataError(f"{self.path}: was removed while in use; start again") from None
        return np.ndarray(self.shape, self.dtype, mapped, self.offset)

    def __getitem__(self, area) -> np.ndarray:
        return self.open()[area]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.open(), dtype, copy=copy)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        arrays = (i.open() if isinstance(i, MappedArray) else i for i in inputs)
        return getattr(ufunc, method)(*arrays, **options)


class Cache:
    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DataError(f"{self.folder}: --cache must be a folder") from None
        for path in self.folder.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
            except FileNotFoundError:  # another process was faster
                pass

    def name(self, source: Path, what: str) -> str:
        """The name for `source` as it is now, decoded as `what` says."""
        status, path = source.stat(), source.resolve()
        key = (str(path), status.st_size, status.st_mtime_ns, what, VERSION)
        return f"{source.stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"

    def find(self, name: str) -> MappedArray | None:
        """The array, if it is here and complete."""
        try:
            return MappedArray(self.folder / f"{name}.npy")
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def store(self, name: str, shape, dtype, blocks: Iterable[np.ndarray]) -> MappedArray:
        """Write the blocks one below the other. An exception leaves nothing behind."""
        path = self.folder / f"{name}.npy"
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                # Ordinary writes: on a full disk, writing to a memory map ends the process.
                header = {"shape": shape, "fortran_order": False, "descr": np.dtype(dtype).str}
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks:
                    file.write(np.ascontiguousarray(block, dtype).data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.replace(temporary, path)
            except PermissionError:  # Windows, where another process has the same bytes mapped
                if not path.exists():
                    raise
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            size = np.prod(shape) * np.dtype(dtype).itemsize / 1e6
            raise DataError(
                f"{self.folder}: {error.strerror} (this array needs {size:.0f} MB); make room or "
                f"choose another --cache"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        return MappedArray(path)


class NoCache:
    """Takes the place of a Cache when there is none: finds nothing, and arrays stay in memory."""

    def name(self, source: Path, what: str) -> str:
        return source.stem

    def find(self, name: str) -> None:
        return None

    def store(self, name: str, shape, dtype, blocks: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([*blocks])
