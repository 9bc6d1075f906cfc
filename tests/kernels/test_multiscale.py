"""kernels/multiscale.py: equal to F.conv2d in float64, forward and both gradients."""

import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import force, multiscale_convolution
from kernels.multiscale import multiscale_convolution_reference

module = sys.modules["kernels.multiscale"]


def random_inputs(B, C, H, W, dtype=torch.float32):
    return torch.randn(B, C, H, W).to(dtype), (torch.randn(C, 1, 11, 11) / 11).to(dtype)


def test_reference_by_hand():
    """A single 1 in x copies the kernel, turned round, around itself."""
    x = torch.zeros(1, 1, 15, 15)
    x[0, 0, 7, 6] = 1
    kernel = torch.randn(1, 1, 11, 11)
    y = multiscale_convolution(x, kernel)
    wanted = torch.zeros(15, 15)
    wanted[2:13, 1:12] = kernel[0, 0].flip(0, 1)
    assert torch.equal(y[0, 0], wanted)


@pytest.mark.parametrize("B, C, H, W", [(2, 1, 5, 13), (1, 24, 12, 11), (2, 16, 1, 1)])
def test_equals_the_reference(B, C, H, W):
    inputs = [x.double().requires_grad_() for x in random_inputs(B, C, H, W)]
    result, wanted = multiscale_convolution(*inputs), multiscale_convolution_reference(*inputs)
    assert torch.equal(result, wanted)
    assert result.shape == (B, C, H, W)


