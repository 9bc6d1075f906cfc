"""kernels/attention.py: equal to the written-out softmax, in float64, whatever the layout."""

import pytest
import torch

from kernels import attention
from kernels.attention import attention_reference


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
def test_error_is_that_of_the_dtype(dtype):
    """No more than twice the error of the written-out computation in the same dtype."""
    q, k, v = random_qkv(2, 2, 128, 64, 32)
    exact = attention_reference(q, k, v)
    low = [x.to(dtype) for x in (q, k, v)]
    ours = (attention(*low).double() - exact).norm()
    theirs = (attention_reference(*low).double() - exact).norm()
    assert ours <= 2 * theirs + 1e-7


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
