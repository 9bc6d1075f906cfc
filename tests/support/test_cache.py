"""cache.py: an array is there whole or not at all, whoever else writes it, whatever interrupts."""

import errno
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from support import cache
from support.cache import Cache, MappedArray
from support.raster import DataError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tile.tif"
    path.write_bytes(b"pixels")
    return path


def array(rows=60, value=None):
    numbers = np.arange(rows * 40 * 3, dtype=np.uint32).reshape(rows, 40, 3) % 251
    return numbers.astype(np.uint8) if value is None else np.full((rows, 40, 3), value, np.uint8)


def keep(folder, name="a", pixels=None):
    pixels = array() if pixels is None else pixels
    return Cache(folder).store(name, pixels.shape, pixels.dtype, [pixels[:20], pixels[20:]])


def test_a_map_is_the_array(tmp_path):
    kept, pixels = keep(tmp_path), array()
    assert (kept.shape, kept.dtype, kept.size, kept.ndim) == ((60, 40, 3), np.uint8, 7200, 3)
    assert np.array_equal(kept, pixels) and len(kept) == 60
    assert np.array_equal(kept[5:9, 2:30], pixels[5:9, 2:30])
    assert np.array_equal(kept != 3, pixels != 3) and (kept == kept).all()
    assert type(kept[1:2]) is np.ndarray
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), pixels)  # any reader's format


def test_nothing_can_be_written_through_a_map(tmp_path):
    with pytest.raises(ValueError, match="read-only"):
        keep(tmp_path)[0][:] = 1


def test_no_file_stays_open(tmp_path):
    """LoveDA has 2522 training images, and a process may often have 1024 files open."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    maps = [keep(tmp_path, f"{i}", array(1)) for i in range(300)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    try:
        assert all(map_[0, 0, 1] == 1 for map_ in maps)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_name_changes_with_the_source(tmp_path, source):
    store = Cache(tmp_path / "cache")
    name = store.name(source, "image")
    assert name == Cache(tmp_path / "cache").name(source, "image")
    assert name != store.name(source, "label")
    os.utime(source, ns=(1, 1))
    later = store.name(source, "image")
    source.write_bytes(b"other pixels")
    os.utime(source, ns=(1, 1))
    assert len({name, later, store.name(source, "image")}) == 3
    copy = tmp_path / "elsewhere" / source.name
    copy.parent.mkdir()
    copy.write_bytes(source.read_bytes())
    os.utime(copy, ns=(1, 1))
    assert store.name(copy, "image") != store.name(source, "image")


def test_what_was_kept_is_found_and_nothing_else(tmp_path):
    keep(tmp_path)
    assert np.array_equal(Cache(tmp_path).find("a"), array())
    assert Cache(tmp_path).find("b") is None


@pytest.mark.parametrize("how", ["cut", "longer", "empty", "text"])
def test_a_file_that_is_not_whole_is_not_found(tmp_path, how):
    keep(tmp_path)
    path = tmp_path / "a.npy"
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[:-1], "longer": content + b"x", "empty": b"", "text": b"no array"}[how]
    )
    assert Cache(tmp_path).find("a") is None
    assert np.array_equal(keep(tmp_path), array())  # and is replaced


def test_an_interrupted_decode_leaves_nothing(tmp_path):
    def blocks():
        yield array()[:20]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).store("a", (60, 40, 3), np.uint8, blocks())
    assert list(tmp_path.iterdir()) == []


def slow(folder, begun):
    def blocks():
        yield array()[:20]
        begun.set()
        time.sleep(60)

    Cache(folder).store("a", (60, 40, 3), np.uint8, blocks())


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_decode_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=slow, args=(tmp_path, begun))
    process.start()
    assert begun.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".tmp" and Cache(tmp_path).find("a") is None
    assert left.exists()  # it could be another process at work
    monkeypatch.setattr(cache, "ABANDONED", -1)
    Cache(tmp_path)
    assert not left.exists()


def many_times(folder, value):
    for _ in range(40):
        keep(folder, pixels=array(value=value))


def test_processes_that_write_and_read_the_same_name(tmp_path):
    """Two write different bytes, so that a mixture would show; every read is all of one."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=many_times, args=(tmp_path, v)) for v in (1, 2)]
    for writer in writers:
        writer.start()
    seen, reads = set(), 0
    while any(writer.is_alive() for writer in writers):
        if (found := Cache(tmp_path).find("a")) is not None:
            values = np.unique(found)
            assert len(values) == 1
            seen.add(int(values[0]))
            reads += 1
    assert reads > 0 and seen <= {1, 2}
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG"])  # EFBIG: ulimit -f
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, number):
    number = getattr(errno, number)

    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(DataError, match=f"{os.strerror(number)} .this array needs 0 MB"):
        keep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_device_is_one_sentence(tmp_path, monkeypatch):
    """The same from a real device, which fails at the write and not at the end."""
    (tmp_path / ".a.x.tmp").symlink_to("/dev/full")
    monkeypatch.setattr(cache, "ABANDONED", float("inf"))
    monkeypatch.setattr(cache.uuid, "uuid4", lambda: type("Fixed", (), {"hex": "x"}))
    with pytest.raises(DataError, match="No space left on device"):
        keep(tmp_path, pixels=array(20000))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_no_folder(tmp_path, source):
    for path in (source, source / "below"):
        with pytest.raises(DataError, match="--cache must be a folder"):
            Cache(path)


def test_a_cache_removed_while_in_use(tmp_path):
    kept = keep(tmp_path)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(DataError, match="a.npy: was removed while in use"):
        kept[0]
    with pytest.raises(FileNotFoundError):
        MappedArray(tmp_path / "a.npy")
