"""kernels/bias.py: biases learn what PyTorch says they learn, and nothing else changes."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctclm import CTCLM, ModelConfig
from kernels import conv2d, force, linear
from kernels.bias import row_sum, row_sum_reference

module = sys.modules["kernels.bias"]


def gradients(function, x, weight, bias, dy, *options):
    """y, dx, dweight, dbias."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*inputs, *options)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))


def check_sum(rows, device, no_worse):
    """At most twice PyTorch's error."""
    rows = rows.to(device)
    ours, theirs = row_sum(rows, rows.dtype), row_sum_reference(rows)
    exact = row_sum_reference(rows.double())
    no_worse(ours, theirs, exact, rows.double().flatten(0, -2).norm(dim=0))


# --- Everywhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_linear_layer(path, device):
    x, weight, bias, dy = (
        torch.randn(*n, device=device) for n in ((2, 7, 20), (33, 20), (33,), (2, 7, 33))
    )
    with force(path):
        found = gradients(linear, x, weight, bias, dy)
    wanted = gradients(F.linear, *(t.double() for t in (x, weight, bias, dy)))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_convolution(path, layout, device):
    """With every option that the model has: strides, padding, groups."""
    x, weight, bias, dy = (
        torch.randn(*n, device=device) for n in ((2, 8, 9, 7), (12, 4, 3, 3), (12,), (2, 12, 5, 4))
    )
    inputs, options = (x.contiguous(memory_format=layout), weight, bias, dy), (2, 1, 1, 2)
    with force(path):
        found = gradients(conv2d, *inputs, *options)
    wanted = gradients(F.conv2d, *(t.double() for t in inputs), *options)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert (found[0].stride()[1] == 1) == (layout == torch.channels_last)


def test_a_map_without_a_batch(device):
    """(C, H, W) with H = C: its channels are not its second dimension."""
    x, weight, bias, dy = (
        torch.randn(*n, device=device) for n in ((4, 5, 5), (5, 4, 1, 1), (5,), (5, 5, 5))
    )
    with force("triton"):
        found = gradients(conv2d, x, weight, bias, dy)
    for a, b in zip(found, gradients(F.conv2d, x, weight, bias, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_every_bias_of_the_model_learns_by_the_kernel(device, monkeypatch):
    """None is left to PyTorch's sum, and none learns twice."""
    seen = []

    def note(rows, dtype):
        seen.append(rows.shape[-1])
        return row_sum_reference(rows).to(dtype)

    monkeypatch.setattr(module, "row_sum", note)
    model = CTCLM(ModelConfig(variant="tiny", num_classes=5)).to(device)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    wanted = [m.bias.numel() for m in layers if m.bias is not None]
    images = 255 * torch.rand(1, 3, 64, 64, device=device)
    with monkeypatch.context() as patch:
        patch.setattr(module, "use_triton", lambda x, fits: fits)  # of biases alone
        losses = model.objective(model(images), torch.zeros(1, 64, 64, device=device).long())
    losses.total.backward()
    assert sorted(seen) == sorted(wanted) and len(wanted) > 50


def test_what_learns_nothing_is_pytorchs(device):
    x, weight, bias = (torch.ones(*n, device=device) for n in ((3, 4), (5, 4), (5,)))
    with force("triton"):
        assert linear(x.requires_grad_(), weight, bias).grad_fn.name() != "LearnBiasBackward"
        with torch.no_grad():
            assert linear(x, weight, bias.requires_grad_()).grad_fn is None
        assert linear(x, weight, bias).grad_fn.name() == "LearnBiasBackward"
        for shape, kind in (((0, 4), torch.float32), ((3, 4), torch.float64)):
            inputs = [torch.ones(*n, dtype=kind, device=device) for n in (shape, (5, 4), (5,))]
            with pytest.raises(ValueError, match="no kernel can run"):
                linear(*inputs[:2], inputs[2].requires_grad_())


# --- The kernel, against float64 ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows, C", [(1, 1), (700, 6), (130, 32), (63, 33), (21, 160), (3, 4096)])
def test_kernel_is_no_worse(rows, C, dtype, device, no_worse):
    check_sum(torch.randn(rows, C).to(dtype), device, no_worse)


def test_a_bias_of_32_bits_learns_in_32(device):
    """Under autocast: a sum of 300 numbers in 16 bits, each 1 + 1/1024, has no such digits."""
    rows = torch.full((300, 20), 1 + 1 / 1024, dtype=torch.float16, device=device)
    assert (row_sum(rows, torch.float32) == 300 + 300 / 1024).all()


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_kernel_with_several_tiles_to_a_program(programs, monkeypatch, device, no_worse):
    """Ten tiles of 128 rows, the last in part."""
    monkeypatch.setattr(sys.modules["kernels.norm"], "PROGRAMS", programs)
    check_sum(torch.randn(9 * 128 + 5, 32), device, no_worse)


def test_kernel_with_any_strides(device, no_worse):
    maps = torch.randn(2, 12, 5, 3)
    check_sum(maps.movedim(1, -1), device, no_worse)  # of a contiguous map
    check_sum(maps.contiguous(memory_format=torch.channels_last).movedim(1, -1), device, no_worse)
    check_sum(torch.randn(12, 80)[::2, 1::2], device, no_worse)
    check_sum(torch.ones(1, 1).expand(9, 7), device, no_worse)


def test_kernel_gives_the_same_bits_twice(device):
    rows = torch.randn(3000, 32, device=device)
    assert torch.equal(row_sum(rows, torch.float32), row_sum(rows, torch.float32))


# --- What PyTorch sees ----------------------------------------------------------------------------


def test_pytorch_accepts_the_operation(device):
    torch.library.opcheck(row_sum, (torch.randn(5, 8, device=device), torch.float32))
    rows = torch.randn(2, 3, 8, device=device).half().requires_grad_()
    torch.library.opcheck(row_sum, (rows, torch.float32))


def test_the_second_derivative_is_pytorchs(device):
    """Of dbias with respect to y: dy depends on y, and dbias on dy."""
    x, weight, bias = (
        torch.randn(*n, device=device).requires_grad_() for n in ((6, 4), (5, 4), (5,))
    )

    def second(function):
        (dbias,) = torch.autograd.grad(
            function(x, weight, bias).pow(3).sum(), bias, None, True, True
        )
        return torch.autograd.grad(dbias.square().sum(), (x, weight, bias))

    with force("triton"):
        found = second(linear)
    for a, b in zip(found, second(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_adds_up_in_32_bits(device):
    """The product in 16 bits; the bias and its gradient, of 300 rows of 1 + 1/128, in 32."""
    x, weight, bias = (torch.randn(*n, device=device) for n in ((300, 20), (5, 20), (5,)))
    with force("triton"), torch.autocast(device.type, torch.bfloat16):
        y = linear(x, weight, bias.requires_grad_())
    assert y.dtype == torch.bfloat16
    (dbias,) = torch.autograd.grad(y, bias, torch.full_like(y, 1 + 1 / 128))
    assert dbias.dtype == torch.float32 and (dbias == 300 + 300 / 128).all()
