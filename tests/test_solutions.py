"""notebooks/solutions.py: every solution is right, by another way than its own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctclm import VARIANTS, MultiScaleBlock, MultiScaleConv, SpatialReductionAttention
from ctclm import covariance_penalty as penalty
from data import Scene, Windows
from kernels.attention import attention_reference
from kernels.upsample import interpolation_matrix
from notebooks import solutions
from support import toy
from support.diagnostics import count
from support.labels import encode_colours
from support.layouts import POTSDAM
from support.scenes import axis_windows

STATIC = Path(__file__).parent.parent / "experiments" / "static.json"


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- 1. Two branches ------------------------------------------------------------------------------


def test_windows_are_the_same_alone(towns):
    scenes = [Scene("a", *towns[0])]
    assert solutions.same_window(Windows(scenes, 64, 4, seed=0), step=7, k=3)
    one, other = (Windows(scenes, 64, 4, seed=seed).batch(7)[0] for seed in (0, 1))
    assert not np.array_equal(one[3], other[3])


def test_parameters_counted_and_asked_for():
    assert solutions.multiscale_parameters(32) == parameters(MultiScaleConv(32))
    C, heads = VARIANTS["tiny"].channels[0], VARIANTS["tiny"].heads[0]
    for r in (8, 1):
        attention = SpatialReductionAttention(C, heads, r)
        assert solutions.attention_parameters(C, r) == parameters(attention)


def test_scores_at_edges():
    truth = np.zeros((40, 40), np.uint8)
    truth[:, 20:] = 1
    moved = np.zeros_like(truth)
    moved[:, 22:] = 1  # wrong at the edge only
    every, inside = solutions.scores_at_edges(moved, truth, 2)
    assert every < 1 and inside == 1


def test_the_oracle_is_better_than_both():
    z_c, z_t = torch.randn(2, 2, 5, 16, 16)
    y = torch.randint(0, 5, (2, 16, 16))
    both_can = ((z_c.argmax(1) == y) | (z_t.argmax(1) == y)).float().mean()
    right = (solutions.oracle(z_c, z_t, y) == y).float().mean()
    singles = [(z.argmax(1) == y).float().mean() for z in (z_c, z_t)]
    assert max(singles) < right <= both_can


def test_query_key_products():
    assert solutions.query_key_products(512, 8) == 16384 * 256
    assert solutions.query_key_products(512, 1) == 64 * solutions.query_key_products(512, 8)


# --- 2. The multi-scale convolution ---------------------------------------------------------------


def test_one_kernel_of_13_agrees_inside_and_not_at_the_border():
    scales, x = MultiScaleConv(4).double(), torch.randn(1, 4, 30, 30, dtype=torch.float64)
    with torch.no_grad():
        once = F.conv2d(x, solutions.kernel_13(scales), padding=6, groups=4)
        gap = (once - scales(x)).abs()
    assert gap[..., 5:-5, 5:-5].max() < 1e-12
    assert gap[..., :5, :].max() > 1e-3 and gap[..., 4, 5:-5].max() > 1e-6


def test_block_cost_is_what_is_counted():
    C = 32
    counted = count(MultiScaleBlock(C, "multiscale"), (C, 8, 8))["multiply_adds"] / 64
    cost = solutions.block_cost(C)
    assert sum(cost.values()) == counted and max(cost, key=cost.get) == "Conv-FFN"


def test_the_small_kernels_gradient_is_the_centre():
    scales = MultiScaleConv(3)
    small, merged = solutions.gradients_of_kernels(scales, torch.randn(2, 3, 16, 16))
    assert torch.equal(small, merged[:, :, 3:8, 3:8])


def test_adjoint_products_are_equal_and_a_kernel_not_turned_is_found():
    x, dy = torch.randn(2, 1, 3, 20, 20, dtype=torch.float64)
    kernel = torch.randn(3, 1, 11, 11, dtype=torch.float64)
    one, other = solutions.adjoint_products(x, dy, kernel)
    assert abs(one - other) < 1e-10
    wrong = (F.conv2d(dy, kernel, padding=5, groups=3) * x).sum()
    assert abs(one - wrong) > 1e-3


def test_share_of_band():
    shares = [solutions.share_of_band(columns) for columns in (4, 8, 16, 22)]
    assert shares == [11 / 16, 11 / 32, 11 / 32, 11 / 32]


# --- 3. The transfer ------------------------------------------------------------------------------


def test_the_hard_gate_is_the_limit():
    l_c, l_t = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 0.5, 1.0])
    assert solutions.hard_gate(l_c, l_t).tolist() == [1, 0, 0.5]
    for gap, within in ((4.6, True), (4.5, False)):
        assert (1 - torch.sigmoid(torch.tensor(gap)) < 0.01) == within


def test_one_opinion_teaches_nothing():
    z, y = torch.randn(1, 4, 4, 4), torch.randint(0, 4, (1, 16, 16))
    found = solutions.one_opinion(z, y)
    assert found["cnn_to_transformer"] == pytest.approx(0, abs=1e-6)
    assert found["transformer_to_cnn"] == pytest.approx(0, abs=1e-6)
    assert found["gate"] == 0.5 and found["transformer_ce"] == found["cnn_ce"]


def test_a_mixture_as_teacher_has_selectives_gradients():
    z_c, z_t = torch.randn(2, 1, 4, 5, 5, dtype=torch.float64)
    r = torch.rand(1, 5, 5, dtype=torch.float64)
    of_c, of_t = solutions.mixture_gradients(z_c, z_t, r)
    gap = z_t.softmax(1) - z_c.softmax(1)
    assert torch.allclose(of_t, r[:, None] * gap, atol=1e-12, rtol=0)
    assert torch.allclose(of_c, (1 - r[:, None]) * -gap, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:reduction")  # PyTorch itself warns of it
def test_mean_divides_by_the_classes_too():
    log_c, log_t = torch.randn(2, 2, 7, 6, 6).log_softmax(2)
    wrong, right = solutions.mean_reduction(log_c, log_t)
    assert right / wrong == pytest.approx(7, rel=1e-5)
    twice = [log.repeat(1, 1, 2, 2) for log in (log_c, log_t)]
    assert torch.allclose(solutions.mean_reduction(*twice)[0], wrong)


def test_mutual_at_half_weight():
    for r in (0.5, 0.9):
        weights = solutions.weights_of_mutual(r)
        assert sum(weights["mutual"]) == sum(weights["selective"]) == 1
        assert (weights["mutual"] == weights["selective"]) == (r == 0.5)


# --- 4. The shared space --------------------------------------------------------------------------


def test_rank_of_spectrum():
    assert solutions.rank_of_spectrum([0.5, 0.5, 0, 0]) == pytest.approx(2)
    assert solutions.rank_of_spectrum([1 / 2, 1 / 4, 1 / 8, 1 / 8]) == pytest.approx(2**1.75)


def test_a_rotation_changes_the_penalty_and_not_the_rank():
    h = torch.randn(1, 8, 16, 16) * torch.linspace(0.2, 2, 8).view(8, 1, 1)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    before, after = solutions.rotated_space(h, rotation)
    assert after[0] > 5 * before[0] and after[1] == pytest.approx(before[1], rel=1e-4)


def test_the_penaltys_gradient():
    h = torch.randn(2, 6, 5, 5, requires_grad=True)
    counts = (torch.rand(2, 1, 5, 5) > 0.3).float()
    (exact,) = torch.autograd.grad(penalty(h, counts), h)
    assert torch.allclose(solutions.penalty_gradient(h.detach(), counts), exact, atol=1e-6)


def test_the_cosines_gradient_is_sideways():
    h_c, h_t = torch.randn(2, 2, 8, 4, 4, dtype=torch.float64)
    assert solutions.radial_part(h_c, h_t).abs().max() < 1e-12


def test_ignored_positions_do_not_count():
    counts = torch.ones(1, 1, 6, 6)
    counts[..., :2] = 0
    assert solutions.ignored_positions_count(torch.randn(1, 5, 6, 6), counts) < 1e-6


# --- 5. The kernels -------------------------------------------------------------------------------


def test_keys():
    assert [solutions.keys(crop) for crop in (512, 1024)] == [256, 1024]


def test_two_halves_join():
    s, v = torch.randn(3, 10, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)

    def state(keys: slice) -> tuple:
        top = s[:, keys].amax(1, keepdim=True)
        e = torch.exp(s[:, keys] - top)
        return top, e.sum(1, keepdim=True), e @ v[keys]

    _, total, out = solutions.join(state(slice(0, 6)), state(slice(6, 10)))
    assert torch.allclose(out / total, s.softmax(1) @ v, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_reach(n):
    matrix = interpolation_matrix(n, 4 * n, torch.float64, torch.device("cpu"))
    for i in range(n):
        assert matrix[:, i].nonzero()[:, 0].tolist() == [*solutions.reach(i, n)]


def test_scale_gradient():
    q, k, v, do = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (6, 3, 3, 6))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(scale * q @ k.mT, -1)
    assert torch.allclose(p @ v, attention_reference(q, k, v, 0.7))
    (exact,) = torch.autograd.grad(p @ v, scale, do)
    assert solutions.scale_gradient(q, k, v, do, 0.7) == pytest.approx(exact.item())


def test_what_is_alone_has_eight_warps():
    builds = json.loads(STATIC.read_text())["builds"]
    alone = solutions.alone_in_its_processor(builds, 90)
    warps = {b["build"]: b["warps"] for b in builds if b["arch"] == 90}
    assert alone and all(warps[name] == 8 for name in alone)
    assert 65536 // (255 * 32 * 4) == 2


# --- 6. Your scene --------------------------------------------------------------------------------


def test_miou_by_hand():
    matrix = [[50, 10], [20, 20]]
    assert solutions.miou_by_hand(matrix) == pytest.approx((50 / 80 + 20 / 50) / 2)


def test_colours_to_indices():
    label = np.array([[0, 3], [5, 255]], np.uint8)
    mask = encode_colours(label, POTSDAM.colours)
    mask[0, 1] = 1, 2, 3
    assert solutions.colours_to_indices(mask, POTSDAM.colours).tolist() == [[0, 255], [5, 255]]


def test_rare_classes():
    label = toy.scene(1)[1]
    assert solutions.rare_classes(label, 6) == [4, 5]  # car, clutter


@pytest.mark.parametrize("length", [300, 512, 513, 896, 897, 6000])
def test_windows_of(length):
    starts, _ = axis_windows(length, 512, 0.25)
    assert solutions.windows_of(length, 512, 0.25) == len(starts)


def test_worst_class():
    assert solutions.worst_class([0.8, None, 0.1], ["a", "b", "c"]) == ("c", 0.1)
