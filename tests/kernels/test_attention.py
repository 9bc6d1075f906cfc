"""kernels/attention.py: equal to the written-out softmax, in float64, whatever the layout."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels import attention, force
from kernels import attention_triton as module
from kernels.attention import (
    attention_reference,
    fused_attention,
    fused_attention_backward,
    pytorch_is_faster,
)
from kernels.attention_triton import Blocks


def random_qkv(B, h, N, M, D, dtype=torch.float64):
    """As the model makes them: q a transposed view, k and v views into one projection."""
    q = torch.randn(B, N, h, D, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(B, M, 2, h, D, dtype=dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


def test_reference_by_hand():
    # One query, two keys: scores 0 and ln 3 -> weights 1/4 and 3/4.
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([1.0, 3.0], dtype=torch.float64).log().view(1, 1, 2, 1)
    v = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 1, 2, 1)
    assert attention_reference(q, k, v).item() == pytest.approx(4 / 4 + 8 * 3 / 4, rel=1e-12)


@pytest.mark.parametrize("N, M, D", [(1, 1, 16), (16, 63, 32), (197, 9, 64), (63, 16, 128)])
def test_equals_the_reference(N, M, D):
    q, k, v = random_qkv(2, 3, N, M, D)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    upstream = torch.randn(2, 3, N, D, dtype=torch.float64)
    expected = attention_reference(q, k, v)
    expected_grads = torch.autograd.grad(expected, (q, k, v), upstream)
    result = attention(q, k, v)
    grads = torch.autograd.grad(result, (q, k, v), upstream)
    # Two float64 computations of the same sums: they differ by rounding alone.
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_dtype(dtype, no_worse):
    low = [x.to(dtype) for x in random_qkv(2, 2, 128, 64, 32)]
    exact = attention_reference(*(x.double() for x in low))
    no_worse(attention(*low), attention_reference(*low), exact, exact)


def test_scale_is_honoured():
    q, k, v = random_qkv(1, 1, 5, 7, 16)
    uniform = attention(q, k, v, scale=0.0)  # every key weighs the same
    torch.testing.assert_close(uniform, v.mean(2, keepdim=True).expand_as(uniform))


def test_reference_gradients():
    inputs = [x.contiguous().requires_grad_() for x in random_qkv(1, 2, 3, 4, 2)]
    assert torch.autograd.gradcheck(attention_reference, inputs)


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((1, 2, 5, 16), (1, 2, 7, 16), (1, 2, 6, 16)),  # keys and values differ
        ((1, 2, 5, 16), (1, 2, 7, 32), (1, 2, 7, 32)),  # head dimensions differ
        ((1, 2, 5, 16), (1, 1, 7, 16), (1, 1, 7, 16)),  # heads differ
        ((5, 16), (7, 16), (7, 16)),
    ],
)
def test_shapes_that_do_not_fit(q, k, v):
    with pytest.raises(ValueError, match="attention takes q"):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))


# --- The kernels, against float64 -----------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles of 16 queries, of 32 backward, and a few keys at a time: small shapes have several."""

    def blocks(queries, most):
        return lambda M, *_: Blocks(queries, 16 if M <= 16 else most, 4, 1)

    monkeypatch.setattr(module, "forward_blocks", blocks(16, 32))
    monkeypatch.setattr(module, "query_gradient_blocks", blocks(32, 16))
    monkeypatch.setattr(module, "key_gradient_blocks", blocks(32, 16))


