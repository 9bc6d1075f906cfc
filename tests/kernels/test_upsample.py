"""kernels/upsample.py: two products are bilinear interpolation, and so is their gradient."""

import pytest
import torch

from kernels import force, upsample
from kernels.upsample import interpolate, interpolation_matrix, upsample_reference

SIZES = [(4, 6, 16, 24), (5, 3, 40, 24), (7, 9, 20, 11), (1, 1, 8, 5), (6, 8, 6, 8), (9, 16, 4, 5)]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("h,w,H,W", SIZES)
def test_values_and_gradients(h, w, H, W, dtype, channels_last, device):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, h, w, device=device).to(dtype).contiguous(memory_format=layout)
    g = torch.randn(2, 3, H, W, device=device).to(dtype).contiguous(memory_format=layout)

    def both(function, x, g):
        x = x.detach().requires_grad_()
        y = function(x, (H, W))
        return y.detach(), torch.autograd.grad(y, x, g)[0]

    with force("triton"):
        ours = both(upsample, x, g)
    theirs = both(upsample_reference, x, g)
    exact = both(upsample_reference, x.double(), g.double())
    for name, a, b, e in zip(("y", "dx"), ours, theirs, exact, strict=True):
        # Our map between the products is rounded to the dtype of x; PyTorch's is not.
        between = torch.finfo(dtype).eps / 2 * e.norm().item() * (dtype == torch.bfloat16)
        assert (a.double() - e).norm() <= 2 * (b.double() - e).norm() + between + 1e-6 * e.norm()
        assert a.dtype == dtype, name
        assert a.is_contiguous(memory_format=layout) or h * w == 1, name  # one pixel has both


def test_the_second_derivative_is_there(device):
    """The operation is linear: its gradient is the same operation with transposed matrices."""
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    with force("triton"):
        assert torch.autograd.gradcheck(lambda x: upsample(x, (6, 5)), x)
        assert torch.autograd.gradgradcheck(lambda x: upsample(x, (6, 5)), x)


def test_a_constant_stays_and_weights_sum_to_one():
    for n, N in ((3, 12), (8, 5), (1, 7)):
        matrix = interpolation_matrix(n, N, torch.float64, torch.device("cpu"))
        torch.testing.assert_close(matrix.sum(1), torch.ones(N).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("transposed", [False, True])
def test_pytorch_accepts_the_operation(transposed, device):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=layout).requires_grad_()
        torch.library.opcheck(interpolate, (x, 8, 15, transposed))


def test_autocast_leaves_the_dtype(device):
    """As PyTorch's interpolation: full logits in float32 stay there."""
    x = torch.randn(1, 2, 3, 4, device=device)
    with force("triton"), torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(upsample(x, (6, 8)), upsample(x, (6, 8)).float())
        assert upsample(x, (6, 8)).dtype == torch.float32


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"upsample takes x \(B, C, h, w\); got \(3, 4, 5\)"):
        upsample(torch.zeros(3, 4, 5), (6, 8))
