"""experiments/settings.py: each control is what it says, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

from ctclm import CNN, CTCLM, ModelConfig, Transformer
from experiments.settings import (
    SETTINGS,
    Ensemble,
    FrozenCNN,
    OneBranch,
    fused_cross_entropy,
    plain_cross_entropy,
)

TINY = ModelConfig(variant="tiny", num_classes=3)
OTHER = {"transformer": "cnn", "cnn": "transformer"}


def batch():
    images, labels = 255 * torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    labels[0, :20] = 255
    return images, labels


def build(name, seed=0):
    torch.manual_seed(seed)
    return SETTINGS[name].build(TINY)


# --- The list -------------------------------------------------------------------------------------


def test_each_setting_is_what_it_says():
    """Kind of model, branches that learn, and what differs from the method's configuration."""
    one = {"align": False}
    mutual = {"transfer": "mutual", "transfer_weight": 0.5}
    unaligned = {"transfer": "none", "align_weight": 0.0, "region_weight": 0.0}
    one_way = {"transfer": "cnn_to_transformer", "align": False}
    both = ["transformer", "cnn"]
    wanted = {
        "transformer": (OneBranch, ["transformer"], one),
        "equal-time": (OneBranch, ["transformer"], one),
        "cnn": (OneBranch, ["cnn"], one),
        "mutual": (CTCLM, both, mutual | one),
        "frozen": (FrozenCNN, ["transformer"], one_way),
        "one-way": (CTCLM, both, one_way),
        "selective": (CTCLM, both, one),
        "decorrelation": (CTCLM, both, unaligned),
        "full": (CTCLM, both, {}),
        "constant": (CTCLM, both, mutual),
        "plain": (CTCLM, both, {"encoder": "plain"}),
        "twin": (CTCLM, both, {}),
        "perturbed": (OneBranch, ["transformer"], one),
        "penalised": (OneBranch, ["transformer"], {}),
        "doubled": (OneBranch, ["transformer"], one),
    }
    found = {}
    for name in wanted:
        model = build(name)
        changed = {k: v for k, v in vars(model.config).items() if v != getattr(TINY, k)}
        found[name] = (type(model), list(model.branches), changed)
    assert found == wanted
    assert set(SETTINGS) - set(wanted) == {"ensemble"} and SETTINGS["ensemble"].build is None
    assert [setting.number for setting in SETTINGS.values()] == list(range(1, 17))


def test_a_second_transformer_is_another_one():
    model = build("twin")
    ours, theirs = (branch.stages[0].embed.weight for branch in (model.transformer, model.cnn))
    assert type(model.cnn) is Transformer and not torch.equal(ours, theirs)
    assert type(build("full").cnn) is CNN
    images, labels = batch()
    assert model.objective(model(images), labels).total.isfinite()


def test_decorrelation_only_adds_nothing_but_its_penalty():
    model, (images, labels) = build("decorrelation"), batch()
    loss = model.objective(model(images), labels)
    assert loss.align > 0 and loss.decorrelation > 0  # measured, though not minimised
    wanted = loss.transformer_ce + loss.cnn_ce + loss.decorrelation
    torch.testing.assert_close(loss.total, wanted)


# --- One branch alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_one_branch_has_the_cross_entropy_that_it_has_beside_another(name):
    both = CTCLM(ModelConfig(variant="tiny", num_classes=3, transfer="none", align=False))
    alone, (images, labels) = build(name), batch()
    assert not hasattr(alone, OTHER[name]) and not list(alone.projectors.parameters())
    alone.branches[name].load_state_dict(both.branches[name].state_dict())
    wanted = getattr(both.objective(both(images), labels), f"{name}_ce")
    loss = alone.objective(alone(images), labels)
    # Two orders of summation in float32.
    torch.testing.assert_close(loss.total, wanted, rtol=1e-5, atol=1e-6)
    assert getattr(loss, f"{name}_ce") == loss.total
    others = [v for k, v in loss._asdict().items() if k not in ("total", f"{name}_ce")]
    assert len(others) == 7 and not any(others)


