"""checkpoint.py: whole files only, and nothing is believed unseen."""

import errno
import json
import os
import pickle
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

from support import checkpoint
from support.checkpoint import CheckpointError
from support.cli import UsageError


def contents(value=1.0):
    return {"kind": "ctclm-training", "model": {"w": torch.full((1000,), value)}}


def test_round_trip(tmp_path):
    checkpoint.save(contents(), tmp_path / "last.pt")
    assert torch.equal(
        checkpoint.read(tmp_path / "last.pt", "ctclm-training")["model"]["w"], torch.ones(1000)
    )
    assert os.listdir(tmp_path) == ["last.pt"]  # no temporary file is left


def test_json_is_as_safe(tmp_path):
    checkpoint.save_json({"a": [1, None]}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == '{\n "a": [\n  1,\n  null\n ]\n}\n'
    with pytest.raises(TypeError):
        checkpoint.save_json({"a": object()}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    "number, sentence",
    [
        (
            errno.ENOSPC,
            "last.pt: No space left on device: it takes 0.00.* MB, and a quota or a limit is lower",
        ),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, number, sentence):
    path = tmp_path / "last.pt"
    checkpoint.save(contents(), path)

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((OSError, CheckpointError), match=sentence):
        checkpoint.save(contents(2.0), path)
    assert checkpoint.read(path, "ctclm-training")["model"]["w"][0] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_full_disk_says_what_is_missing(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1_500_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="takes 4.0 MB, and 2.5 MB are missing; make room"):
        checkpoint.write(bytes(4_000_000), tmp_path / "last.pt")


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Or a power cut could leave the name of a complete file on an empty one."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: (order.append(name), real(*a))
        )
    with checkpoint.atomic_write(tmp_path / "x") as file:
        file.write(b"x")
    monkeypatch.undo()
    assert order[:2] == ["fsync", "replace"]


SAVE_AND_KILL = """
import os, signal, sys, time, torch
from support import checkpoint
state = {"kind": "ctclm-training", "model": {"w": torch.ones(1_000_000)}}
for attempt in range(12):
    saved, tell = os.pipe()
    process = os.fork()
    while process == 0:
        checkpoint.save(state, sys.argv[1])
        os.write(tell, b"!")
    os.read(saved, 1)
    time.sleep(0.003 * attempt)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    checkpoint.read(sys.argv[1], "ctclm-training")
print("read", attempt + 1, "times")
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
def test_kill_while_saving(tmp_path):
    """SIGKILL at twelve moments: the file is always readable."""
    command = [sys.executable, "-c", SAVE_AND_KILL, tmp_path / "last.pt"]
    ended = subprocess.run(command, cwd=os.getcwd(), capture_output=True, text=True)
    assert ended.stdout == "read 12 times\n", ended.stderr


@pytest.mark.skipif(os.name != "posix", reason="whether a process lives is asked as on POSIX")
def test_only_what_a_killed_process_left_is_removed(tmp_path):
    """And by --resume alone: not the user's files, and not those of a process that still writes."""
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        half, notes = tmp_path / f".last.pt.{process.pid}.tmp", tmp_path / ".notes.tmp"
        other = tmp_path / f".mine.pt.{process.pid}.tmp"
        for path in (half, notes, other):
            path.write_bytes(b"half of a file")
        for resume in (False, True):
            with pytest.raises(UsageError):  # there is no run
                checkpoint.prepare_folder(tmp_path, resume)
        checkpoint.save_json({}, tmp_path / "config.json")
        checkpoint.prepare_folder(tmp_path, resume=True)
        assert {half, notes, other} <= {*tmp_path.iterdir()}
        process.communicate(b"\n")
    with pytest.raises(UsageError, match="is not empty"):
        checkpoint.prepare_folder(tmp_path, resume=False)
    assert half.exists()
    checkpoint.prepare_folder(tmp_path, resume=True)
    assert {*tmp_path.iterdir()} == {notes, other, tmp_path / "config.json"}


def damaged(path, what):
    checkpoint.save(contents(), path)
    data = bytearray(path.read_bytes())
    if what == "truncated":
        del data[len(data) // 2 :]
    elif what == "flipped bit":
        data[data.index(b"\x00\x00\x80\x3f" * 4) + 1] ^= 1  # inside the ones
    elif what == "text":
        data[:] = b"not a checkpoint at all"
    elif what == "empty":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("truncated", "truncated"),
        ("flipped bit", "damaged"),
        ("text", "not a checkpoint"),
        ("empty", "not a checkpoint"),
    ],
)
def test_damage_is_noticed(tmp_path, what, sentence):
    path = tmp_path / "last.pt"
    damaged(path, what)
    with pytest.raises(CheckpointError, match=f"last.pt: .*{sentence}"):
        checkpoint.read(path, "ctclm-training")


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    """Also in the zip's directory, where its own checksums do not reach: there it says at which
    byte a tensor begins, and PyTorch would read another."""
    path = tmp_path / "last.pt"
    checkpoint.save(contents(), path)
    data = bytearray(path.read_bytes())
    for place in range(len(data)):
        data[place] ^= 1 << place % 8
        held = checkpoint.seal_holds(data)
        assert not held or place >= len(data) - 16  # in the checksum itself
        data[place] ^= 1 << place % 8
    data[data.rindex(b"PK\x01\x02") + 42] ^= 64
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        checkpoint.read(path, "ctclm-training")


def test_a_file_without_a_checksum_of_its_own(tmp_path):
    """As torch.save leaves it, and as earlier versions of this program did."""
    torch.save(contents(), tmp_path / "old.pt")
    data = bytearray((tmp_path / "old.pt").read_bytes())
    assert checkpoint.read(tmp_path / "old.pt", "ctclm-training")["model"]["w"][0] == 1
    data[data.index(b"\x00\x00\x80\x3f" * 4) + 1] ^= 1
    (tmp_path / "old.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="the checksum of .* does not match"):
        checkpoint.read(tmp_path / "old.pt", "ctclm-training")


def test_not_finite_weights_are_refused(tmp_path):
    checkpoint.save(contents(float("nan")), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="weights of w are not finite"):
        checkpoint.read(tmp_path / "last.pt", "ctclm-training")


@pytest.mark.parametrize("state", [None, {}, {"a": 1}, {3: torch.zeros(1)}, [1]])
def test_weights_that_are_no_tensors_are_refused(tmp_path, state):
    checkpoint.save(contents() | {"model": state}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="last.pt: .* (dict of|is no) tensor"):
        checkpoint.read(tmp_path / "last.pt", "ctclm-training")


NO_PICKLE = [b"", b"garbage", b"\x80\x02.", b"\x80\x02h\x05.", b"\x80\x02)R.", b"\x80\x02K\x01b."]


@pytest.mark.parametrize("pickled", NO_PICKLE)
def test_a_zip_without_a_pickle_is_refused(tmp_path, pickled):
    """From these bytes PyTorch raises an IndexError, a KeyError, an AssertionError, ..."""
    with zipfile.ZipFile(tmp_path / "last.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError, match="last.pt: not a checkpoint"):
        checkpoint.read(tmp_path / "last.pt", "ctclm-training")


def test_missing_and_other_kinds(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.read(tmp_path / "none.pt", "ctclm-training")
    checkpoint.save(contents(), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="take best.pt"):
        checkpoint.read(tmp_path / "last.pt", "ctclm-transformer")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        checkpoint.read(tmp_path / "list.pt", "ctclm-training")


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"kind": "ctclm-training", "model": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        checkpoint.read(tmp_path / "bad.pt", "ctclm-training")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.read(tmp_path / "plain.pt", "ctclm-training")
