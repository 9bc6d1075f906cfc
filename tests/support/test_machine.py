"""support/machine.py: the device that was asked for, and the machine as a report names it."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from support import machine
from support.cli import UsageError


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    assert machine.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device cuda: this machine"):
        machine.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.pick_device("auto") == torch.device("cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_large_blocks_stay_with_the_process():
    """In a process of its own: 64 MB, freed and asked for again, soon cost hardly a page fault."""
    code = """
import resource, torch
from support.machine import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sorted(faults() for _ in range(20))[5])  # the heap grows a few times before blocks return
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(process.stdout) < 2**26 // 4096 / 10, process.stderr  # of its 16,384 pages


def test_a_report_names_hardware_and_versions():
    found = machine.describe(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["python"] == platform.python_version()
    assert f"{os.cpu_count()} cores" in found["device"]
    json.dumps(found)


def test_a_gpu_is_named_with_its_driver_where_nvidia_smi_knows_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.describe(torch.device("cuda"))
    assert found["device"] == "NVIDIA H100" and found["driver"] is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.159.04\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.describe(torch.device("cuda"))["driver"] == "580.159.04"