def results(function, inputs, upstream, scale=None):
    """The output and the three gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, scale)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out))


def assert_no_worse(inputs, no_worse, scale=None):
    upstream = torch.randn(inputs[0].shape, device=inputs[0].device)
    with force("triton"):
        ours = results(attention, inputs, upstream, scale)
    theirs = results(attention_reference, inputs, upstream, scale)
    exact = results(attention_reference, [x.double() for x in inputs], upstream, scale)
    sizes = exact[0], *sizes_of_summands(inputs, upstream, scale), exact[3]
    for name, *four in zip(("output", "dq", "dk", "dv"), ours, theirs, exact, sizes, strict=True):
        no_worse(*four, name)
    return ours


def sizes_of_summands(inputs, upstream, scale):
    """dq and dk add up scale p (dp - sum p dp) times a key or a query. Where one key has all the
    weight the two dp are equal and both gradients 0, but for the rounding of dp."""
    q, k, v, do = (x.double() for x in (*inputs, upstream))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    p = torch.softmax(scale * q @ k.mT, dim=-1)
    dp = do.abs() @ v.abs().mT
    size = abs(scale) * p * (dp + (p * dp).sum(3, keepdim=True))
    return size @ k.abs(), size.mT @ q.abs()


LOW = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "B, h, N, M, D",
    [(2, 3, 63, 16, 16), (1, 2, 1, 63, 32), (2, 1, 16, 1, 64), (1, 1, 40, 40, 128)],
)
def test_kernels_are_no_worse(B, h, N, M, D, dtype, device, small_blocks, no_worse):
    """Keys in one chunk and in several, full and not; queries in full tiles and not."""
    assert_no_worse([x.to(device) for x in random_qkv(B, h, N, M, D, dtype)], no_worse)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("N, M, D", [(197, 63, 32), (70, 300, 16)])
def test_kernels_with_the_blocks_as_shipped(N, M, D, dtype, device, no_worse):
    assert_no_worse([x.to(device) for x in random_qkv(1, 1, N, M, D, dtype)], no_worse)


def test_kernels_with_several_tiles_to_a_program(device, small_blocks, monkeypatch, no_worse):
    """On a GPU large batches have them: here three programs of two tiles, as if the batch were
    large. With two programs the tiles of the second could overlap those of the first unseen."""
    monkeypatch.setattr(module, "FORWARD_PROGRAMS", 4)
    monkeypatch.setattr(module, "QUERY_PROGRAMS", 4)
    monkeypatch.setattr(module, "KEY_PROGRAMS", 12)
    assert_no_worse([x.to(device) for x in random_qkv(1, 2, 170, 40, 16, torch.float32)], no_worse)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("programs, slices", [(1, 1), (8, 3), (100, 5)])
def test_slices_of_the_queries(
    programs, slices, dtype, device, small_blocks, monkeypatch, no_worse
):
    """One slice writes dk and dv itself; several are added up. As the model wants them next: in
    their dtype, heads beside each other."""
    counted = []
    sum_kernel = module.sum_kernel
    monkeypatch.setattr(module, "KEY_PROGRAMS", programs)
    monkeypatch.setattr(module, "sum_kernel", spy(sum_kernel, lambda *sizes: counted.append(sizes)))
    inputs = [x.to(device) for x in random_qkv(1, 2, 130, 20, 16, dtype)]
    _, dq, dk, dv = assert_no_worse(inputs, no_worse)
    assert [c[3] for c in counted] == [slices] * (slices > 1)
    for grad, x in ((dq, inputs[0]), (dk, inputs[1]), (dv, inputs[2])):
        assert grad.dtype == dtype and grad.shape == x.shape
        assert grad.transpose(1, 2).is_contiguous()


def spy(kernel, see):
    """The kernel, and what it is launched with."""

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                see(*arguments)
                kernel[grid](*arguments, **options)

            return launch

    return Spy()


@pytest.mark.parametrize(
    "layout", ["contiguous", "heads last", "each its own", "every second row", "transposed"]
)
def test_kernels_with_any_strides(layout, device, small_blocks, no_worse):
    q, k, v = (x.to(device) for x in random_qkv(2, 2, 24, 20, 16, torch.float32))
    if layout == "contiguous":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    elif layout == "each its own":
        k, v = k.contiguous(), v.repeat_interleave(3, dim=2)[:, :, ::3]
    elif layout == "every second row":
        q, k, v = (x.repeat_interleave(2, dim=2)[:, :, ::2] for x in (q, k, v))
    elif layout == "transposed":  # the last dimension is not contiguous
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    assert_no_worse([q, k, v], no_worse)


@pytest.mark.parametrize("size", [10.0, 1000.0])
def test_kernels_with_large_scores(size, device, small_blocks, no_worse):
    """Scores of thousands: all weight on one key, and no overflow."""
    q, k, v = (x.to(device) for x in random_qkv(1, 2, 20, 40, 16, torch.float32))
    assert_no_worse([size * q, k, v], no_worse)


CHUNKS = [
    30,
    40,
    70,
]  # keys: a chunk, two whose weights stay in registers, three that are read twice


@pytest.fixture
def backward_rounds_scores_otherwise(device, small_blocks, monkeypatch):
    """As on a machine that adds up a product in another order for another tile: each one of 32
    rows comes out two units in the last place larger. With `small_blocks` the backward pass has
    such tiles of queries; the forward pass has 16 rows. Backward blocks of keys have 16 too, so
    that scores with a row a key would not fit sums over scores with a row a query."""
    if device.type == "cuda":
        pytest.skip("products on a GPU are not the interpreter's")
    matmul = np.matmul

    def perturbed(a, b, **options):
        product = matmul(a, b, **options)
        return product * np.float32(1 + 2**-22) if product.shape[0] == 32 else product

    monkeypatch.setattr(np, "matmul", perturbed)


@pytest.mark.parametrize("M", CHUNKS)
@pytest.mark.parametrize("size", [1.0, 10.0, 1000.0])
def test_gradients_do_not_hang_on_the_rounding_of_the_forward_pass(
    size, M, backward_rounds_scores_otherwise, no_worse
):
    q, k, v = random_qkv(1, 2, 20, M, 16, torch.float32)
    assert_no_worse([size * q, k, v], no_worse)


@pytest.mark.parametrize("M", CHUNKS)
@pytest.mark.parametrize("size", [1.0, 1000.0, 1e8])
def test_backward_weights_sum_to_one(size, M, backward_rounds_scores_otherwise):
    """dv = p^T do: with do = 1 each column of dv adds up to the number of queries."""
    q, k, v = random_qkv(1, 2, 20, M, 16, torch.float32)
    with force("triton"):
        _, dq, dk, dv = results(attention, [size * q, k, v], torch.ones(1, 2, 20, 16))
    total = dv.double().sum(2)
    # 20 weights of 1, each the sum of M roundings of at most half a unit, and the factor above.
    torch.testing.assert_close(total, torch.full_like(total, 20), rtol=1e-5, atol=0)
    assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.parametrize("M", CHUNKS)
def test_score_gradients_sum_to_zero(M, backward_rounds_scores_otherwise):
    """dq = ds k: where all keys are the same, a query moves nothing."""
    q, k, v = random_qkv(1, 2, 20, M, 16, torch.float32)
    inputs = [1000 * q, k[:, :, :1].expand_as(k), v]
    with force("triton"):
        _, dq, _, _ = results(attention, inputs, torch.randn(1, 2, 20, 16))
    # |ds| is of size 1 / M, and M of them are added up.
    assert dq.abs().max() < 1e-5


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_kernels_honour_the_scale(scale, device, small_blocks, no_worse):
    inputs = [x.to(device) for x in random_qkv(1, 1, 20, 40, 16, torch.float32)]
    assert_no_worse(inputs, no_worse, scale)


def test_kernels_twice_the_same_bits(device, small_blocks):
    inputs = [x.to(device) for x in random_qkv(2, 2, 40, 40, 16, torch.float32)]
    upstream = torch.randn(inputs[0].shape)
    with force("triton"):
        one, two = (results(attention, inputs, upstream) for _ in "12")
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_registered_with_pytorch(device, small_blocks):
    """Fake tensors, autograd and schema agree with what the operations do."""
    # Without "test_aot_dispatch_dynamic": the interpreter wants numbers for sizes.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = [x.to(device).requires_grad_() for x in random_qkv(1, 2, 20, 18, 16, torch.float32)]
    with force("triton"):
        torch.library.opcheck(fused_attention, (*inputs, 0.25), test_utils=checks)
        q, k, v = (x.detach() for x in inputs)
        arguments = (torch.randn_like(q), q, k, v, 0.25)
        torch.library.opcheck(fused_attention_backward, arguments, test_utils=checks)


def test_kernels_compile_as_one_graph(device, small_blocks):
    inputs = [x.to(device) for x in random_qkv(1, 2, 20, 18, 16, torch.float32)]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(inputs[0].shape)
    with force("triton"):
        wanted = results(attention, inputs, upstream)
        result = results(compiled, inputs, upstream)
    for a, b in zip(result, wanted, strict=True):
        assert torch.equal(a, b)


def test_kernels_refuse_a_second_derivative(device, small_blocks):
    inputs = [x.to(device).requires_grad_() for x in random_qkv(1, 1, 4, 4, 16, torch.float32)]
    with force("triton"):
        (grad,) = torch.autograd.grad(attention(*inputs).sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_autocast_lowers_the_precision(path, device, small_blocks):
    """As PyTorch's own attention does; float16, which the interpreter can multiply."""
    inputs = [x.to(device) for x in random_qkv(1, 1, 20, 18, 16, torch.float32)]
    with force(path), torch.autocast(device.type, torch.float16):
        result = attention(*inputs)
        low = attention(*(x.half() for x in inputs))
    assert result.dtype == torch.float16 and torch.equal(result, low)


