"""ctclm.py: the parts equal what they claim to be, and the objective moves whom it should."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctclm import (
    CTCLM,
    VARIANTS,
    Head,
    MixFFN,
    ModelConfig,
    MultiScaleConv,
    Output,
    SpatialReductionAttention,
    Transformer,
    TransformerBlock,
    covariance_penalty,
    directed_distances,
    ramp_up,
    to_grid,
    to_tokens,
)

TINY = VARIANTS["tiny"]


def images(B=2, H=64, W=64, channels=3):
    return torch.rand(B, channels, H, W) * 255


def labels(B=2, H=64, W=64, K=6):
    return torch.randint(0, K, (B, H, W))


# --- The CNN ------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W", [(4, 4), (7, 13), (32, 20)])
def test_merged_convolution_equals_the_branches(H, W):
    """Outputs and every gradient, in float64: the merge is algebra, so only rounding differs."""
    conv = MultiScaleConv(8).double()
    nn.init.normal_(conv.local.weight)
    x = torch.randn(2, 8, H, W, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 8, H, W, dtype=torch.float64)
    inputs = (x, *conv.parameters())
    merged, separate = conv(x), conv.forward_separately(x)
    torch.testing.assert_close(merged, separate, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(merged, inputs, upstream)
    wanted = torch.autograd.grad(separate, inputs, upstream)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_plain_encoder_has_no_parallel_branches():
    plain = CTCLM(ModelConfig(variant="tiny", encoder="plain"))
    sizes = {m.kernel_size for m in plain.cnn.modules() if isinstance(m, nn.Conv2d)}
    assert sizes == {(1, 1), (3, 3)}


def test_cnn_does_not_depend_on_its_neighbours_in_the_batch():
    """Group normalisation, in training mode too: an image is scored as if it were alone."""
    cnn, x = CTCLM(ModelConfig(variant="tiny")).cnn.train(), images()
    torch.testing.assert_close(cnn(x)[:1], cnn(x[:1]), rtol=1e-4, atol=1e-5)


# --- The Transformer ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_keys_are_reduced(reduction, monkeypatch):
    seen = {}

    def spy(q, k, v):
        seen["q"], seen["k"], seen["v"] = q.shape, k.shape, v.shape
        return q

    monkeypatch.setattr("ctclm.attention", spy)
    layer = SpatialReductionAttention(24, heads=3, reduction=reduction)
    layer(torch.randn(2, 8 * 12, 24), 8, 12)
    M = 8 * 12 // reduction**2
    assert seen == {"q": (2, 3, 96, 8), "k": (2, 3, M, 8), "v": (2, 3, M, 8)}


def test_attention_layer_equals_multi_head_attention():
    """Without reduction it is torch's nn.MultiheadAttention with the same weights."""
    ours = SpatialReductionAttention(16, heads=4, reduction=1)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.project.state_dict())
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(ours(x, 3, 4), theirs(x, x, x)[0])


def test_mix_ffn_as_published():
    """Linear, 3x3 depthwise convolution on the grid, GELU, linear (Xie et al., 2021, eq. 3)."""
    ffn, x = MixFFN(6).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    grid = F.linear(x, ffn.expand.weight, ffn.expand.bias).mT.reshape(2, 24, 3, 4)
    mixed = F.conv2d(grid, ffn.mix.weight, ffn.mix.bias, padding=1, groups=24)
    wanted = F.linear(F.gelu(mixed).flatten(2).mT, ffn.reduce.weight, ffn.reduce.bias)
    torch.testing.assert_close(ffn(x, 3, 4), wanted)


def test_a_block_adds_to_its_input():
    """Norms come before what is added: where nothing is added, nothing changes."""
    block = TransformerBlock(16, heads=2, reduction=2)
    for last in (block.attention.project, block.ffn.reduce):
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    x = torch.randn(2, 24, 16)
    assert torch.equal(block(x, 4, 6), x)


def test_tokens_and_grid_are_each_others_inverse():
    x = torch.randn(2, 5, 3, 4)
    assert torch.equal(to_grid(to_tokens(x), 3, 4), x)
    assert to_grid(to_tokens(x).contiguous(), 3, 4).is_contiguous(memory_format=torch.channels_last)


