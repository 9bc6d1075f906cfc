"""What only a GPU can show: python -m pytest -m gpu"""

import pytest
import torch

from ctclm import CTCLM, ModelConfig
from experiments.bench import labels_for, logits, losses, outputs_and_gradients, qkv
from kernels import (
    attention,
    collaborative_loss,
    force,
    group_norm,
    layer_norm,
    linear,
    multiscale_convolution,
)
from kernels.attention import attention_reference
from kernels.bias import row_sum, row_sum_reference
from kernels.distill import TRANSFERS, collaborative_loss_reference
from kernels.group_norm import group_norm_reference
from kernels.multiscale import multiscale_convolution_reference
from kernels.norm import layer_norm_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]
BF16, CUDA = torch.bfloat16, torch.device("cuda")


def assert_no_worse(ours, reference, inputs, no_worse):
    """Also: twice the same bits."""
    results = outputs_and_gradients(ours, inputs)
    low = outputs_and_gradients(reference, inputs)
    exact = outputs_and_gradients(reference, [x.double() for x in inputs])
    for i, (a, b, e) in enumerate(zip(results, low, exact, strict=True)):
        no_worse(a, b, e, e, f"tensor {i}")
    for a, b in zip(results, outputs_and_gradients(ours, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "B, h, N, M, D",
    [
        (4, 1, 16384, 256, 32),  # stages 1 to 4 of a crop of 512 pixels
        (4, 1, 16384, 256, 64),
        (4, 2, 4096, 256, 64),
        (4, 5, 1024, 256, 32),
        (4, 8, 256, 256, 64),
        (2, 3, 1000, 777, 16),  # nothing a multiple of anything, several chunks of keys
        (2, 3, 1000, 777, 128),
        (1, 1, 1, 1, 64),
    ],
)
def test_attention(B, h, N, M, D, dtype, no_worse):
    if (M, dtype) == (1, torch.float32):
        pytest.skip(
            "one key, float32: both gradients are 0 but for rounding, see test_attention.py"
        )
    inputs = qkv(B, h, N, M, D, dtype, CUDA)
    if M == 1:  # dq and dk are 0 but for rounding: see test_attention.py
        assert torch.equal(attention(*inputs), inputs[2])
        return
    assert_no_worse(attention, attention_reference, inputs, no_worse)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "B, C, H, W",
    [
        (4, 32, 128, 128),  # stages 1 to 4 of b0, crops of 512 pixels
        (4, 64, 64, 64),
        (4, 160, 32, 32),
        (4, 256, 16, 16),
        (2, 512, 16, 16),  # stage 4 of b2
        (3, 48, 37, 203),  # nothing a multiple of a strip or of a program's rows
        (2, 16, 3, 2),  # smaller than the kernel
    ],
)
def test_multiscale_convolution(B, C, H, W, dtype, no_worse):
    x = torch.randn(B, C, H, W, device=CUDA, dtype=dtype)
    kernel = (torch.randn(C, 1, 11, 11, device=CUDA) / 11).to(dtype)
    inputs = [x, kernel]
    assert_no_worse(multiscale_convolution, multiscale_convolution_reference, inputs, no_worse)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "K, h, w",
    [(2, 128, 128), (7, 128, 128), (16, 64, 128), (6, 37, 203), (20, 32, 64)],  # 20: no kernel
)
def test_loss(K, h, w, dtype, no_worse):
    ours, reference = losses(labels_for(4, h, w, K, CUDA))
    assert_no_worse(ours, reference, logits(4, K, h, w, dtype, CUDA), no_worse)


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_loss_with_every_transfer(transfer, no_worse):
    labels, options = labels_for(2, 64, 64, 6, CUDA), {"transfer": transfer, "temperature": 2.0}
    ours, reference = (
        lambda c, t, f=f: torch.stack(f(c, t, labels, **options)[:4])
        for f in (collaborative_loss, collaborative_loss_reference)
    )
    assert_no_worse(ours, reference, logits(2, 6, 64, 64, BF16, CUDA), no_worse)


def test_loss_needs_a_fraction_of_the_memory():
    """Forward and backward beyond inputs, outputs and gradients: less than one of the maps of
    B x K x H x W that the reference holds nine of."""
    B, K, side = 4, 7, 128
    labels, both = labels_for(B, side, side, K, CUDA), logits(B, K, side, side, BF16, CUDA)
    both = [x.requires_grad_() for x in both]
    collaborative_loss(*both, labels).cnn_ce.backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.stack(collaborative_loss(*both, labels)[:4]).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < B * K * (4 * side) ** 2 * 4


