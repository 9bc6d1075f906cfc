"""export.py: what is written runs without this project, and gives what the model gives."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ctclm import VARIANTS, Transformer
from kernels.upsample import upsample_reference
from support import safetensors, segformer
from support.cli import UsageError
from support.export import AtFullSize, export

ABOUT = {"classes": ["road", "roof"], "colours": [[1, 2, 3], [4, 5, 6]], "bands": "rgb"}
SIZES = [(1, 3, 64, 64), (3, 3, 128, 96), (2, 3, 64, 224)]


def trained(variant=VARIANTS["tiny"]):
    model = Transformer(variant, 2, 3).eval()
    torch.nn.init.normal_(model.head.classify.weight)
    return model


def images_and_logits(model):
    images = [255 * torch.rand(size) for size in SIZES]
    with torch.no_grad():
        return images, [AtFullSize(model)(x) for x in images]


WITHOUT_US = """
import sys, torch
program, data = sys.argv[1:]
about = {"about.json": ""}
model = torch.export.load(program, extra_files=about).module()
images, logits = torch.load(data)
errors = [(model(x) - y).abs().max().item() for x, y in zip(images, logits)]
print(max(errors), *sorted({"ctclm", "kernels", "support"} & set(sys.modules)))
print(about["about.json"])
"""


def test_a_pt2_runs_where_there_is_only_torch(tmp_path):
    """In batches and at sizes that it was not traced with."""
    small = VARIANTS["tiny"]._replace(depths=(1, 1, 1, 1))  # tracing takes seconds a block
    model = trained(small)
    export(model, tmp_path / "x.pt2", ABOUT)
    torch.save(images_and_logits(model), tmp_path / "data")
    command = [sys.executable, "-I", "-c", WITHOUT_US, "x.pt2", "data"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers, about = done.stdout.splitlines()
    error, *ours = numbers.split()
    assert float(error) < 1e-5 and not ours
    assert json.loads(about) == ABOUT


def test_logits_are_of_the_images_size():
    model, images = trained(), 255 * torch.rand(2, 3, 64, 96)
    full = AtFullSize(model)(images)
    assert full.shape == (2, 2, 64, 96)
    torch.testing.assert_close(
        full[:, :, 1::4, 1::4].mean(), model(images).mean(), atol=0.05, rtol=0
    )
    assert torch.equal(full, upsample_reference(model(images), (64, 96)))


def test_safetensors_have_hugging_faces_names(tmp_path):
    model = trained()
    export(model, tmp_path / "x.safetensors", ABOUT)
    tensors = safetensors.read(tmp_path / "x.safetensors")
    assert "segformer.encoder.block.0.0.attention.self.key.weight" in tensors
    state, unused = segformer.to_ours(tensors)
    assert not unused
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


FULL = """
import resource, signal
from pathlib import Path
import torch
from support import checkpoint, export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
program = torch.export.export(torch.nn.Linear(40, 40), (torch.zeros(1, 40),))
for write in (
    lambda: checkpoint.write(export.pt2_bytes(program, ""), Path("x.pt2")),
    lambda: export.safetensors.write({"w": torch.zeros(999)}, Path("x.safetensors"), {}),
):
    try:
        write()
    except checkpoint.CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="a limit on the size of files is POSIX")
def test_a_full_disk_is_a_sentence(tmp_path):
    """Here a limit on the size of files: PyTorch's own writer ends the process with SIGABRT."""
    command = [sys.executable, "-c", FULL]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line, name in zip(lines, ("x.pt2", "x.safetensors"), strict=True):
        assert line.startswith(f"{name}: File too large: it takes")
    assert not [*tmp_path.iterdir()]


def test_an_onnx_without_its_packages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("support.export.find_spec", lambda package: None)
    with pytest.raises(UsageError, match="x.onnx: an .onnx takes onnx and onnxscript: install"):
        export(trained(), tmp_path / "x.onnx", ABOUT)
    assert not [*tmp_path.iterdir()]


def test_onnx_runtime_gives_the_same(tmp_path):
    pytest.importorskip("onnxscript", reason="the packages onnx and onnxscript are not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = trained()
    export(model, tmp_path / "x.onnx", ABOUT)
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["about"]) == ABOUT
    for x, y in zip(*images_and_logits(model), strict=True):
        (found,) = session.run(["logits"], {"images": x.numpy()})
        assert abs(torch.from_numpy(found) - y).max() < 1e-4


def test_hugging_faces_program_reads_our_file(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, v = trained(), VARIANTS["tiny"]
    config = transformers.SegformerConfig(
        depths=list(v.depths),
        hidden_sizes=list(v.channels),
        num_attention_heads=list(v.heads),
        decoder_hidden_size=v.head_width,
        num_labels=2,
    )
    config.save_pretrained(tmp_path)
    export(model, tmp_path / "model.safetensors", ABOUT)
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    images = 255 * torch.rand(2, 3, 97, 131)
    with torch.no_grad():
        expected = model(images)
        found = theirs(pixel_values=model.normalise(images)).logits
    # Of the largest logit, 59 here: float32's rounding through the layers, 5e-6 where it was made,
    # and theirs adds 1e-5 to a variance where ours adds 1e-6.
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
