"""The machine that a program runs on: its device, its allocator, its description.

device = pick_device("auto")        # a GPU if there is one
keep_freed_memory()                 # once, at the start of a program
describe(device)                    # hardware and versions, for a file of results
"""

import ctypes
import os
import platform
import subprocess
from importlib import metadata

import numpy as np
import torch
from PIL import __version__ as pillow_version

from support.cli import UsageError


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> the device; raises UsageError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine or this PyTorch has no CUDA GPU")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks instead of returning them to the system each time.

    Every activation of a convolution is such a block. Page faults on getting it back cost a CPU
    training step about a third of its time. Does nothing on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def name_of(device: torch.device) -> str:
    """The GPU's name, or the kind of CPU and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def describe(device: torch.device) -> dict:
    """Hardware and versions, as plain types, for every file of results."""
    found = {
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numpy": np.__version__,
        "pillow": pillow_version,
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "driver": ask_gpu("driver_version")}
    return found


def version_of(package: str) -> str | None:
    """The version that is installed; None where there is none, as of Triton on macOS."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def ask_gpu(what: str) -> str | None:
    """One number or name from nvidia-smi, if it is there and knows."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return printed.splitlines()[0].strip() if printed.strip() else None
