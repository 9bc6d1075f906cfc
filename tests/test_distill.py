"""kernels/distill.py: who teaches whom, where, and what must not move."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import collaborative_loss, reliability
from kernels.distill import DIRECTIONS, kl_divergence

TERMS = ("cnn_ce", "transformer_ce", "cnn_to_transformer", "transformer_to_cnn")


def example(B=2, K=5, h=6, w=7, factor=4, ignored=0.2, dtype=torch.float64):
    """Random logits of both branches and labels, some ignored."""
    cnn = torch.randn(B, K, h, w, dtype=dtype, requires_grad=True)
    transformer = torch.randn(B, K, h, w, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, K, (B, factor * h, factor * w))
    labels[torch.rand(labels.shape) < ignored] = 255
    return cnn, transformer, labels


def one_pixel(cnn, transformer, label=0, **options):
    """The loss of a single pixel with the given probabilities."""
    z_c = torch.tensor(cnn, dtype=torch.float64).log().view(1, -1, 1, 1)
    z_t = torch.tensor(transformer, dtype=torch.float64).log().view(1, -1, 1, 1)
    return collaborative_loss(z_c, z_t, torch.tensor([[[label]]]), **options)


# --- Values -------------------------------------------------------------------------------------


def test_by_hand():
    """p_c = (3/4, 1/4), p_t = (1/4, 3/4), label 0: the CNN is right.

    l_c = ln 4/3, l_t = ln 4, so l_t - l_c = ln 3 and r = 1 / (1 + exp(-ln 3 / 0.5)) = 9/10.
    KL(c || t) = 3/4 ln 3 - 1/4 ln 3 = 1/2 ln 3, and KL(t || c) is the same by symmetry.
    """
    loss = one_pixel((0.75, 0.25), (0.25, 0.75), kappa=0.5)
    assert loss.cnn_ce.item() == pytest.approx(math.log(4 / 3))
    assert loss.transformer_ce.item() == pytest.approx(math.log(4))
    assert loss.gate.item() == pytest.approx(0.9)
    assert loss.cnn_to_transformer.item() == pytest.approx(0.9 * 0.5 * math.log(3))
    assert loss.transformer_to_cnn.item() == pytest.approx(0.1 * 0.5 * math.log(3))


def test_direction_of_the_divergence():
    """KL(teacher || student), which is not symmetric: p = (1/2, 1/2), q = (1/4, 3/4)."""
    teacher = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    other_way = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    loss = one_pixel((0.5, 0.5), (0.25, 0.75), direction="mutual")
    assert loss.cnn_to_transformer.item() == pytest.approx(teacher)
    assert loss.transformer_to_cnn.item() == pytest.approx(other_way)


def test_cross_entropies_are_pytorchs():
    cnn, transformer, labels = example()
    loss = collaborative_loss(cnn, transformer, labels)
    for logits, ours in ((cnn, loss.cnn_ce), (transformer, loss.transformer_ce)):
        full = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        theirs = F.cross_entropy(full, labels, ignore_index=255)
        torch.testing.assert_close(ours, theirs)


def test_a_student_has_nothing_to_learn_from_itself():
    cnn, _, labels = example()
    loss = collaborative_loss(cnn, cnn.detach().clone().requires_grad_(), labels, temperature=2.0)
    assert loss.cnn_to_transformer.item() == 0
    assert loss.transformer_to_cnn.item() == 0
    assert loss.gate.item() == 0.5


@pytest.mark.parametrize(
    "direction, towards_transformer, towards_cnn",
    [
        ("none", 0, 0),
        ("cnn_to_transformer", 1, 0),
        ("transformer_to_cnn", 0, 1),
        ("mutual", 1, 1),
    ],
)
def test_ungated_directions(direction, towards_transformer, towards_cnn):
    """An ungated transfer is the plain mean divergence over the valid pixels."""
    cnn, transformer, labels = example(factor=1)
    loss = collaborative_loss(cnn, transformer, labels, direction=direction)
    p, q = cnn.log_softmax(1), transformer.log_softmax(1)
    valid = labels != 255
    torch.testing.assert_close(
        loss.cnn_to_transformer,
        towards_transformer * kl_divergence(teacher=p, student=q)[valid].mean(),
    )
    torch.testing.assert_close(
        loss.transformer_to_cnn, towards_cnn * kl_divergence(teacher=q, student=p)[valid].mean()
    )


def test_selective_splits_mutual():
    """r and 1 - r add up to 1: with a gate of 1/2 each way, selective is half of mutual."""
    cnn, transformer, labels = example()
    options = {"kappa": 1e12}  # so wide that the gate is 1/2 everywhere
    selective = collaborative_loss(cnn, transformer, labels, direction="selective", **options)
    mutual = collaborative_loss(cnn, transformer, labels, direction="mutual", **options)
    for term in ("cnn_to_transformer", "transformer_to_cnn"):
        torch.testing.assert_close(2 * getattr(selective, term), getattr(mutual, term))


def test_gate_believes_the_branch_that_is_right():
    right, wrong = (0.98, 0.02), (0.02, 0.98)
    assert one_pixel(right, wrong).gate > 0.999
    assert one_pixel(wrong, right).gate < 0.001
    assert one_pixel(right, wrong, kappa=0.1).gate > one_pixel(right, wrong, kappa=5.0).gate


def test_reliability_is_the_gate_per_pixel():
    cnn, transformer, labels = example()
    r = reliability(cnn, transformer, labels, kappa=0.3)
    assert torch.equal(r.isnan(), labels == 255)
    loss = collaborative_loss(cnn, transformer, labels, kappa=0.3)
    torch.testing.assert_close(r.nanmean(), loss.gate)


# --- Gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "none"])
def test_only_the_student_moves(direction):
    cnn, transformer, labels = example()
    loss = collaborative_loss(cnn, transformer, labels, direction=direction)
    for term, student, teacher in (
        (loss.cnn_to_transformer, transformer, cnn),
        (loss.transformer_to_cnn, cnn, transformer),
    ):
        to_student, to_teacher = torch.autograd.grad(
            term, (student, teacher), retain_graph=True, materialize_grads=True
        )
        assert not to_teacher.any()
        assert to_student.any() == (term.item() > 0)


def test_the_gate_carries_no_gradient():
    """With the gate inside the graph the student's gradient would differ from weight x KL's."""
    cnn, transformer, labels = example(factor=1)
    loss = collaborative_loss(cnn, transformer, labels)
    (got,) = torch.autograd.grad(loss.cnn_to_transformer, transformer)
    r = reliability(cnn, transformer, labels).nan_to_num()
    kl = kl_divergence(teacher=cnn.detach().log_softmax(1), student=transformer.log_softmax(1))
    (wanted,) = torch.autograd.grad((r * kl).sum() / (labels != 255).sum(), transformer)
    torch.testing.assert_close(got, wanted)
    assert not loss.gate.requires_grad


@pytest.mark.parametrize("term", range(4), ids=TERMS)
def test_gradcheck(term):
    """Numerical gradients move everything, so the detached side and the gate are held constant:
    ungated directions, and only the student's logits vary."""
    cnn, transformer, labels = example(B=1, K=3, h=2, w=3)
    vary = (cnn, transformer, transformer, cnn)[term]

    def loss(x):
        c, t = (x, transformer) if vary is cnn else (cnn, x)
        return collaborative_loss(c, t, labels, direction="mutual", temperature=1.5)[term]

    assert torch.autograd.gradcheck(loss, (vary,))