@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_one_branch_with_the_penalty_learns_what_it_does_beside_another(name):
    """Where nothing is transferred and nothing aligned the other branch makes no difference."""
    options = {"transfer": "none", "align_weight": 0.0, "region_weight": 0.0}
    config = ModelConfig(variant="tiny", num_classes=3, decorrelation_weight=3.0, **options)
    both, alone = CTCLM(config), OneBranch(config, name)
    alone.branches[name].load_state_dict(both.branches[name].state_dict())
    alone.projectors.load_state_dict(getattr(both, f"{name}_projectors").state_dict())
    images, labels = batch()
    labels[0], labels[1, :20] = 255, 255
    for model in (both, alone):
        loss = model.objective(model(images), labels)
        loss.total.backward()
    assert loss.decorrelation > 0
    torch.testing.assert_close(loss.total, getattr(loss, f"{name}_ce") + 3 * loss.decorrelation)
    pairs = zip(
        [*alone.branches[name].parameters(), *alone.projectors.parameters()],
        [*both.branches[name].parameters(), *getattr(both, f"{name}_projectors").parameters()],
        strict=True,
    )
    for ours, theirs in pairs:
        # The cross entropy is summed in another order; gradients reach 1e-1, most are near 1e-3.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_fused_cross_entropy_is_the_plain_one():
    """A GPU takes it from the collaborative loss; the branch that is not there gets no gradient."""
    z, (_, labels) = torch.randn(2, 3, 16, 16, requires_grad=True), batch()
    labels[0, :, :30] = 255
    plain, fused = (f(z, labels, 255) for f in (plain_cross_entropy, fused_cross_entropy))
    torch.testing.assert_close(fused, plain)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (fused, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.build])
def test_each_setting_learns_in_half_precision(name):
    """As on a GPU: features are bf16, weights are not."""
    model, (images, labels) = build(name), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.objective(model(images), labels)
    loss.total.backward()
    assert loss.total.isfinite() and loss.total.dtype == torch.float32


@pytest.mark.parametrize("cross_entropy", [plain_cross_entropy, fused_cross_entropy])
def test_class_weights_of_one_branch_are_those_of_two(cross_entropy):
    config = replace(TINY, class_weights=(0.5, 1.0, 3.0))
    both, alone = CTCLM(config), OneBranch(replace(config, align=False), "transformer")
    alone.transformer.load_state_dict(both.transformer.state_dict())
    (images, labels), weights = batch(), alone.class_weights
    labels[0, :, :30] = 255
    ce = cross_entropy(alone(images).logits, labels, 255, weights)
    torch.testing.assert_close(both.objective(both(images), labels).transformer_ce, ce)
    torch.testing.assert_close(alone.objective(alone(images), labels).total, ce)
    assert cross_entropy(alone(images).logits, torch.full_like(labels, 255), 255, weights) == 0


def test_all_ignored_is_zero():
    model, (images, labels) = build("penalised"), batch()
    loss = model.objective(model(images), torch.full_like(labels, 255))
    loss.total.backward()
    assert not any(loss) and not any(p.grad.any() for p in model.parameters())


# --- A frozen CNN ---------------------------------------------------------------------------------


def test_a_frozen_cnn_teaches_and_does_not_learn():
    cnn, model, (images, labels) = build("cnn", seed=5), build("frozen"), batch()
    model.cnn.load_state_dict(cnn.cnn.state_dict())
    loss = model.objective(model(images), labels)
    loss.total.backward()
    assert loss.cnn_to_transformer > 0 and loss.transformer_to_cnn == 0
    assert all(p.grad is None for p in model.cnn.parameters())
    assert all(p.grad is not None for p in model.transformer.parameters())


# --- Neither --------------------------------------------------------------------------------------


def test_the_ensembles_probabilities_are_the_mean_of_both():
    one, other = 30 * torch.randn(2, 2, 6, 4, 4, dtype=torch.float64)  # logits of two branches

    class Says(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, images):
            return self.logits

    mean = (one.softmax(1) + other.softmax(1)) / 2
    found = Ensemble(Says(one), Says(other))(None).exp()
    torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-300)
