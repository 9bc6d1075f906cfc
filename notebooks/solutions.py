"""Solutions of the notebooks' exercises, one function each, in the notebooks' order.

    from notebooks.solutions import hard_gate           # from the repository's root

Each function does what its exercise asks and returns what the answer is about; its docstring has
the answer in words. tests/test_solutions.py holds every one of them. Letters as in the notebooks.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclm import MultiScaleConv, covariance_penalty, directed_distances, masked_covariance
from data import Windows
from kernels import collaborative_loss
from kernels.attention import attention_reference
from kernels.distill import TRANSFERS, kl_divergence
from support.diagnostics import effective_rank
from support.metrics import confusion_matrix, erode, scores

# --- 1. Two branches ------------------------------------------------------------------------------


def same_window(windows: Windows, step: int, k: int) -> bool:
    """1.1: `batch` calls `window` for each k; neither knows what was drawn before."""
    images, labels = windows.batch(step)
    image, label = windows.window(step, k)
    return np.array_equal(images[k], image.transpose(2, 0, 1)) and np.array_equal(labels[k], label)


def multiscale_parameters(C: int) -> int:
    """1.2: depthwise kernels without bias have n * n numbers a channel."""
    return C * (3 * 3 + sum(n * n for n in MultiScaleConv.SIZES))


def attention_parameters(C: int, r: int) -> int:
    """1.2: query and projection C x C, key and value C x 2C, each with its bias; for r > 1 also
    the reducing convolution r x r and its norm."""
    linear = (C * C + C) * 2 + C * 2 * C + 2 * C
    return linear + (C * C * r * r + C + 2 * C if r > 1 else 0)


def scores_at_edges(prediction: np.ndarray, truth: np.ndarray, K: int) -> tuple[float, float]:
    """1.3: mIoU over all pixels, and over those further than 3 from an edge, which is higher:
    the eroded pixels are the hard ones."""
    every = scores(confusion_matrix(prediction, truth, K))["miou"]
    inside = scores(confusion_matrix(prediction, erode(truth, 3), K))["miou"]
    return every, inside


def oracle(z_c: Tensor, z_t: Tensor, y: Tensor) -> Tensor:
    """1.4: classes (B, H, W) of the branch with the lower cross entropy. It needs the label, so no
    deployed map can be made so; logits (B, K, H, W), y (B, H, W)."""
    l_c, l_t = (F.cross_entropy(z, y, reduction="none") for z in (z_c, z_t))
    return torch.where(l_c < l_t, z_c.argmax(1), z_t.argmax(1))


def query_key_products(crop: int, r: int) -> int:
    """1.5: N M at stage 1; with r = 8 a 64th of what r = 1 would need."""
    N = (crop // 4) ** 2
    return N * (N // r**2)


# --- 2. The multi-scale convolution ---------------------------------------------------------------


def kernel_13(scales: MultiScaleConv) -> Tensor:
    """2.1: (C, 1, 13, 13). Spreading the 3 x 3 by the 11 x 11 gives the kernel of both: a
    convolution of the turned 3 x 3, since conv2d correlates. It agrees with `scales(x)` but for
    the outer 5 positions, where b0 is padded with zeros and not with what the 3 x 3 would make of
    the outside."""
    large, small = scales.merged_kernel(), scales.local.weight
    C = len(large)
    return F.conv2d(large.view(1, C, 11, 11), small.flip(2, 3), padding=2, groups=C).view(
        C, 1, 13, 13
    )


def block_cost(C: int) -> dict[str, int]:
    """2.2: multiply-adds for a pixel. Up to 64 channels the scales cost more than both 1 x 1. The
    Conv-FFN (two 1 x 1 of four times the width, a 3 x 3 between) is the largest part."""
    return {
        "1 x 1, twice": 2 * C * C,
        "several scales": C * (3 * 3 + 11 * 11),
        "Conv-FFN": 2 * C * 4 * C + 4 * C * 9,
    }


def gradients_of_kernels(scales: MultiScaleConv, x: Tensor) -> tuple[Tensor, Tensor]:
    """2.3: the 5 x 5 kernel's gradient and the merged kernel's, of a sum of squares. The second's
    centre is the first: padding's gradient is cropping."""
    merged = scales.merged_kernel()
    merged.retain_grad()
    b0 = scales.local(x)
    F.conv2d(b0, merged, padding=5, groups=x.shape[1]).square().sum().backward()
    return scales.branches[0].weight.grad, merged.grad