def test_temperature_keeps_the_gradients_size():
    """At high T the divergence falls as 1/T^2; multiplied by T^2 its gradient hardly changes.

    The next term of the expansion is of relative size |z| / T, about 3 / 20 here.
    """
    sizes = []
    for temperature in (20.0, 40.0):
        torch.manual_seed(0)
        cnn, transformer, labels = example(ignored=0)
        loss = collaborative_loss(
            cnn, transformer, labels, direction="mutual", temperature=temperature
        )
        (grad,) = torch.autograd.grad(loss.cnn_to_transformer, transformer)
        sizes.append(grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.15)


# --- Which pixels count -------------------------------------------------------------------------


def test_ignored_pixels_change_nothing():
    """Same loss, same gradient as if the ignored pixels did not exist; the divisor included."""
    cnn, transformer, labels = example(B=1, h=4, w=6, factor=1, ignored=0)
    labels[..., 3:] = 255
    loss = collaborative_loss(cnn, transformer, labels)
    cut = collaborative_loss(cnn[..., :3], transformer[..., :3], labels[..., :3])
    for name, ours, wanted in zip(loss._fields, loss, cut, strict=True):
        torch.testing.assert_close(ours, wanted, msg=name)
    grads = torch.autograd.grad(sum(loss[:4]), (cnn, transformer))
    assert all(not grad[..., 3:].any() and grad[..., :3].all() for grad in grads)


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "height", "width"])
def test_repeating_the_image_changes_nothing(dimension):
    cnn, transformer, labels = example(factor=1)
    loss = collaborative_loss(cnn, transformer, labels)
    axis = (0, 2, 3)[dimension]
    twice = collaborative_loss(
        torch.cat([cnn, cnn], axis),
        torch.cat([transformer, transformer], axis),
        torch.cat([labels, labels], dimension),
    )
    for name, ours, wanted in zip(loss._fields, loss, twice, strict=True):
        torch.testing.assert_close(ours, wanted, msg=name)