def test_head_equals_the_published_order():
    """Project, upsample, concatenate, fuse (SegFormer) against fold, project, add, upsample."""
    head = Head(TINY, 5, nn.BatchNorm2d(TINY.head_width)).double().eval()
    nn.init.normal_(head.norm.running_mean), nn.init.uniform_(head.norm.running_var, 0.5, 2)
    E, sizes = TINY.head_width, (16, 8, 4, 2)
    linears = [nn.Conv2d(C, E, 1, bias=False).double() for C in TINY.channels]
    fuse = nn.Conv2d(4 * E, E, 1, bias=False).double()
    with torch.no_grad():
        for s in range(4):
            part = fuse.weight[:, s * E : (s + 1) * E, 0, 0]
            head.project[s].weight.copy_((part @ linears[s].weight[:, :, 0, 0])[..., None, None])
    features = [
        torch.randn(2, C, n, n, dtype=torch.float64)
        for C, n in zip(TINY.channels, sizes, strict=True)
    ]
    pyramid = [
        F.interpolate(linear(x), (16, 16), mode="bilinear", align_corners=False)
        for linear, x in zip(linears, features, strict=True)
    ]
    published = head.classify(F.relu(head.norm(fuse(torch.cat(pyramid, 1)))))
    torch.testing.assert_close(head(features), published, rtol=1e-9, atol=1e-9)


# --- Both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_and_shapes(variant):
    model = CTCLM(ModelConfig(variant=variant, num_classes=7)).eval()
    with torch.no_grad():
        out = model(images(1))
    assert out.cnn_logits.shape == out.transformer_logits.shape == (1, 7, 16, 16)
    for features in (out.cnn_features, out.transformer_features):
        shapes = [tuple(x.shape) for x in features]
        assert shapes == [
            (1, C, n, n) for C, n in zip(VARIANTS[variant].channels, (16, 8, 4, 2), strict=True)
        ]
    cnn, transformer = (size_of(branch) for branch in (model.cnn, model.transformer))
    assert 0.7 < cnn / transformer < 1.3  # "about the same size"


def size_of(module):
    return sum(p.numel() for p in module.parameters())


# The encoders of MiT-B0, B1 and B2 as published (Xie et al., 2021, table 6: 3.4, 13.1, 24.2 M);
# the exact counts are those of their public weights.
@pytest.mark.parametrize(
    "variant, parameters", [("b0", 3_319_392), ("b1", 13_151_424), ("b2", 24_196_288)]
)
def test_the_encoders_have_the_published_sizes(variant, parameters):
    assert size_of(Transformer(VARIANTS[variant], 6, 3).stages) == parameters


def test_the_cnn_has_the_size_it_had():
    """Of `tiny`, counted by hand where a fault would hide: the expansion of ConvFFN and kernels."""
    model = CTCLM(ModelConfig(variant="tiny"))
    block = model.cnn.stages[0][2]  # 32 channels
    assert size_of(block.ffn) == (32 * 128 + 128) + (128 * 9 + 128) + (128 * 32 + 32)
    assert size_of(block.scales) == 32 * (3**2 + 5**2 + 7**2 + 9**2 + 11**2)


@pytest.mark.parametrize("H, W", [(32, 32), (33, 70), (97, 64)])
def test_any_size_from_32(H, W):
    model = CTCLM(ModelConfig(variant="tiny"))
    out = model(images(2, H, W))
    grid = (math.ceil(H / 4), math.ceil(W / 4))
    assert out.cnn_logits.shape[-2:] == out.transformer_logits.shape[-2:] == grid
    assert model.objective(out, labels(2, H, W)).total.isfinite()


def test_what_is_deployed_is_the_branch():
    model, x = CTCLM(ModelConfig(variant="tiny")).eval(), images()
    assert torch.equal(model.transformer(x), model(x).transformer_logits)