@pytest.mark.parametrize("B, C, H, W", [(3, 2, 5, 13), (1, 24, 12, 11), (2, 16, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_on_a_cpu(B, C, H, W, layout):
    """The same products in another order, so float64 rounds the sums otherwise."""
    x, kernel = (x.double() for x in random_inputs(B, C, H, W))
    inputs = x.contiguous(memory_format=layout).requires_grad_(), kernel.requires_grad_()
    upstream = torch.randn(B, C, H, W).double()
    found, wanted = (
        torch.autograd.grad(convolution(*inputs), inputs, upstream)
        for convolution in (multiscale_convolution, multiscale_convolution_reference)
    )
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-15 * 121)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-15 * B * H * W)


def test_a_second_derivative_on_a_cpu():
    x, kernel = (x.double().requires_grad_() for x in random_inputs(2, 1, 2, 3))
    assert torch.autograd.gradgradcheck(multiscale_convolution, (x, kernel))


@pytest.mark.parametrize(
    "x, kernel",
    [
        ((1, 16, 5, 5), (16, 1, 9, 9)),
        ((1, 16, 5, 5), (8, 1, 11, 11)),
        ((1, 16, 5, 5), (16, 11, 11)),
        ((16, 5, 5), (16, 1, 11, 11)),
    ],
)
def test_shapes_that_do_not_fit(x, kernel):
    with pytest.raises(ValueError, match="multiscale_convolution takes x"):
        multiscale_convolution(torch.zeros(x), torch.zeros(kernel))


# --- The kernels, against float64 -----------------------------------------------------------------


@pytest.fixture
def low(device, monkeypatch):
    """The dtype to test in. The interpreter computes float32 as well, and faster than float16; and
    16 channels to a program are half as many programs."""
    if device.type == "cuda":
        return torch.float16
    monkeypatch.setattr(module, "DTYPES", (torch.float16, torch.float32))
    monkeypatch.setattr(module, "CHANNELS", 16)
    return torch.float32


def results(function, inputs, upstream):
    """The output and both gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def assert_no_worse(inputs, no_worse):
    upstream = torch.randn(inputs[0].shape).to(inputs[0])
    with force("triton"):
        ours = results(multiscale_convolution, inputs, upstream)
    theirs = results(multiscale_convolution_reference, inputs, upstream)
    exact = results(multiscale_convolution_reference, [x.double() for x in inputs], upstream)
    for name, *three in zip(("y", "dx", "dk"), ours, theirs, exact, strict=True):
        no_worse(*three, three[-1], name)
    return ours


@pytest.mark.parametrize(
    "B, C, H, W",
    [
        (2, 16, 9, 19),  # two pieces of rows, two strips in a row, neither full
        (17, 16, 2, 3),  # more strips than a program has; smaller than the kernel
        (1, 32, 1, 1),
    ],
)
def test_kernels_are_no_worse(B, C, H, W, device, low, no_worse):
    inputs = [x.to(device) for x in random_inputs(B, C, H, W, low)]
    for result in assert_no_worse(inputs, no_worse)[:2]:
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_kernels_in_float16(device, low, no_worse):
    assert_no_worse([x.to(device) for x in random_inputs(1, 16, 3, 18, torch.float16)], no_worse)


@pytest.mark.parametrize("layout", ["channels last", "every second column", "turned"])
def test_kernels_with_any_strides(layout, device, low, no_worse):
    x, kernel = (t.to(device) for t in random_inputs(1, 16, 3, 4, low))
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "every second column":
        x = x.repeat_interleave(2, dim=3)[..., ::2]
    else:
        x, kernel = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, kernel))
    assert_no_worse([x, kernel], no_worse)


def test_the_last_sum_of_many_parts(device):
    """More parts than are read at a time, and no multiple of it; nor of the lanes."""
    partial, dk = torch.randn(37, 300, device=device), torch.empty(300, device=device)
    module.sum_kernel[3,](partial, dk, 37, 300, 16, 128)
    torch.testing.assert_close(dk.double(), partial.double().sum(0), rtol=1e-5, atol=1e-5)


def test_a_nan_stays_near(device, low):
    """It may take its strip of 16 columns along and the strips beside, for 11 rows; no more."""
    x, kernel = (t.to(device) for t in random_inputs(1, 16, 8, 49, low))
    with force("triton"):
        clean = multiscale_convolution(x, kernel)
        x[0, 3, 0, 20] = torch.nan
        y = multiscale_convolution(x, kernel)
    spoiled = y.isnan()
    assert spoiled[0, 3, :6, 15:26].all()  # as in PyTorch
    assert not spoiled[0, 3, 6:].any() and not spoiled[0, 3, :, 48:].any()
    assert not spoiled[0, :3].any() and not spoiled[0, 4:].any()
    assert torch.equal(y[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("H", [1, 8, 9, 100, 128])
@pytest.mark.parametrize("programs", [1, 40, 1000])
def test_rows_of_a_program(programs, H):
    """As many as still leave work for every processor."""
    pytest.importorskip("triton", reason="Triton is not installed")
    length = module.rows_per_program(programs, H)
    assert length & (length - 1) == 0
    enough = programs * -(-H // length) >= module.PROGRAMS
    assert enough or length <= 8
    assert length >= H or programs * -(-H // (2 * length)) < module.PROGRAMS


def test_kernels_twice_the_same_bits(device, low):
    inputs = [x.to(device) for x in random_inputs(1, 16, 2, 3, low)]
    upstream = torch.randn(inputs[0].shape).to(inputs[0])
    with force("triton"):
        one, two = (results(multiscale_convolution, inputs, upstream) for _ in "12")
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_registered_with_pytorch(device, low):
    """Fake tensors, autograd and schema agree with what the operations do."""
    # Without "test_aot_dispatch_dynamic": the interpreter wants numbers for sizes.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = [t.to(device).requires_grad_() for t in random_inputs(1, 16, 2, 3, low)]
    with force("triton"):
        torch.library.opcheck(module.fused_convolution, inputs, test_utils=checks)
        x, kernel = (t.detach() for t in inputs)
        arguments = (torch.randn_like(x), x, kernel)
        torch.library.opcheck(module.fused_convolution_backward, arguments, test_utils=checks)


def test_kernels_compile_as_one_graph(device, low):
    inputs = [t.to(device) for t in random_inputs(1, 16, 2, 3, low)]
    compiled = torch.compile(multiscale_convolution, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(inputs[0].shape).to(inputs[0])
    with force("triton"):
        wanted = results(multiscale_convolution, inputs, upstream)
        found = results(compiled, inputs, upstream)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_kernels_refuse_a_second_derivative(device, low):
    inputs = [t.to(device).requires_grad_() for t in random_inputs(1, 16, 1, 1, low)]
    with force("triton"):
        out = multiscale_convolution(*inputs).sum()
        (grad,) = torch.autograd.grad(out, inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_autocast_lowers_the_precision(path, device, low):
    """As F.conv2d does; float16, which the interpreter can multiply."""
    x, kernel = (t.to(device) for t in random_inputs(1, 16, 2, 3))
    with force(path), torch.autocast(device.type, torch.float16):
        result = multiscale_convolution(x, kernel)
        wanted = multiscale_convolution(x.half(), kernel.half())
        assert F.conv2d(x, kernel, padding=5, groups=16).dtype == result.dtype == torch.float16
    assert torch.equal(result, wanted)


def test_what_no_kernel_can_do(device):
    x, kernel = (t.to(device) for t in random_inputs(1, 24, 2, 3, torch.float16))
    with force("triton"):
        with pytest.raises(ValueError, match="no kernel can run on"):
            multiscale_convolution(x, kernel)
        assert multiscale_convolution(x.float(), kernel.float()).dtype == torch.float32
    assert multiscale_convolution(x, kernel).shape == x.shape  # PyTorch can
