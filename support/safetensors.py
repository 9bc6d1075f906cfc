"""Files of weights in the safetensors format, read and written without that package.

    tensors = safetensors.read("model.safetensors")             # {name: tensor}, on the CPU
    safetensors.write(tensors, "model.safetensors", {"format": "pt"})

Such a file has three parts:

    8 bytes     length of the header, little-endian
    header      JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...};
                "__metadata__", where it is there, maps strings to strings
    data        the tensors' numbers, little-endian, row by row; offsets count from here

Nothing in it is executed. The offsets must cover the data once, without a gap. The format has no
checksum, so a changed bit within a tensor is not noticed.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from support import checkpoint
from support.checkpoint import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. CheckpointError says what is wrong with a damaged one."""
    content = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    if len(content) < 8 or start > len(content):
        raise CheckpointError(f"{path}: not a .safetensors file (or a truncated one)")
    try:
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        places = sorted(described(name, **entry) for name, entry in header.items())
    except (ValueError, TypeError, AttributeError, RecursionError):  # no JSON, or of other things
        raise CheckpointError(f"{path}: not a .safetensors file (or a damaged one)") from None
    tensors, end, data = {}, start, torch.frombuffer(content, dtype=torch.uint8)
    for begin, after, name, dtype, shape in places:
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has numbers of type {dtype}, which are not read")
        count, begin, after = math.prod(shape), start + begin, start + after
        if begin != end or after - begin != count * DTYPES[dtype].itemsize:
            raise CheckpointError(f"{path}: damaged ({name} has another size than its place)")
        if after > len(content):
            raise CheckpointError(f"{path}: truncated ({name} ends behind the file)")
        tensors[name] = data[begin:after].clone().view(DTYPES[dtype]).reshape(shape)  # aligned
        end = after
    if end != len(content):
        raise CheckpointError(f"{path}: damaged ({len(content) - end} bytes are no tensor's)")
    return tensors


def metadata(path: Path) -> dict[str, str]:
    """What a file that `read` takes says of itself; empty where it says nothing."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def described(name: str, *, dtype: str, shape: list[int], data_offsets: list[int]):
    """An entry as (begin, after, name, dtype, shape); TypeError or ValueError if it is none."""
    begin, after = data_offsets
    numbers = [begin, after, *shape]
    if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(dtype, str):
        raise ValueError(name)
    if math.prod(n or 1 for n in shape) >= 2**63:  # PyTorch counts in 64 bits, also beside a zero
        raise ValueError(name)
    return begin, after, name, dtype, tuple(shape)


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """All of the file or nothing; CheckpointError where the disk is full."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end, parts = {"__metadata__": metadata}, 0, []
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [end, end + len(data)]}
        end += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the package has it
    checkpoint.write(b"".join([len(text).to_bytes(8, "little"), text, *parts]), path)