def test_size_of_the_image_does_not_matter():
    """Constant logits and labels: the loss is that of one pixel at any resolution."""
    z_c, z_t = (torch.randn(1, 4, 1, 1, dtype=torch.float64) for _ in range(2))
    losses = [
        collaborative_loss(
            z_c.expand(2, 4, n, n), z_t.expand(2, 4, n, n), torch.ones(2, 4 * n, 4 * n).long()
        )
        for n in (2, 16)
    ]
    for small, large in zip(*losses, strict=True):
        torch.testing.assert_close(small, large)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_ignored(direction):
    cnn, transformer, labels = example(ignored=2.0)
    loss = collaborative_loss(cnn, transformer, labels, direction=direction)
    assert all(term.item() == 0 for term in loss)
    for grad in torch.autograd.grad(sum(loss[:4]), (cnn, transformer)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_another_ignore_index():
    cnn, transformer, labels = example()
    other = labels.masked_fill(labels == 255, -1)
    expected = collaborative_loss(cnn, transformer, labels)
    assert collaborative_loss(cnn, transformer, other, ignore_index=-1) == expected


# --- Numbers that could break it ----------------------------------------------------------------


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_extreme_logits_stay_finite(size):
    cnn, transformer, labels = example(dtype=torch.float32)
    cnn, transformer = (size * cnn).detach(), (size * transformer).detach()
    cnn.requires_grad_(), transformer.requires_grad_()
    loss = collaborative_loss(cnn, transformer, labels, temperature=0.5)
    assert all(term.isfinite() for term in loss)
    grads = torch.autograd.grad(sum(loss[:4]), (cnn, transformer))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    cnn, transformer, labels = example()
    low = [x.detach().to(dtype) for x in (cnn, transformer)]
    loss = collaborative_loss(*low, labels)
    exact = collaborative_loss(*(x.double() for x in low), labels)
    for ours, wanted in zip(loss, exact, strict=True):
        assert ours.dtype == torch.float32
        # Sums of ~1000 float32 terms: far below the 4e-3 of bfloat16 arithmetic.
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)


def test_uint8_labels():
    cnn, transformer, labels = example()
    assert collaborative_loss(cnn, transformer, labels.to(torch.uint8)) == collaborative_loss(
        cnn, transformer, labels
    )


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"direction": "both"}, "direction must be one of none, .*; got 'both'"),
        ({"temperature": 0.0}, "must be positive"),
        ({"kappa": -1.0}, "must be positive"),
        ({"labels": torch.zeros(3, 8, 8, dtype=torch.long)}, "for a batch of 2"),
        ({"labels": torch.zeros(2, 8, 8)}, "must be integers"),
        ({"cnn_logits": torch.zeros(2, 4, 6, 7)}, "alike"),
    ],
)
def test_arguments_that_cannot_be_honoured(change, sentence):
    cnn, transformer, labels = example()
    arguments = {"cnn_logits": cnn, "transformer_logits": transformer, "labels": labels} | change
    with pytest.raises(ValueError, match=sentence):
        collaborative_loss(**arguments)
