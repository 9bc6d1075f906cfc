"""kernels/norm.py: equal to PyTorch's layer norm in float64, whatever the rows and dtypes."""

import sys

import pytest
import torch

from ctclm import CTCLM, ModelConfig
from kernels import force, layer_norm
from kernels.group_norm import group_norm_reference
from kernels.norm import fused_layer_norm, fused_layer_norm_backward, layer_norm_reference

module = sys.modules["kernels.norm"]
EPS = 1e-6


def random_inputs(rows, C, offset=0.0):
    """x, weight, bias, and a gradient from above."""
    return offset + torch.randn(rows, C), torch.rand(C) + 0.5, torch.randn(C), torch.randn(rows, C)


def results(function, x, weight, bias, dy, *options):
    """y, dx, dweight, dbias."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*inputs, EPS, *options)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))


def check(inputs, device, no_worse, *options):
    """The kernels' error is at most twice that of PyTorch in the same dtypes -> their results."""
    inputs = [t.to(device) for t in inputs]
    with force("triton"):
        ours = results(layer_norm, *inputs, *options)
    theirs = results(layer_norm, *inputs, *options)
    exact = results(layer_norm_reference, *(t.double() for t in inputs))
    x, weight, _, dy = (t.double() for t in inputs)
    terms = dy * weight / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()  # dx subtracts means
    summands = (exact[0], terms, *exact[2:])
    for name, *found in zip(
        ("y", "dx", "dweight", "dbias"), ours, theirs, exact, summands, strict=True
    ):
        no_worse(*found, name)
    return ours


# --- Everywhere -----------------------------------------------------------------------------------


def test_by_hand():
    # Mean 2, deviation 1: -1 and 1, times the weight, plus the bias.
    x, weight, bias = torch.tensor([[1.0, 3.0]]), torch.tensor([2.0, 5.0]), torch.tensor([0.5, 7.0])
    torch.testing.assert_close(layer_norm(x, weight, bias, 0.0), torch.tensor([[-1.5, 12.0]]))


def test_without_a_kernel_it_is_pytorchs():
    x, weight, bias, _ = random_inputs(7, 20)
    for cast in (torch.float64, torch.bfloat16, torch.float32):
        inputs = [t.to(cast) for t in (x, weight, bias)]
        wanted = torch.nn.functional.layer_norm(inputs[0], (20,), *inputs[1:], EPS)
        assert torch.equal(layer_norm(*inputs, EPS), wanted)
        assert torch.equal(layer_norm(*inputs, EPS, torch.float16), wanted.half())


@pytest.mark.parametrize(
    "x, weight, bias",
    [((5, 4), (5,), (5,)), ((5, 4), (4,), (1,)), ((5, 4), (5, 4), (5, 4)), ((), (), ())],
)
def test_shapes_that_do_not_fit(x, weight, bias):
    with pytest.raises(ValueError, match=r"layer_norm takes x \(..., C\), weight and bias \(C,\)"):
        layer_norm(torch.zeros(x), torch.zeros(weight), torch.zeros(bias), EPS)


def test_what_has_no_kernel_takes_pytorchs_path(device):
    def path(x, C, eps=EPS, dtype=torch.float32):
        ones = torch.ones(C, device=device, dtype=dtype)
        layer_norm(torch.ones(x, device=device, dtype=dtype), ones, ones, eps)

    with force("triton"):
        path((2, 3), 3)
        for x, C, *more in (
            ((2, 1025), 1025),
            ((0, 3), 3),
            ((2, 0), 0),
            ((2, 3), 3, 0.0),
            ((2, 3), 3, EPS, torch.float64),
        ):
            with pytest.raises(ValueError, match="no kernel can run"):
                path(x, C, *more)


# --- The kernels, against float64 -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows, C", [(3, 1), (130, 20), (64, 32), (63, 33), (21, 96), (9, 160)])
def test_kernels_are_no_worse(rows, C, dtype, device, no_worse):
    check([t.to(dtype) for t in random_inputs(rows, C)], device, no_worse)


@pytest.mark.parametrize("C", [32, 96])
def test_kernels_with_a_large_mean(C, device, no_worse):
    """A mean of squares minus a square of means would have no digit left."""
    check(random_inputs(70, C, offset=1e3), device, no_worse)