def test_nothing_waits_for_the_gpu():
    labels, both = labels_for(2, 64, 64, 7, CUDA), logits(2, 7, 64, 64, BF16, CUDA)
    inputs = [x.requires_grad_() for x in [*both, *qkv(2, 2, 512, 256, 32, BF16, CUDA)]]

    def work():
        out = torch.stack(collaborative_loss(*inputs[:2], labels)[:4]).sum()
        torch.autograd.grad(out + attention(*inputs[2:]).float().sum(), inputs)

    work()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_torch_compile():
    labels, both = labels_for(2, 64, 64, 7, CUDA), logits(2, 7, 64, 64, BF16, CUDA)

    def terms(cnn, transformer):
        return torch.stack(collaborative_loss(cnn, transformer, labels)[:4])

    for function, inputs in ((terms, both), (attention, qkv(2, 2, 512, 256, 32, BF16, CUDA))):
        wanted = outputs_and_gradients(function, inputs)
        compiled = torch.compile(function, fullgraph=True)
        for a, b in zip(outputs_and_gradients(compiled, inputs), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("x_dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("y_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "rows, C",
    [(65536, 32), (16384, 64), (4096, 160), (1024, 256), (4096, 320), (1024, 512), (999, 1000)],
)
def test_layer_norm(rows, C, x_dtype, y_dtype, no_worse):
    x = (3 + torch.randn(rows, C, device=CUDA)).to(x_dtype)
    inputs = [x, torch.rand(C, device=CUDA) + 0.5, torch.randn(C, device=CUDA)]

    def ours(x, weight, bias):
        return layer_norm(x, weight, bias, 1e-6, y_dtype)

    def reference(x, weight, bias):
        y = layer_norm_reference(x.to(weight.dtype), weight, bias, 1e-6)
        return y if y.dtype == torch.float64 else y.to(y_dtype)

    assert_no_worse(ours, reference, inputs, no_worse)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_and_gradients(ours, inputs)  # compiled by now: nothing waits for the GPU
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("x_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("y_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "B, C, H, W", [(4, 16, 256, 256), (4, 32, 128, 128), (4, 160, 32, 32), (3, 512, 17, 9)]
)
def test_group_norm(B, C, H, W, x_dtype, y_dtype, no_worse):
    x = (3 + torch.randn(B, C, H, W, device=CUDA)).to(x_dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    inputs = [x, torch.rand(C, device=CUDA) + 0.5, torch.randn(C, device=CUDA)]

    def ours(x, weight, bias):
        return group_norm(x, 8, weight, bias, 1e-5, y_dtype)

    def reference(x, weight, bias):
        y = group_norm_reference(x.to(weight.dtype), 8, weight, bias, 1e-5)
        return y if y.dtype == torch.float64 else y.to(y_dtype)

    assert_no_worse(ours, reference, inputs, no_worse)
    y, dx, *_ = outputs_and_gradients(ours, inputs)
    for image in (y, dx):
        assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(16, 128, 128, 128), (16, 64, 64, 256), (16384, 640), (1024, 1024), (999, 4096), (70001, 6)],
)
def test_row_sum(shape, dtype, no_worse):
    rows = torch.randn(shape, device=CUDA).to(dtype)
    ours, exact = row_sum(rows, dtype), row_sum_reference(rows.double())
    terms = rows.double().flatten(0, -2).norm(dim=0)
    no_worse(ours, row_sum_reference(rows), exact, terms)
    assert torch.equal(ours, row_sum(rows, dtype))


def test_a_bias_under_autocast_learns_in_float32():
    x, weight, bias = (torch.randn(*n, device=CUDA) for n in ((50000, 32), (96, 32), (96,)))
    dy = torch.randn(50000, 96, device=CUDA).to(BF16)
    with torch.autocast("cuda", BF16):
        y = linear(x, weight, bias.requires_grad_())
    (dbias,) = torch.autograd.grad(y, bias, dy)
    assert dbias.dtype == torch.float32
    torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1e-5, atol=1e-3)


def test_layer_norm_compiles():
    inputs = [torch.randn(2, 1000, 160, device=CUDA), *torch.randn(2, 160, device=CUDA)]

    def function(x, weight, bias):
        with torch.autocast("cuda", BF16):
            return layer_norm(x, weight, bias, 1e-6)

    wanted = outputs_and_gradients(function, inputs)
    assert wanted[0].dtype == torch.float32  # PyTorch's rule
    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(outputs_and_gradients(compiled, inputs), wanted, strict=True):
        assert torch.equal(a, b)


def test_a_training_step_is_the_references():
    """Gradients in bf16: at most twice as far from float32's as PyTorch's own operations are."""
    torch.manual_seed(0)
    model = CTCLM(ModelConfig(variant="b0")).to(CUDA)
    images = 255 * torch.rand(2, 3, 256, 256, device=CUDA)
    labels = labels_for(2, 64, 64, 6, CUDA)

    def gradients(path, bf16):
        model.zero_grad()
        with force(path), torch.autocast("cuda", BF16, enabled=bf16):
            losses = model.objective(model(images), labels)
        losses.total.backward()
        return losses.total.item(), [p.grad.clone() for p in model.parameters()]

    wanted_loss, wanted = gradients("pytorch", bf16=False)
    (ours_loss, ours), (theirs_loss, theirs) = (gradients(p, True) for p in ("triton", "pytorch"))

    def distance(found):
        return sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True)).sqrt()

    assert distance(ours) <= 2 * distance(theirs)
    assert abs(ours_loss - wanted_loss) <= 2 * abs(theirs_loss - wanted_loss) + 1e-3 * wanted_loss
