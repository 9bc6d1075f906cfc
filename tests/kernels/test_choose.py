"""kernels/choose.py: one rule for what runs, and one way to override it."""

from types import SimpleNamespace

import pytest
import torch

from kernels import choose, force


@pytest.fixture
def x():
    return torch.zeros(1)


def test_the_rule(x, monkeypatch, device):
    monkeypatch.setattr(choose, "_forced", None)
    monkeypatch.setattr(choose, "INTERPRETED", False)
    assert choose.use_triton(x.to(device)) == (device.type == "cuda")
    monkeypatch.setattr(choose, "INTERPRETED", True)
    assert choose.use_triton(x)
    assert not choose.use_triton(x, fits=False) and not choose.use_triton(x, faster=False)
    with force("triton"):
        assert choose.use_triton(x, faster=False)
    monkeypatch.setattr(choose, "triton", None)
    assert not choose.use_triton(x)


@pytest.mark.parametrize("capability, wanted", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_older_gpus_have_pytorchs(monkeypatch, capability, wanted):
    """A T4 has 64 KiB of shared memory for a program, and no bf16."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(choose, "_forced", None)
    monkeypatch.setattr(choose, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert choose.use_triton(on_gpu) == wanted
    assert choose.has_kernels(on_gpu.device) == choose.computes_bf16(on_gpu.device) == wanted
    monkeypatch.setattr(choose, "triton", None)  # Windows: bf16 as before, and nothing to compile
    assert choose.computes_bf16(on_gpu.device) == wanted and not choose.has_kernels(on_gpu.device)


def test_the_rule_is_no_break_in_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(choose, "_forced", None)
    monkeypatch.setattr(choose, "INTERPRETED", False)
    shifted = torch.compile(lambda x: x + choose.use_triton(x), backend="eager", fullgraph=True)
    assert shifted(torch.ones(1)) == 1


def test_force_nests_and_ends(x, monkeypatch):
    monkeypatch.setattr(choose, "_forced", None)
    monkeypatch.setattr(choose, "INTERPRETED", choose.triton is not None)
    with force("pytorch"):
        assert not choose.use_triton(x)
        with force("triton"):
            assert choose.use_triton(x) or choose.triton is None
        assert not choose.use_triton(x)
    assert choose._forced is None


def test_what_cannot_be_forced_is_said(x):
    with force("triton"), pytest.raises(ValueError, match=r"no kernel can run on torch.float32 of"):
        choose.use_triton(x, fits=False)
    with pytest.raises(ValueError, match='force takes "pytorch" or "triton"; got \'cuda\''):
        with force("cuda"):
            pass
