"""kernels/distill.py: who teaches whom, where, and what must not move."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import collaborative_loss, distill, distill_rows, distill_triton, force, gate
from kernels.distill import TRANSFERS, collaborative_loss_reference, kl_divergence
from kernels.upsample import interpolate

TERMS = ("transformer_ce", "cnn_ce", "cnn_to_transformer", "transformer_to_cnn")


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
    loss = one_pixel((0.5, 0.5), (0.25, 0.75), transfer="mutual")
    assert loss.cnn_to_transformer.item() == pytest.approx(teacher)
    assert loss.transformer_to_cnn.item() == pytest.approx(other_way)


def test_cross_entropies_are_pytorchs():
    cnn, transformer, labels = example()
    loss = collaborative_loss(cnn, transformer, labels)
    for logits, ours in ((cnn, loss.cnn_ce), (transformer, loss.transformer_ce)):
        full = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        theirs = F.cross_entropy(full, labels, ignore_index=255)
        torch.testing.assert_close(ours, theirs)


def test_equal_branches_teach_each_other_nothing():
    cnn, _, labels = example()
    loss = collaborative_loss(cnn, cnn.detach().clone().requires_grad_(), labels, temperature=2.0)
    # Both are upsampled by one product, which need not round its rows alike.
    assert loss.cnn_to_transformer.item() == pytest.approx(0, abs=1e-14)
    assert loss.transformer_to_cnn.item() == pytest.approx(0, abs=1e-14)
    assert loss.gate.item() == pytest.approx(0.5, abs=1e-14)


@pytest.mark.parametrize(
    "transfer, towards_transformer, towards_cnn",
    [
        ("none", 0, 0),
        ("cnn_to_transformer", 1, 0),
        ("transformer_to_cnn", 0, 1),
        ("mutual", 1, 1),
    ],
)
def test_ungated_transfers(transfer, towards_transformer, towards_cnn):
    """An ungated transfer is the plain mean divergence over the valid pixels."""
    cnn, transformer, labels = example(factor=1)
    loss = collaborative_loss(cnn, transformer, labels, transfer=transfer)
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
    selective = collaborative_loss(cnn, transformer, labels, transfer="selective", **options)
    mutual = collaborative_loss(cnn, transformer, labels, transfer="mutual", **options)
    for term in ("cnn_to_transformer", "transformer_to_cnn"):
        torch.testing.assert_close(2 * getattr(selective, term), getattr(mutual, term))


def test_gate_believes_the_branch_that_is_right():
    right, wrong = (0.98, 0.02), (0.02, 0.98)
    assert one_pixel(right, wrong).gate > 0.999
    assert one_pixel(wrong, right).gate < 0.001
    assert one_pixel(right, wrong, kappa=0.1).gate > one_pixel(right, wrong, kappa=5.0).gate


def test_mean_of_the_gate_per_pixel_is_the_gate_of_the_loss():
    cnn, transformer, labels = example()
    r = gate(cnn, transformer, labels, kappa=0.3)
    assert torch.equal(r.isnan(), labels == 255)
    loss = collaborative_loss(cnn, transformer, labels, kappa=0.3)
    torch.testing.assert_close(r.nanmean(), loss.gate)


# --- Gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", [t for t in TRANSFERS if t != "none"])
@pytest.mark.parametrize("factor", [1, 4])  # the specification, and the rows of a CPU
def test_only_the_student_moves(transfer, factor):
    cnn, transformer, labels = example(factor=factor)
    loss = collaborative_loss(cnn, transformer, labels, transfer=transfer)
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
    r = gate(cnn, transformer, labels).nan_to_num()
    kl = kl_divergence(teacher=cnn.detach().log_softmax(1), student=transformer.log_softmax(1))
    (wanted,) = torch.autograd.grad((r * kl).sum() / (labels != 255).sum(), transformer)
    torch.testing.assert_close(got, wanted)
    assert not loss.gate.requires_grad


@pytest.mark.parametrize("term", range(4), ids=TERMS)
def test_gradcheck(term):
    """Numerical gradients move everything, so the detached side and the gate are held constant:
    an ungated transfer, and only the student's logits vary."""
    cnn, transformer, labels = example(B=1, K=3, h=2, w=3)
    vary = (transformer, cnn, transformer, cnn)[term]

    def loss(x):
        c, t = (x, transformer) if vary is cnn else (cnn, x)
        return collaborative_loss(c, t, labels, transfer="mutual", temperature=1.5)[term]

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
            cnn, transformer, labels, transfer="mutual", temperature=temperature
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


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_without_a_valid_pixel_all_is_zero(transfer):
    cnn, transformer, labels = example(ignored=2.0)
    loss = collaborative_loss(cnn, transformer, labels, transfer=transfer)
    assert all(term.item() == 0 for term in loss)
    for grad in torch.autograd.grad(sum(loss[:4]), (cnn, transformer)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("function", [collaborative_loss, collaborative_loss_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_batch_gives_zeros(function, dtype):
    cnn, transformer = (torch.zeros(0, 3, 2, 5, dtype=dtype, requires_grad=True) for _ in "12")
    loss = function(cnn, transformer, torch.zeros(0, 8, 20).long())
    assert torch.stack(loss).tolist() == [0] * 5
    for grad in torch.autograd.grad(sum(loss[:4]), (cnn, transformer)):
        assert grad.shape == cnn.shape


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
        ({"transfer": "both"}, "transfer must be one of none, .*; got 'both'"),
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


# --- Class weights --------------------------------------------------------------------------------


def test_class_weights_by_hand():
    """Two pixels of classes 0 and 1 with weights 3 and 1: their cross entropies are averaged as
    3 : 1, the gate compares 3 l, and the transfer is still a mean over pixels."""
    cnn, transformer = torch.zeros(2, 1, 2, 2, 1)  # (1, classes, pixels, 1) each
    cnn[0, 0, 0], transformer[0, 0, 1] = 1.0, -2.0
    labels, weights, both = torch.tensor([0, 1]), torch.tensor([3.0, 1.0]), (cnn, transformer)
    loss = collaborative_loss_reference(*both, labels.reshape(1, 2, 1), class_weights=weights)
    l_c = torch.tensor([math.log(1 + math.exp(-1)), math.log(2)])
    l_t = torch.tensor([math.log(2), math.log(1 + math.exp(-2))])
    assert loss.cnn_ce == pytest.approx(float((3 * l_c[0] + l_c[1]) / 4), rel=1e-6)
    assert loss.transformer_ce == pytest.approx(float((3 * l_t[0] + l_t[1]) / 4), rel=1e-6)
    r = torch.sigmoid(weights * (l_t - l_c) / 0.5)
    assert loss.gate == pytest.approx(float(r.mean()), rel=1e-6)
    p_c, p_t = (z[0, :, :, 0].softmax(0) for z in both)  # (classes, pixels)
    kl = (p_c * (p_c / p_t).log()).sum(0)
    assert loss.cnn_to_transformer == pytest.approx(float((r * kl).mean()), rel=1e-5)


def test_equal_class_weights_are_none():
    """But for the gate, which compares what they multiply."""
    cnn, transformer, labels = example(2, 3, 4, 5)
    plain = collaborative_loss(cnn, transformer, labels)
    assert collaborative_loss(cnn, transformer, labels, class_weights=torch.ones(3)) == plain
    twice = collaborative_loss(cnn, transformer, labels, class_weights=torch.full((3,), 2.0))
    torch.testing.assert_close(twice.cnn_ce, plain.cnn_ce)
    assert twice.gate != plain.gate


def test_class_weights_in_the_gate_of_pictures():
    cnn, transformer, labels = example(2, 3, 4, 5)
    weights = torch.tensor([0.2, 1.0, 3.0])
    r = gate(cnn, transformer, labels, class_weights=weights)
    loss = collaborative_loss(cnn, transformer, labels, class_weights=weights)
    torch.testing.assert_close(r.nanmean(), loss.gate)


# --- Three ways to compute it ---------------------------------------------------------------------
#
# What the tests above see is the CPU's way, row by row. Here it and the kernels are held against
# the reference in float64. The interpreter needs 1 to 2 ms for each row of pixels and class of a
# program, so shapes are as small as their claim allows.


@pytest.fixture
def small_programs(monkeypatch):
    """Blocks so small that a small image has several in each direction: 8 rows and 16 or 32 columns
    of pixels for a program, or 8 rows for a chunk."""
    monkeypatch.setattr(distill_rows, "CHUNK", 512)
    monkeypatch.setattr(distill_triton, "CELL_ROWS", 2)
    monkeypatch.setattr(distill_triton, "FORWARD_LANES", 16)
    monkeypatch.setattr(distill_triton, "BACKWARD_LANES", 32)


def terms_and_gradients(function, logits, labels, upstream, **options):
    """The five terms, stacked, and the gradients of both logits."""
    logits = [x.detach().requires_grad_() for x in logits]
    loss = function(*logits, labels, **options)
    total = sum(u * term for u, term in zip(upstream.to(loss[0]), loss[:4], strict=True))
    return torch.stack(loss).detach(), *torch.autograd.grad(total, logits)


def assert_no_worse(path, logits, labels, no_worse, **options):
    upstream = torch.randn(4)
    with force(path):
        ours = terms_and_gradients(collaborative_loss, logits, labels, upstream, **options)
    low = terms_and_gradients(collaborative_loss_reference, logits, labels, upstream, **options)
    exact = [x.double() for x in logits]
    exact = terms_and_gradients(collaborative_loss_reference, exact, labels, upstream, **options)
    for name, *results in zip(("terms", "cnn", "transformer"), ours, low, exact, strict=True):
        no_worse(*results, results[-1], name)


def on(device, B, K, h, w, dtype, label_dtype=torch.int64, size=2.0):
    cnn, transformer, labels = example(B, K, h, w)
    logits = [(size * x).detach().to(device, dtype) for x in (cnn, transformer)]
    return logits, labels.to(device, label_dtype)


# With `small_programs`, programs forward and backward in (rows, columns):
CASES = [
    ((2, 3, 3, 5), torch.int64, {}),  # (2, 2), (2, 1), for each of two images
    ((1, 2, 3, 8), torch.uint8, {"transfer": "mutual", "temperature": 2.0}),  # (2, 3), (2, 2)
    ((2, 7, 1, 1), torch.uint8, {"kappa": 0.1, "temperature": 0.5}),  # nothing but border
    ((1, 16, 1, 2), torch.int32, {"transfer": "transformer_to_cnn"}),  # the largest K
    ((1, 3, 5, 2), torch.int64, {"transfer": "cnn_to_transformer", "temperature": 3.0}),  # 3 rows
    ((1, 6, 2, 3), torch.uint8, {"transfer": "none"}),
]
# The kernels convert to float32 as they load, so half precision differs in that one line.
TYPED_CASES = [(torch.float32, *case) for case in CASES]
TYPED_CASES += [(torch.float16, *case) for case in (CASES[0], CASES[2])]


@pytest.mark.parametrize("path", ["pytorch", "triton"])
@pytest.mark.parametrize(
    "dtype, shape, label_dtype, options",
    TYPED_CASES,
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else None,
)
def test_no_worse_than_the_reference(
    path, dtype, shape, label_dtype, options, device, small_programs, no_worse
):
    logits, labels = on(device, *shape, dtype, label_dtype)
    assert_no_worse(path, logits, labels, no_worse, **options)


# The kernels see a transfer as two pairs of numbers: one of them shows what T = 1 leaves out.
HONOURED = [
    (transfer, temperature, path)
    for transfer in TRANSFERS
    for temperature in (1.0, 2.0)
    for path in ("pytorch", "triton")
    if path == "pytorch" or temperature != 1 or transfer == "selective"
]


@pytest.mark.parametrize("transfer, temperature, path", HONOURED)
def test_every_transfer_is_honoured(transfer, temperature, path, device, small_programs, no_worse):
    logits, labels = on(device, 1, 2, 3, 3, torch.float32)
    options = {"transfer": transfer, "temperature": temperature}
    assert_no_worse(path, logits, labels, no_worse, **options)


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_class_weights_are_honoured(path, device, small_programs, no_worse):
    for temperature, weights in ((1.0, (0.3, 2.0, 0.7)), (2.0, (3.0, 0.1, 1.0))):
        logits, labels = on(device, 2, 3, 2, 3, torch.float32)
        options = {"class_weights": torch.tensor(weights).to(device), "temperature": temperature}
        assert_no_worse(path, logits, labels, no_worse, **options)


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_a_new_transfer_is_one_line(path, device, small_programs, monkeypatch, no_worse):
    monkeypatch.setitem(TRANSFERS, "new", ((0.25, 0.5), (0.75, -0.25)))
    logits, labels = on(device, 1, 2, 2, 3, torch.float32)
    assert_no_worse(path, logits, labels, no_worse, transfer="new")


def test_weights_of_a_transfer_are_a_share():
    """constant + slope r lies in [0, 1] for every gate r."""
    for weights in TRANSFERS.values():
        for constant, slope in weights:
            assert 0 <= constant <= 1 and 0 <= constant + slope <= 1


def test_blocks_as_shipped(device, no_worse):
    """One image that needs two programs in each direction: 9 x 33 logits, 36 x 132 pixels."""
    logits, labels = on(device, 1, 2, 9, 33, torch.float32)
    assert_no_worse("triton", logits, labels, no_worse)


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_logits_of_any_layout(path, device, small_programs, no_worse):
    """Contiguous, channels last, and every second of a wider tensor."""
    logits, labels = on(device, 2, 2, 2, 3, torch.float32)
    wide = torch.randn(2, 4, 2, 6, device=device)
    for layout in (
        logits,
        [x.contiguous(memory_format=torch.channels_last) for x in logits],
        [wide[:, ::2, :, ::2], wide[:, 1::2, :, 1::2]],
    ):
        assert_no_worse(path, layout, labels, no_worse)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_extreme_logits(path, size, device, small_programs, no_worse):
    logits, labels = on(device, 1, 3, 2, 3, torch.float32, size=size)
    assert_no_worse(path, logits, labels, no_worse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_ignored_in_the_kernels(dtype, device, small_programs):
    logits, labels = on(device, 1, 3, 2, 3, dtype)
    with force("triton"):
        terms, *grads = terms_and_gradients(
            collaborative_loss, logits, torch.full_like(labels, 255), torch.ones(4)
        )
    assert not terms.any()
    assert not any(grad.any() for grad in grads)


def test_a_label_that_is_no_class_gives_nan(device, small_programs):
    """A kernel cannot raise; training stops at a loss that is not finite."""
    logits, labels = on(device, 1, 3, 2, 3, torch.float32)
    labels[0, 5, 5] = 3
    with force("triton"):
        loss = collaborative_loss(*logits, labels)
    assert loss.cnn_ce.isnan() and loss.transformer_ce.isnan()


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_twice_the_same_bits(path, device, small_programs):
    logits, labels = on(device, 1, 2, 3, 3, torch.float32)
    with force(path):
        one, two = (
            terms_and_gradients(collaborative_loss, logits, labels, torch.ones(4)) for _ in "12"
        )
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_registered_with_pytorch(path, device, small_programs):
    """Fake tensors, autograd and schema agree with what the operations do."""
    logits, labels = on(device, 1, 2, 2, 3, torch.float32)
    options = ("selective", 2.0, 0.5, 255, torch.tensor([0.5, 2.0], device=device))
    # Without "test_aot_dispatch_dynamic": the interpreter wants numbers for sizes.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    with force(path):
        inputs = [x.requires_grad_() for x in logits]
        torch.library.opcheck(distill.fused_loss, (*inputs, labels, *options), test_utils=checks)
        _, _, kept = distill.fused_loss(*inputs, labels, *options)
        torch.library.opcheck(
            distill.fused_loss_backward,
            (torch.randn(4, device=device), kept.detach(), *inputs, labels, *options),
            test_utils=checks,
        )


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_compiles_as_one_graph(path, device, small_programs):
    logits, labels = on(device, 1, 2, 2, 3, torch.float32)
    compiled = torch.compile(collaborative_loss, fullgraph=True, backend="aot_eager")
    with force(path):
        wanted = terms_and_gradients(collaborative_loss, logits, labels, torch.ones(4))
        result = terms_and_gradients(compiled, logits, labels, torch.ones(4))
    for a, b in zip(result, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_second_derivative_is_refused(path, device, small_programs):
    logits, labels = on(device, 1, 3, 2, 2, torch.float32)
    logits = [x.requires_grad_() for x in logits]
    with force(path):
        loss = collaborative_loss(*logits, labels)
        (grad,) = torch.autograd.grad(loss.cnn_ce, logits[0], create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_autocast_changes_nothing(path, device, small_programs):
    """The loss is computed in float32 wherever it is called."""
    logits, labels = on(device, 1, 2, 2, 3, torch.float32)
    with force(path):
        wanted = terms_and_gradients(collaborative_loss, logits, labels, torch.ones(4))
        with torch.autocast(device.type, torch.bfloat16):
            result = terms_and_gradients(collaborative_loss, logits, labels, torch.ones(4))
    for a, b in zip(result, wanted, strict=True):
        assert torch.equal(a, b)


def test_what_no_kernel_can_do(device):
    for logits, labels in (
        on(device, 1, 3, 4, 4, torch.float64),
        on(device, 1, 17, 4, 4, torch.float32),
        (on(device, 1, 3, 4, 4, torch.float32)[0], torch.zeros(1, 8, 8).long().to(device)),
    ):
        with force("triton"), pytest.raises(ValueError, match="no kernel can run on"):
            collaborative_loss(*logits, labels)
        collaborative_loss(*logits, labels)  # the reference, or rows, can


def test_on_a_gpu_no_upsampling_is_by_atomics(device, monkeypatch):
    """Where no kernel fits, the matrix products upsample: the same bits in every run."""
    (logits, labels), calls = on(device, 1, 17, 4, 4, torch.float32), []
    labels = labels[:, :12, :8].contiguous()  # of no kernel on a CPU either
    wanted = terms_and_gradients(collaborative_loss_reference, logits, labels, torch.ones(4))

    def by_products(x, size):
        calls.append(x.shape)
        return interpolate(x, *size, transposed=False)

    monkeypatch.setattr(distill, "upsample", by_products)
    one, two = (
        terms_and_gradients(collaborative_loss, logits, labels, torch.ones(4)) for _ in "12"
    )
    assert calls == [logits[0].shape] * 4
    for a, b, exact in zip(one, two, wanted, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, exact)