def test_a_seed_gives_the_transformer_the_same_weights_whatever_its_partner():
    states = []
    for change in ({}, {"encoder": "plain"}, {"align": False}, {"transfer": "none"}):
        torch.manual_seed(3)
        states.append(CTCLM(ModelConfig(variant="tiny", **change)).transformer.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_normalisation_is_inside_and_not_in_the_state():
    model = CTCLM(ModelConfig(variant="tiny", in_channels=4))
    assert not [name for name in model.state_dict() if "mean" in name and "running" not in name]
    normalised = model.transformer.normalise(torch.full((1, 4, 32, 32), 116.28))
    assert normalised[0, 1].abs().max() < 1e-6  # ImageNet's mean of green
    assert normalised[0, 0].max() < 0 < normalised[0, 2].min()


@pytest.mark.parametrize(
    "x, sentence",
    [
        (torch.zeros(1, 4, 64, 64), "images must be .B, 3, H, W.*got .1, 4, 64, 64"),
        (torch.zeros(1, 3, 31, 64), "at least 32"),
    ],
)
def test_wrong_images(x, sentence):
    with pytest.raises(ValueError, match=sentence):
        CTCLM(ModelConfig(variant="tiny"))(x)


def test_wrong_config():
    with pytest.raises(ValueError, match="variant must be one of tiny, b0, b1, b2; got 'b9'"):
        ModelConfig(variant="b9")
    with pytest.raises(ValueError, match="encoder must be one of .*; got 'multi-scale'"):
        ModelConfig(encoder="multi-scale")
    with pytest.raises(ValueError, match="transfer must be one of .*; got 'both'"):
        ModelConfig(transfer="both")
    with pytest.raises(ValueError, match="num_classes must be 1 to ignore_index=255; got 0"):
        ModelConfig(num_classes=0)
    with pytest.raises(ValueError, match="ignore_index=-100; got 6"):
        ModelConfig(ignore_index=-100)
    with pytest.raises(ValueError, match="in_channels must be positive; got 0"):
        ModelConfig(in_channels=0)


# --- The shared space ---------------------------------------------------------------------------


def test_each_distance_moves_one_branch():
    h_c, h_t = (torch.randn(2, 8, 3, 3, requires_grad=True) for _ in range(2))
    transformer_moves, cnn_moves = directed_distances(h_c, h_t)
    torch.testing.assert_close(transformer_moves, cnn_moves)  # the gradients differ, not the values
    grads = torch.autograd.grad(transformer_moves.sum(), (h_c, h_t), materialize_grads=True)
    assert not grads[0].any() and grads[1].any()
    grads = torch.autograd.grad(cnn_moves.sum(), (h_c, h_t), materialize_grads=True)
    assert grads[0].any() and not grads[1].any()


def fake_output(model, cnn_right: bool, K=6):
    """Random features, and logits by which one branch is right everywhere and the other is not."""
    n = (16, 8, 4, 2)
    channels = VARIANTS[model.config.variant].channels
    cnn, transformer = (
        [torch.randn(2, C, s, s, requires_grad=True) for C, s in zip(channels, n, strict=True)]
        for _ in range(2)
    )
    right, wrong = torch.zeros(2, K, 16, 16), torch.zeros(2, K, 16, 16)
    right[:, 0], wrong[:, 1] = 5, 5
    logits = (right, wrong) if cnn_right else (wrong, right)
    return Output(*logits, cnn, transformer), torch.zeros(2, 64, 64, dtype=torch.long)


@pytest.mark.parametrize("cnn_right", [True, False])
def test_late_stages_follow_the_branch_that_is_right(cnn_right):
    model = CTCLM(ModelConfig(variant="tiny"))
    out, truth = fake_output(model, cnn_right)
    _, region, _ = model.alignment(out, truth)
    follower, leader = (
        (out.transformer_features, out.cnn_features)
        if cnn_right
        else (out.cnn_features, out.transformer_features)
    )
    moved = torch.autograd.grad(region, [*follower, *leader], materialize_grads=True)
    assert [bool(grad.any()) for grad in moved] == [False, False, True, True] + 4 * [False]


def test_early_stages_are_aligned_both_ways():
    model = CTCLM(ModelConfig(variant="tiny"))
    out, truth = fake_output(model, True)
    align, _, _ = model.alignment(out, truth)
    inputs = [*out.cnn_features, *out.transformer_features]
    moved = torch.autograd.grad(align, inputs, materialize_grads=True)
    assert [bool(grad.any()) for grad in moved] == 2 * [True, True, False, False]


def test_alignment_is_zero_when_the_projections_agree():
    model = CTCLM(ModelConfig(variant="tiny"))
    model.cnn_projectors.load_state_dict(model.transformer_projectors.state_dict())
    out, truth = fake_output(model, True)
    align, region, _ = model.alignment(out._replace(cnn_features=out.transformer_features), truth)
    assert abs(align.item()) < 1e-6 and abs(region.item()) < 1e-6


def test_every_dimension_of_the_shared_space_has_variance_1():
    """So neither a constant nor a shrinking projection can satisfy the alignment."""
    model = CTCLM(ModelConfig(variant="tiny"))
    out, _ = fake_output(model, True)
    for pair in model.shared_space(out):
        for h in pair:
            variance, mean = torch.var_mean(h, (0, 2, 3), correction=0)
            # The norm adds 1e-5 to variances of about 1/3.
            torch.testing.assert_close(variance, torch.ones(64), rtol=1e-3, atol=0)
            torch.testing.assert_close(mean, torch.zeros(64), rtol=0, atol=1e-5)


def test_terms_of_the_shared_space_are_means():
    """Over positions and stages; the covariance penalty over branches and stages."""
    model = CTCLM(ModelConfig(variant="tiny"))
    out, truth = fake_output(model, True)
    pairs = model.shared_space(out)
    d = torch.stack([directed_distances(*pair)[0].mean() for pair in pairs])
    everywhere = [torch.ones_like(h_c[:, :1]) for h_c, _ in pairs]
    penalties = [
        covariance_penalty(h, one)
        for pair, one in zip(pairs, everywhere, strict=True)
        for h in pair
    ]
    wanted = d[:2].mean(), d[2:].mean(), torch.stack(penalties).mean()
    for ours, theirs in zip(model.alignment(out, truth), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_covariance_penalty_by_hand():
    """Two dimensions of unit variance: independent 0, equal 1 (covariance 1 off the diagonal)."""
    counts = torch.ones(1, 1, 2, 2)
    a, b = torch.tensor([[1.0, 1], [-1, -1]]), torch.tensor([[1.0, -1], [1, -1]])
    assert covariance_penalty(torch.stack([a, b])[None], counts).item() == pytest.approx(0)
    assert covariance_penalty(torch.stack([a, a])[None], counts).item() == pytest.approx(1)
    moved = covariance_penalty(torch.stack([a + 2, a - 3])[None], counts)  # where the mean is
    assert moved.item() == pytest.approx(1)
    # Without the last column a is still (1, -1), but b is constant there.
    left = torch.tensor([[[[1.0, 0], [1, 0]]]])
    assert covariance_penalty(torch.stack([a, a])[None], left).item() == pytest.approx(1)
    assert covariance_penalty(torch.stack([a, b])[None], left).item() == pytest.approx(0)


def test_only_labelled_positions_take_part():
    """The second image is ignored: each term is that of the first one's projections."""
    model = CTCLM(ModelConfig(variant="tiny"))
    out, truth = fake_output(model, True)
    truth[1] = 255
    firsts = [(h_c[:1], h_t[:1]) for h_c, h_t in model.shared_space(out)]
    d = torch.stack([directed_distances(*pair)[0].mean() for pair in firsts])
    penalties = [covariance_penalty(h, torch.ones_like(h[:, :1])) for pair in firsts for h in pair]
    wanted = d[:2].mean(), d[2:].mean(), torch.stack(penalties).mean()
    for ours, theirs in zip(model.alignment(out, truth), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- The objective ------------------------------------------------------------------------------


def test_total_is_the_weighted_sum():
    weights = {"align_weight": 0.3, "region_weight": 0.7, "transfer_weight": 1.1}
    model = CTCLM(ModelConfig(variant="tiny", **weights, decorrelation_weight=0.2))
    loss = model.objective(model(images()), labels(), ramp=0.6)
    transfer = loss.cnn_to_transformer + loss.transformer_to_cnn
    together = 0.3 * loss.align + 0.7 * loss.region + 1.1 * transfer
    wanted = loss.cnn_ce + loss.transformer_ce + 0.6 * together + 0.2 * loss.decorrelation
    torch.testing.assert_close(loss.total, wanted)
    assert all(term > 0 for term in loss)


def test_off_means_off():
    """Without transfer and alignment the branches do not know of each other."""
    model = CTCLM(ModelConfig(variant="tiny", transfer="none", align=False))
    loss = model.objective(model(images()), labels())
    torch.testing.assert_close(loss.total, loss.cnn_ce + loss.transformer_ce)
    assert not list(model.cnn_projectors.parameters())
    moved = torch.autograd.grad(
        loss.total - loss.cnn_ce, list(model.cnn.parameters()), materialize_grads=True
    )
    assert not any(grad.any() for grad in moved)


def test_everything_is_trained():
    """Every parameter of both branches and of the projectors gets a gradient."""
    model = CTCLM(ModelConfig(variant="tiny"))
    model.objective(model(images()), labels()).total.backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_all_ignored_is_zero():
    model = CTCLM(ModelConfig(variant="tiny"))
    loss = model.objective(model(images()), torch.full((2, 64, 64), 255))
    assert all(term.item() == 0 for term in loss)
    loss.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_ignored_images_do_not_reach_the_alignment():
    """An ignored image leaves all three terms as they are without it. It is a mirror image of the
    other one, so that the projectors' batch statistics are the same with it and without."""
    model = CTCLM(ModelConfig(variant="tiny"))
    out, truth = fake_output(model, True)
    alone = Output(
        out.cnn_logits[:1],
        out.transformer_logits[:1],
        [x[:1] for x in out.cnn_features],
        [x[:1] for x in out.transformer_features],
    )
    pair = out._replace(
        cnn_features=[torch.cat([x, x.flip(-1)]) for x in alone.cnn_features],
        transformer_features=[torch.cat([x, x.flip(-1)]) for x in alone.transformer_features],
    )
    truth[1] = 255
    wanted = model.alignment(alone, truth[:1])
    for ours, theirs in zip(model.alignment(pair, truth), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- What the loop asks -------------------------------------------------------------------------


def test_autocast_keeps_the_losses_in_float32():
    model = CTCLM(ModelConfig(variant="tiny"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.objective(model(images()), labels())
    assert all(term.dtype == torch.float32 and term.isfinite() for term in loss)


def test_branches_and_projectors_are_all_there_is():
    """The loop clips what they name, so nothing that learns may be missing; the deployed first."""
    model = CTCLM(ModelConfig(variant="tiny"))
    assert list(model.branches) == ["transformer", "cnn"]
    named = [p for part in model.branches.values() for p in part.parameters()]
    named += list(model.projectors.parameters())
    assert {id(p) for p in named} == {id(p) for p in model.parameters()}
    assert len(named) == len(list(model.parameters()))


def test_ramp():
    assert ramp_up(0, 1000) == pytest.approx(math.exp(-5))
    assert ramp_up(100, 1000) == pytest.approx(math.exp(-5 / 4))  # half of the first fifth
    assert ramp_up(200, 1000) == ramp_up(999, 1000) == 1
    values = [ramp_up(step, 1000) for step in range(201)]
    assert values == sorted(values)


def test_one_batch_can_be_overfitted_by_both_branches():
    model = CTCLM(ModelConfig(variant="tiny"))
    x = images(2)
    # A learnable map: four quadrants of different classes, which only position can tell apart.
    y = torch.zeros(2, 64, 64, dtype=torch.long)
    y[:, :32, 32:], y[:, 32:, :32], y[1, 32:, 32:] = 1, 2, 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        loss = model.objective(model(x), y, ramp_up(step, 40))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.transformer_ce < 0.1 and loss.cnn_ce < 0.1  # log 4 = 1.39 at the start
