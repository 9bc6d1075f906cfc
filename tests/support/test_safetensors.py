"""safetensors.py: what is written is read, as the package would, and damage is said."""

import json

import pytest
import torch

from support import safetensors
from support.checkpoint import CheckpointError

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3).mT,  # not contiguous
    "half": torch.tensor([0.5, -2.0, 3.0]).half(),
    "brain": torch.tensor([[1.5]], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
}


def test_what_is_written_is_read(tmp_path):
    safetensors.write(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    found = safetensors.read(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_as_the_format_describes_it(tmp_path):
    data = torch.tensor([1.0, -2.0, 5.0]).numpy().tobytes()
    header = {"b": entry(8, 12, (1, 1)), "__metadata__": {"a": "b"}, "a": entry(0, 8)}
    (tmp_path / "x").write_bytes(file_of(header, data))
    found = safetensors.read(tmp_path / "x")
    assert found["a"].tolist() == [1, -2] and found["b"].tolist() == [[5]] and len(found) == 2


DAMAGED = {
    "empty": (b"", "not a .safetensors file"),
    "text": (b"<html>Not found</html>", "not a .safetensors file"),
    "a header longer than the file": (file_of({}, length=2**60), "not a .safetensors file"),
    "no JSON": (file_of(b"{no"), "not a .safetensors file"),
    "no text": (file_of(b"\xff\xfe{}"), "not a .safetensors file"),
    "JSON of something else": (file_of([1]), "not a .safetensors file"),
    "an entry without a shape": (file_of({"a": {"dtype": "F32"}}), "not a .safetensors file"),
    "a negative size": (file_of({"a": entry(shape=[-2])}, bytes(8)), "not a .safetensors file"),
    "half a pixel": (file_of({"a": entry(shape=[1.5])}, bytes(8)), "not a .safetensors file"),
    "JSON of 100 000 lists": (file_of(b"[" * 100_000), "not a .safetensors file"),
    "sizes beyond 64 bits": (file_of({"a": entry(0, 0, [2**62, 2**62, 0])}), "not a .safetensors"),
    "a size beyond 64 bits": (file_of({"a": entry(0, 0, [2**70, 0])}), "not a .safetensors file"),
    "truncated": (file_of({"a": entry()}, bytes(7)), "truncated (a ends behind the file)"),
    "another size": (file_of({"a": entry(end=4)}, bytes(4)), "damaged (a has another size"),
    "a gap": (file_of({"a": entry(4, 12)}, bytes(12)), "damaged (a has another size"),
    "two in one place": (file_of({"a": entry(), "b": entry()}, bytes(8)), "damaged (b has"),
    "bytes of nobody": (file_of({"a": entry()}, bytes(9)), "damaged (1 bytes are no tensor's)"),
    "other numbers": (file_of({"a": entry(dtype="F8_E4M3")}, bytes(8)), "a has numbers of type F8"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damage_is_said(tmp_path, how):
    content, sentence = DAMAGED[how]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        safetensors.read(tmp_path / "x.safetensors")
    assert sentence in str(raised.value) and "x.safetensors" in str(raised.value)


def test_the_package_reads_and_writes_the_same(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.write(TENSORS, tmp_path / "ours", {"format": "pt"})
    found = package.load_file(tmp_path / "ours")
    package.save_file({k: x.contiguous() for k, x in TENSORS.items()}, tmp_path / "theirs")
    for read in (found, safetensors.read(tmp_path / "theirs")):
        assert all(torch.equal(read[name], x) for name, x in TENSORS.items())
