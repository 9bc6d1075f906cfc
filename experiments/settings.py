"""The settings of the ablation: the method and its controls, each built from the method's parts.

    model = SETTINGS["full"].build(ModelConfig(variant="tiny"))         # for train.Run

A control removes or replaces one part of the method: one branch alone, a second Transformer instead
of the CNN, a CNN that no longer learns. None of them is part of the method, so ctclm.py and
train.py know nothing of them. A model of its own here has what train.Run asks of CTCLM: `config`,
`branches`, `projectors`, `shared_space` and `objective`.

Letters: B batch, H W pixels, K classes, D shared dimension; stages s = 1..4.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclm import (
    CNN,
    CTCLM,
    VARIANTS,
    Losses,
    ModelConfig,
    Projector,
    Transformer,
    class_weights_of,
    covariance_penalty,
    labelled_positions,
)
from kernels import collaborative_loss

# --- One branch alone -----------------------------------------------------------------------------


class OneOutput(NamedTuple):
    logits: Tensor  # (B, K, H/4, W/4)
    features: list[Tensor]  # four stages, (B, C_s, H_s, W_s)


class OneBranch(nn.Module):
    """A Transformer or a CNN that learns from the labels alone.

    With `config.align` the covariance penalty acts on its projections, and nothing else of the
    shared space does: alignment needs a second branch.
    """

    def __init__(self, config: ModelConfig, name: str):
        super().__init__()
        self.config, self.name = config, name
        variant = VARIANTS[config.variant]
        size = (variant, config.num_classes, config.in_channels)
        branch = Transformer(*size) if name == "transformer" else CNN(*size, config.encoder)
        self.add_module(name, branch)
        self.projectors = nn.ModuleList(
            Projector(C, config.shared_dim) for C in variant.channels if config.align
        )
        self.register_buffer("class_weights", class_weights_of(config), persistent=False)

    @property
    def branches(self) -> dict[str, nn.Module]:
        return {self.name: getattr(self, self.name)}

    def forward(self, images: Tensor) -> OneOutput:
        branch = self.branches[self.name]
        features = branch.encode(images)
        return OneOutput(branch.head(features), features)

    def shared_space(self, output: OneOutput) -> list[Tensor]:
        """Its projections of each stage, (B, D, H_s, W_s)."""
        return [p(x) for p, x in zip(self.projectors, output.features, strict=False)]

    def objective(self, output: OneOutput, labels: Tensor, ramp: float = 1.0) -> Losses:
        """Cross entropy and the covariance penalty; the terms that take two branches are 0."""
        c, valid = self.config, labels != self.config.ignore_index
        mean_cross_entropy = fused_cross_entropy if labels.is_cuda else plain_cross_entropy
        ce = mean_cross_entropy(output.logits, labels, c.ignore_index, self.class_weights)
        zero = decorrelation = ce.new_zeros(())
        projections = self.shared_space(output)
        with torch.autocast(labels.device.type, enabled=False):
            for h in projections:
                penalty = covariance_penalty(h, labelled_positions(valid[:, None].float(), h))
                decorrelation = decorrelation + penalty / 8  # as much of the loss as in CTCLM
        total = ce + c.decorrelation_weight * decorrelation
        terms = {"total": total, f"{self.name}_ce": ce, "decorrelation": decorrelation}
        return Losses(**dict.fromkeys(Losses._fields, zero) | terms)


def plain_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weights: Tensor | None = None
) -> Tensor:
    """Mean over the labelled pixels, of logits (B, K, H/4, W/4) at the size of labels (B, H, W)."""
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
    valid = labels != ignore_index
    options = {"ignore_index": ignore_index, "weight": class_weights, "reduction": "none"}
    values = F.cross_entropy(logits, labels.long(), **options)
    if class_weights is not None:
        valid = valid * class_weights[labels.long().masked_fill(~valid, 0)]
    return values.sum() / torch.where(valid.any(), valid.sum(), 1)


def fused_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weights: Tensor | None = None
) -> Tensor:
    """The same from the collaborative loss, without logits at full size and without atomics. It
    computes the absent branch too: cheap on a GPU, and twice the time on a CPU."""
    absent, options = logits.detach(), {"transfer": "none", "ignore_index": ignore_index}
    options["class_weights"] = class_weights
    return collaborative_loss(absent, logits, labels, **options).transformer_ce


# --- Another branch in the CNN's place ------------------------------------------------------------


def two_transformers(config: ModelConfig) -> CTCLM:
    """The method with a second Transformer, of other initial weights, where the CNN was."""
    model = CTCLM(config)
    model.cnn = Transformer(VARIANTS[config.variant], config.num_classes, config.in_channels)
    return model


class FrozenCNN(CTCLM):
    """The one-way transfer that the abstract argues against: the CNN teaches and does not learn.
    Its weights come from a finished run."""

    def __init__(self, config: ModelConfig):
        super().__init__(replace(config, transfer="cnn_to_transformer", align=False))
        self.cnn.requires_grad_(False)

    @property
    def branches(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}


class Ensemble(nn.Module):
    """Images -> the logarithm of two branches' mean probabilities, (B, K, H/4, W/4)."""

    def __init__(self, one: nn.Module, other: nn.Module):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, images: Tensor) -> Tensor:
        one, other = self.one(images).log_softmax(1), self.other(images).log_softmax(1)
        return torch.logaddexp(one, other) - math.log(2)


# --- The list -------------------------------------------------------------------------------------


class Setting(NamedTuple):
    number: int
    name: str
    build: Callable[[ModelConfig], nn.Module] | None  # None: not trained


def both(**changes) -> Callable[[ModelConfig], CTCLM]:
    """The method with some fields of its configuration changed."""
    return lambda config: CTCLM(replace(config, **changes))


def alone(name: str, align: bool = False) -> Callable[[ModelConfig], OneBranch]:
    return lambda config: OneBranch(replace(config, align=align), name)


HALF = {"transfer": "mutual", "transfer_weight": 0.5}  # selective's weights add up to 1 at a pixel
NOTHING_ALIGNED = {"transfer": "none", "align_weight": 0.0, "region_weight": 0.0}
SETTINGS = {
    "transformer": Setting(1, "Transformer alone", alone("transformer")),
    "equal-time": Setting(2, "Transformer alone, as much time as full", alone("transformer")),
    "cnn": Setting(3, "CNN alone", alone("cnn")),
    "mutual": Setting(4, "mutual, no gate, matched weight", both(**HALF, align=False)),
    "frozen": Setting(5, "one way, from the frozen CNN of (3)", FrozenCNN),
    "one-way": Setting(
        6, "one way, CNN learns too", both(transfer="cnn_to_transformer", align=False)
    ),
    "selective": Setting(7, "selective, no shared space", both(align=False)),
    "decorrelation": Setting(8, "covariance penalty only, no transfer", both(**NOTHING_ALIGNED)),
    "full": Setting(9, "full", CTCLM),
    "constant": Setting(10, "full, constant gate", both(**HALF)),
    "plain": Setting(11, "full, plain encoder", both(encoder="plain")),
    "twin": Setting(12, "full, a second Transformer for the CNN", two_transformers),
    "perturbed": Setting(13, "Transformer alone, perturbed", alone("transformer")),
    "ensemble": Setting(14, "mean of (1) and (3), not trained", None),
    "penalised": Setting(
        15, "Transformer alone, covariance penalty", alone("transformer", align=True)
    ),
    "doubled": Setting(16, "Transformer alone, twice the steps", alone("transformer")),
}
