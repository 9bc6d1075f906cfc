"""A trained model as one file that other programs run, without this project.

    export(model, Path("roads.pt2"), about)

The ending chooses:

    .pt2            PyTorch's own: torch.export.load(path).module()(images)
    .onnx           for ONNX Runtime and whatever else reads ONNX
    .safetensors    weights by Hugging Face's names of SegFormer, for their program

A .pt2 and an .onnx take images (B, C, H, W), float32, 0..255, and give logits (B, K, H, W). B is
free, H and W are multiples of 32 from 64 on. Normalisation and upsampling are inside. All three
carry `about`, what is known of the classes, as JSON. docs/weights.md has a program.
"""

import json
import logging
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import checkpoint, safetensors, segformer
from support.cli import require

ENDINGS = (".pt2", ".onnx", ".safetensors")


class AtFullSize(nn.Module):
    """images (B, C, H, W) -> logits (B, K, H, W)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-2:]
        return F.interpolate(self.model(images), size, mode="bilinear", align_corners=False)


@torch.no_grad()
def export(model: nn.Module, path: Path, about: dict) -> None:
    """Write `model`, in evaluation mode on a CPU; about: plain types.

    UsageError where the packages for an .onnx are not installed, CheckpointError on a full disk.
    """
    text = json.dumps(about)
    if path.suffix == ".safetensors":
        tensors = segformer.to_published(model.state_dict(), "Hugging Face")
        return safetensors.write(tensors, path, {"format": "pt", "about": text})
    if path.suffix == ".onnx":
        missing = [package for package in ("onnx", "onnxscript") if not find_spec(package)]
        require(not missing, f"{path}: an .onnx takes {' and '.join(missing)}: install them by pip")
    B, H, W = (torch.export.Dim(name, min=least) for name, least in (("B", 1), ("H", 2), ("W", 2)))
    free = {"images": {0: B, 2: 32 * H, 3: 32 * W}}
    example = (torch.zeros(2, model.normalise.in_channels, 64, 96),)  # no size is 1, nor equal
    program = torch.export.export(AtFullSize(model), example, dynamic_shapes=free)
    data = pt2_bytes(program, text) if path.suffix == ".pt2" else onnx_bytes(program, text)
    checkpoint.write(data, path)


def pt2_bytes(program: torch.export.ExportedProgram, about: str) -> bytes:
    buffer = BytesIO()  # PyTorch's own writer aborts the process where a disk is full
    torch.export.save(program, buffer, extra_files={"about.json": about})
    return buffer.getvalue()


def onnx_bytes(program: torch.export.ExportedProgram, about: str) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision's operations
    names = {"input_names": ["images"], "output_names": ["logits"]}
    found = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    found.model.metadata_props["about"] = about
    return found.model_proto.SerializeToString()