def test_kernels_with_mixed_dtypes(device, no_worse):
    """As under autocast: tokens and weights in float32, what feeds a product in 16 bits; and a
    convolution's result in 16 bits, from which the float32 stream begins."""
    x, weight, bias, dy = random_inputs(70, 32)
    y, dx, dweight, _ = check([x, weight, bias, dy.half()], device, no_worse, torch.float16)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float16, torch.float32, torch.float32)
    with force("triton"):
        low = [t.to(device) for t in (x.half(), weight, bias, dy)]
        y, dx, dweight, dbias = results(layer_norm, *low, torch.float32)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.float16, torch.float32)
    exact = results(layer_norm_reference, *(t.double() for t in low))
    for a, e in zip((y, dweight, dbias), exact[:1] + exact[2:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), exact[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_kernels_with_several_tiles_to_a_program(programs, monkeypatch, device, no_worse):
    """Ten tiles, the last in part. With two programs wanted three take four tiles each, of which
    two lie beyond the end."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    assert module.split(10) == {1: (2, 8), 2: (3, 4), 3: (5, 2)}[programs]
    check(random_inputs(9 * 64 + 5, 32), device, no_worse)


def test_programs_are_few_and_all_tiles_are_taken():
    for tiles in (1, 511, 512, 1023, 1024, 4096, 5000, 10**6 + 1):
        programs, each = module.split(tiles)
        assert programs * each >= tiles > (programs - 1) * each and programs < 2 * module.PROGRAMS


def test_kernels_with_any_strides(device, no_worse):
    x, weight, bias, dy = random_inputs(12, 40)
    tokens = torch.randn(2, 40, 3, 2).contiguous(memory_format=torch.channels_last)
    dy = dy.view(2, 6, 40)
    for strided in (
        x.view(2, 6, 40),
        tokens.flatten(2).transpose(1, 2),  # tokens of a channels-last map: contiguous
        tokens.contiguous().flatten(2).transpose(1, 2),  # of another: not
        torch.randn(2, 12, 80)[:, ::2, 1::2],
    ):
        check([strided, weight, bias, dy], device, no_worse)
    check([x, torch.rand(80)[::2], bias, torch.ones(1, 1).expand(12, 40)], device, no_worse)


def test_kernels_give_the_same_bits_twice(device):
    inputs = [t.to(device) for t in random_inputs(300, 32)]
    with force("triton"):
        first, second = results(layer_norm, *inputs), results(layer_norm, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- What PyTorch sees ----------------------------------------------------------------------------


def test_pytorch_accepts_the_operations(device):
    x, weight, bias, dy = (t.to(device) for t in random_inputs(5, 8))
    for any_layout in (x, torch.randn(8, 5, device=device).T):  # any layout comes back contiguous
        torch.library.opcheck(fused_layer_norm_backward, (dy, any_layout, weight, EPS))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(fused_layer_norm, (*inputs, EPS, torch.float16))


def test_the_second_derivative_is_refused(device):
    x, weight, bias, _ = (t.to(device).requires_grad_() for t in random_inputs(5, 20))
    with force("triton"):
        y = layer_norm(x, weight, bias, EPS)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm has no second derivative on a GPU"):
        dx.sum().backward()


def test_autocast(device):
    """PyTorch's rule on a GPU is float32; `dtype` overrides it."""
    x, weight, bias, _ = (t.to(device) for t in random_inputs(5, 20))
    with force("triton"), torch.autocast(device.type, torch.bfloat16):
        assert layer_norm(x.bfloat16(), weight, bias, EPS).dtype == torch.float32
        assert layer_norm(x, weight, bias, EPS, torch.bfloat16).dtype == torch.bfloat16


def test_in_the_model_only_the_streams_stay_in_float32(device, monkeypatch):
    """Under autocast, and what feeds products comes in the dtype of the products."""
    asked = {}
    model = CTCLM(ModelConfig(variant="tiny")).to(device)
    names = {m.weight: name for name, m in model.named_modules() if hasattr(m, "stream")}

    def layer(x, weight, bias, eps, dtype):
        asked[names[weight]] = dtype
        return layer_norm_reference(x, weight, bias, eps)

    def group(x, groups, weight, bias, eps, dtype):
        asked[names[weight]] = dtype
        return group_norm_reference(x, groups, weight, bias, eps)

    monkeypatch.setattr("ctclm.layer_norm", layer)
    monkeypatch.setattr("ctclm.group_norm", group)
    for autocast, wanted in ((False, None), (True, torch.bfloat16)):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast), torch.no_grad():
            model(255 * torch.rand(1, 3, 32, 32, device=device))
        # Two a stage, two a block, one for each stage that reduces keys; and of the CNN: stem, head
        assert len(asked) == (4 * 2 + 5 * 2 + 1 + 1 + 2) + (1 + 4 + 5 * 2 + 1)
        streams = {name for name, dtype in asked.items() if dtype is None}
        if autocast:
            assert {asked[name] for name in set(asked) - streams} == {wanted}
            assert streams == {
                *(f"transformer.stages.{s}.embed_norm" for s in range(4)),
                *(f"cnn.stages.{s}.1" for s in range(4)),
            }
        else:
            assert streams == set(asked)