def adjoint_products(x: Tensor, dy: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """2.4: <dy, DW_k(x)> and <DW_k'(dy), x>, which are equal; x, dy (B, C, H, W)."""
    convolve = lambda x, kernel: F.conv2d(x, kernel, padding=5, groups=x.shape[1])  # noqa: E731
    return (dy * convolve(x, kernel)).sum(), (convolve(dy, kernel.flip(2, 3)) * x).sum()


def share_of_band(columns: int) -> float:
    """2.5: a strip of `columns` outputs reads columns + 10 inputs, in a window of a power of two:
    0.69, 0.34, 0.34, 0.34 for 4, 8, 16 and 22 columns. Fewer columns mean fewer zeros, and more
    reading: 14 inputs for 4 outputs, 32 for 22."""
    window = 2 ** math.ceil(math.log2(columns + 10))
    return 11 / window


# --- 3. The transfer ------------------------------------------------------------------------------


def hard_gate(l_c: Tensor, l_t: Tensor) -> Tensor:
    """3.1: 1 where the CNN's cross entropy is lower. `gate` agrees to 0.01 where the gap is more
    than 4.6 kappa; so for any kappa there are gaps at which it does not."""
    return 0.5 * (1 + torch.sign(l_t - l_c))


def one_opinion(z: Tensor, y: Tensor) -> dict[str, float]:
    """3.2: equal logits: both divergences are 0, the gate is 1/2, the cross entropies are equal."""
    return {name: value.item() for name, value in collaborative_loss(z, z, y)._asdict().items()}


def mixture_gradients(z_c: Tensor, z_t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """3.3: with m = sg(r p_c + (1-r) p_t), dKL(m || p_t)/dz_t = p_t - m = r (p_t - p_c), which is
    selective's; likewise for the CNN, p_c - m = (1-r) (p_c - p_t). z (B, K, H, W), r (B, H, W)."""
    z_c, z_t = (z.detach().requires_grad_() for z in (z_c, z_t))
    weight = r[:, None]
    mixture = (weight * z_c.softmax(1) + (1 - weight) * z_t.softmax(1)).detach().log()
    loss = sum(kl_divergence(teacher=mixture, student=z.log_softmax(1)).sum() for z in (z_c, z_t))
    return torch.autograd.grad(loss, (z_c, z_t))


def mean_reduction(log_c: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """3.4: F.kl_div(..., "mean") and the right mean over pixels, which is K times as large: it
    divides by the classes too. The gradient's formula exposes it; tiling and ignoring do not."""
    wrong = F.kl_div(log_t, log_c.exp(), reduction="mean")
    return wrong, kl_divergence(teacher=log_c, student=log_t).mean()


def weights_of_mutual(r: float, transfer_weight: float = 0.5) -> dict[str, tuple[float, float]]:
    """3.5: at weight 1/2 mutual gives 1/2 in both directions, one in total. It has selective's
    gradient where r = 1/2: where neither knows better."""
    both = {}
    for name, scale in (("mutual", transfer_weight), ("selective", 1.0)):
        both[name] = tuple(scale * (constant + slope * r) for constant, slope in TRANSFERS[name])
    return both


# --- 4. The shared space --------------------------------------------------------------------------


def rank_of_spectrum(p: list[float]) -> float:
    """4.1: exp(entropy): 2 for (1/2, 1/2, 0, 0); 2^1.75 = 3.36 for (1/2, 1/4, 1/8, 1/8)."""
    return math.exp(-sum(v * math.log(v) for v in p if v > 0))


def rotated_space(h: Tensor, rotation: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """4.2: (penalty, effective rank) before and after. The rank is the spectrum's and stays. The
    penalty is 0 only if the axes are the principal axes: together with unit variances it asks for
    a white space, in which every rotation is white."""
    turned = torch.einsum("ij,bjhw->bihw", rotation, h)
    counts = torch.ones_like(h[:, :1])
    before, after = ((covariance_penalty(x, counts).item(), effective_rank(x)) for x in (h, turned))
    return before, after


def penalty_gradient(h: Tensor, counts: Tensor) -> Tensor:
    """4.3: with E the covariance without its diagonal, dL/dC = 2 E / (D (D-1)), and C is quadratic
    in the centred rows: dL/dh = 4 (h - mean) E / (n D (D-1)). The mean adds nothing, for the
    centred rows sum to 0. h (B, D, H, W), counts (B, 1, H, W)."""
    D = h.shape[1]
    covariance = masked_covariance(h, counts)
    off_diagonal = covariance - torch.diag(torch.diagonal(covariance))
    n = counts.sum()
    mean = (h * counts).sum((0, 2, 3), keepdim=True) / n
    centred = (h - mean) * counts
    return 4 / (n * D * (D - 1)) * torch.einsum("bihw,ij->bjhw", centred, off_diagonal)


def radial_part(h_c: Tensor, h_t: Tensor) -> Tensor:
    """4.4: <h, gradient> at each position, which is 0: the cosine does not depend on the length. A
    step sideways makes a vector longer, so that without the normalisation lengths would grow and
    gradients shrink."""
    h_t = h_t.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(directed_distances(h_c, h_t)[0].sum(), h_t)
    return (gradient * h_t).sum(1)


def ignored_positions_count(h: Tensor, counts: Tensor) -> float:
    """4.5: by how much the penalty changes when `h` does where `counts` is 0: not at all. But the
    projector's batch statistics are of all positions, so features at ignored ones do have a say."""
    changed = h + 10 * (1 - counts)
    return abs((covariance_penalty(changed, counts) - covariance_penalty(h, counts)).item())


# --- 5. The kernels -------------------------------------------------------------------------------


def keys(crop: int) -> int:
    """5.1: (crop / 32)^2 at every stage: 1024 for 1024 pixels. The scores of stage 1 grow 16 times,
    as both N and M grow 4 times. N / M = 64 for every crop, so they are never square."""
    return (crop // 32) ** 2


def join(first: tuple, second: tuple) -> tuple:
    """5.2: two states (top, total, out) of the online softmax, relative to the larger top."""
    top = torch.maximum(first[0], second[0])
    shrink = [torch.exp(state[0] - top) for state in (first, second)]
    total, out = (
        sum(s * state[i] for s, state in zip(shrink, (first, second), strict=True)) for i in (1, 2)
    )
    return top, total, out


def reach(i: int, n: int) -> range:
    """5.3: pixels 4 i - 2 .. 4 i + 5, cut at 0 and 4 n: at the border, all up to the edge."""
    return range(max(4 * i - 2, 0), min(4 * i + 6, 4 * n))


def scale_gradient(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> Tensor:
    """5.4: s = scale q k^T, so dscale = sum ds (q k^T), with ds as in the notebook."""
    products = q @ k.mT
    p = torch.softmax(scale * products, -1)
    delta = (do * attention_reference(q, k, v, scale)).sum(-1, keepdim=True)
    return (p * (do @ v.mT - delta) * products).sum()


def alone_in_its_processor(builds: list[dict], arch: int) -> list[str]:
    """5.5: 65,536 / (2 x 128) = 256 registers a thread leave room for two programs of 4 warps, and
    255 is the most a thread can have. So 4 warps never are alone for registers; 8 warps are from
    129 registers on."""
    return [
        b["build"]
        for b in builds
        if b["arch"] == arch and 65536 // (b["registers"] * 32 * b["warps"]) == 1
    ]


# --- 6. Your scene --------------------------------------------------------------------------------


def miou_by_hand(matrix: list[list[int]]) -> float:
    """6.1: the mean of TP / (TP + FP + FN); rows are the truth, columns the prediction."""
    K = len(matrix)
    found = []
    for k in range(K):
        row, column = sum(matrix[k]), sum(matrix[j][k] for j in range(K))
        found.append(matrix[k][k] / (row + column - matrix[k][k]))
    return sum(found) / K


def colours_to_indices(mask: np.ndarray, colours: list[tuple[int, int, int]]) -> np.ndarray:
    """6.2: (H, W, 3) -> (H, W); a colour of no class is 255 and counts nowhere."""
    label = np.full(mask.shape[:2], 255, np.uint8)
    for index, colour in enumerate(colours):
        label[(mask == colour).all(-1)] = index
    return label


def rare_classes(label: np.ndarray, K: int) -> list[int]:
    """6.3: classes with less than half of an equal share, as --rare-class-fraction takes them."""
    counts = np.bincount(label[label < K], minlength=K)
    return [k for k in range(K) if 0 < counts[k] < counts.sum() / (2 * K)]


def windows_of(length: int, window: int, overlap: float) -> int:
    """6.4: along one axis: the first window, and one more for each step of (1 - overlap) windows
    until the end is reached."""
    step = round(window * (1 - overlap))
    return 1 + max(0, math.ceil((length - window) / step))


def worst_class(iou: list[float | None], names: list[str]) -> tuple[str, float]:
    """6.5: the class that the mean hides, among those that occur."""
    found = [(value, name) for value, name in zip(iou, names, strict=True) if value is not None]
    value, name = min(found)
    return name, value