def test_float32_without_gradient_is_left_to_pytorch_on_a_gpu():
    """Its kernel is faster there; ours gives the same gradients twice."""

    def tensor(dtype=torch.float32, is_cuda=True, requires_grad=False):
        return SimpleNamespace(dtype=dtype, is_cuda=is_cuda, requires_grad=requires_grad)

    plain, learning = tensor(), tensor(requires_grad=True)
    assert pytorch_is_faster(plain, plain, plain)
    assert not pytorch_is_faster(plain, learning, plain)
    with torch.no_grad():
        assert pytorch_is_faster(plain, learning, plain)
    assert not pytorch_is_faster(*3 * [tensor(torch.bfloat16)])
    assert not pytorch_is_faster(*3 * [tensor(is_cuda=False)])  # in the interpreter


def test_what_no_kernel_can_do(device):
    for inputs in (
        random_qkv(1, 1, 4, 4, 16, torch.float64),
        random_qkv(1, 1, 4, 4, 24, torch.float32),
    ):
        inputs = [x.to(device) for x in inputs]
        with force("triton"), pytest.raises(ValueError, match="no kernel can run on"):
            attention(*inputs)
        attention(*inputs)  # PyTorch's own can


@pytest.mark.parametrize("M, D, dtype", [*product((1, 63, 256, 1000), (16, 32, 64, 128), LOW)])
@pytest.mark.parametrize("shared_memory", [99 * 1024, 227 * 1024])
def test_blocks_are_what_triton_takes(M, D, dtype, shared_memory):
    """Powers of two, no less than a matrix instruction's 16."""
    pytest.importorskip("triton", reason="Triton is not installed")
    for blocks in (
        module.forward_blocks,
        module.query_gradient_blocks,
        module.key_gradient_blocks,
    ):
        b = blocks(M, D, dtype, shared_memory)
        assert all(n >= 16 and n & (n - 1) == 0 for n in b[:2])
        assert b.warps in (4, 8)
