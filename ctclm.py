"""CTCLM: a CNN and a Transformer learn together; only the Transformer is deployed.

Guo et al., "CNN-Transformer Collaborative Learning for Remote Sensing Semantic Segmentation",
ICGIP 2025 (Proc. SPIE 14124). Only the abstract is public. It fixes: transfer in both directions
between a CNN and a Transformer branch, a parallel multi-scale convolutional encoder, features
aligned in a shared representation space, the Transformer alone at inference. The rest is our
choice: what is taken from elsewhere names its source, and what names none is ours. From small to
large:

    MultiScaleBlock  -> CNN            parallel depthwise convolutions, computed as one
    TransformerBlock -> Transformer    attention with reduced keys (MiT / SegFormer)
    Head, Projector                    features -> logits, features -> shared space
    CTCLM                              both branches, and the objective that couples them

    model   = CTCLM(ModelConfig(variant="b0", num_classes=6))
    output  = model(images)                         # images (B, C, H, W) float, 0..255
    losses  = model.objective(output, labels)       # labels (B, H, W) integer; losses.total
    student = model.transformer                     # images -> logits (B, K, H/4, W/4)

Letters: B batch, C channels, H W pixels, N query tokens, M key tokens, h heads, D head dimension,
K classes; stages s = 1..4 at strides 4, 8, 16, 32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import (
    attention,
    collaborative_loss,
    conv2d,
    group_norm,
    layer_norm,
    linear,
    multiscale_convolution,
    upsample,
)
from kernels.distill import TRANSFERS, CollaborativeLoss

SMALLEST_IMAGE = 32  # stage 4 has stride 32, and stage 1 reduces keys by 8 at stride 4


class Variant(NamedTuple):
    """Widths and depths of the four stages. The CNN of a variant has about the same size."""

    channels: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    head_width: int


# b0, b1, b2 are the published MiT sizes (Xie et al., 2021, table 6), so that public weights would
# fit.
# We chose `tiny` for a laptop's CPU, and the same channels and depths for the CNN.
VARIANTS = {
    "tiny": Variant((32, 64, 96, 128), (1, 2, 3, 4), (1, 1, 2, 1), 96),
    "b0": Variant((32, 64, 160, 256), (1, 2, 5, 8), (2, 2, 2, 2), 256),
    "b1": Variant((64, 128, 320, 512), (1, 2, 5, 8), (2, 2, 2, 2), 256),
    "b2": Variant((64, 128, 320, 512), (1, 2, 5, 8), (3, 4, 6, 3), 768),
}
KEY_REDUCTION = (8, 4, 2, 1)  # stride of the keys' convolution: M = N / r^2


class Normalise(nn.Module):
    """Images 0..255 -> about zero mean and unit variance, in the model so that nobody forgets it.

    ImageNet's statistics for red, green and blue, as in every peer also where infrared comes first
    (IRRG); a fourth band (infrared) takes their mean.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
        mean += [sum(mean) / 3] * (in_channels - 3)
        std += [sum(std) / 3] * (in_channels - 3)
        self.in_channels, shape = in_channels, (1, in_channels, 1, 1)
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(values[:in_channels]).view(shape)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        if C != self.in_channels or min(H, W) < SMALLEST_IMAGE:
            raise ValueError(
                f"images must be (B, {self.in_channels}, H, W) with H and W at least "
                f"{SMALLEST_IMAGE}; got {tuple(images.shape)}"
            )
        images = images.contiguous(memory_format=torch.channels_last)  # 1.7x on a CPU
        return (images - self.mean) / self.std


# --- Layers whose biases learn by our kernel ------------------------------------------------------


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """With a bias, and zeros beyond the margins."""

    def forward(self, x: Tensor) -> Tensor:
        options = self.stride, self.padding, self.dilation, self.groups
        return conv2d(x, self.weight, self.bias, *options)


# --- Normalisation ------------------------------------------------------------------------------

# Under autocast PyTorch's norms return float32 on a GPU. Most of ours feed only what casts its
# input (convolutions, linear layers; GELU in between), so they return the dtype of that at once.
# Not so where a stage's stream begins, to which its blocks add (`stream=True`).


def result_dtype(x: Tensor, stream: bool) -> torch.dtype | None:
    """None: as PyTorch's."""
    device = x.device.type
    low = torch.is_autocast_enabled(device) and not stream
    return torch.get_autocast_dtype(device) if low else None


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, by our kernel where there is one; (..., C) -> the same."""

    def __init__(self, channels: int, eps: float = 1e-5, stream: bool = False):
        super().__init__(channels, eps)
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, result_dtype(x, self.stream))


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, by our kernel where there is one; (B, C, H, W) -> the same."""

    def __init__(self, groups: int, channels: int, stream: bool = False):
        super().__init__(groups, channels)
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        dtype = result_dtype(x, self.stream)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, dtype)


# --- The CNN branch -----------------------------------------------------------------------------


class MultiScaleConv(nn.Module):
    """A 3x3 depthwise convolution, then 5, 7, 9 and 11 in parallel, added to it (PKINet, 2024).

    b0 = DW3(x);   b = b0 + DW5(b0) + DW7(b0) + DW9(b0) + DW11(b0)

    The parallel convolutions are linear in the same input, so their sum is one 11x11 convolution.
    Its kernel is the sum of theirs, zero-padded; the identity is a delta. It is computed once, in
    training too: the gradient reaches each kernel through the sum, and each keeps its own
    initialisation.
    """

    SIZES = (5, 7, 9, 11)

    def __init__(self, channels: int):
        super().__init__()
        self.local = depthwise(channels, 3)
        self.branches = nn.ModuleList(depthwise(channels, size) for size in self.SIZES)

    def forward(self, x: Tensor) -> Tensor:
        b0 = self.local(x)  # (B, C, H, W)
        return multiscale_convolution(b0, self.merged_kernel())

    def merged_kernel(self) -> Tensor:
        """The sum of the zero-padded kernels and a delta, (C, 1, 11, 11)."""
        kernel = torch.zeros_like(self.branches[-1].weight)
        kernel[:, :, 5, 5] = 1
        for branch, size in zip(self.branches, self.SIZES, strict=True):
            kernel = kernel + F.pad(branch.weight, [(11 - size) // 2] * 4)
        return kernel

    def forward_separately(self, x: Tensor) -> Tensor:
        """What `forward` must equal: the convolutions one by one."""
        b0 = self.local(x)
        return b0 + sum(branch(b0) for branch in self.branches)


class MultiScaleBlock(nn.Module):
    """Mix in space at several scales, then in channels; (B, C, H, W) -> the same."""

    def __init__(self, channels: int, encoder: str):
        super().__init__()
        self.enter = nn.Sequential(Conv2d(channels, channels, 1), norm(channels), nn.GELU())
        # "plain", a single 3x3, is the control for what several scales are worth.
        self.scales = (
            MultiScaleConv(channels) if encoder == "multiscale" else depthwise(channels, 3)
        )
        self.leave = Conv2d(channels, channels, 1)
        self.norm = norm(channels)
        self.ffn = ConvFFN(channels)
        self.g1, self.g2 = (nn.Parameter(torch.ones(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + scaled(self.leave, self.g1, self.scales(self.enter(x)))
        return x + self.ffn(self.norm(x), self.g2)


def scaled(conv: nn.Conv2d, g: Tensor, x: Tensor) -> Tensor:
    """g conv(x), g for each channel of the result: in the weights, and not over a whole map."""
    return conv2d(x, g[:, None, None, None] * conv.weight, g * conv.bias)


class ConvFFN(nn.Sequential):
    """1x1 to four times the channels, 3x3 depthwise, GELU, 1x1 back; times g for each channel."""

    def __init__(self, channels: int, expansion: int = 4):
        hidden = expansion * channels
        super().__init__(
            Conv2d(channels, hidden, 1),
            Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        *expand, reduce = self
        for layer in expand:
            x = layer(x)
        return scaled(reduce, g, x)


class CNN(nn.Module):
    """The CNN branch: images (B, C, H, W) in 0..255 -> logits (B, K, H/4, W/4)."""

    def __init__(self, variant: Variant, num_classes: int, in_channels: int, encoder: str):
        super().__init__()
        self.normalise = Normalise(in_channels)
        first, widths = variant.channels[0], variant.channels
        self.stem = nn.Sequential(
            Conv2d(in_channels, first // 2, 3, stride=2, padding=1), norm(first // 2), nn.GELU()
        )
        previous = (first // 2, *widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                Conv2d(before, width, 3, stride=2, padding=1),
                norm(width, stream=True),
                *(MultiScaleBlock(width, encoder) for _ in range(depth)),
            )
            for before, width, depth in zip(previous, widths, variant.depths, strict=True)
        )
        self.head = Head(variant, num_classes, norm(variant.head_width))
        self.stem.apply(initialise)
        self.stages.apply(initialise)

    def encode(self, images: Tensor) -> list[Tensor]:
        """The features of the four stages, (B, C_s, H / stride_s, W / stride_s)."""
        x, features = self.stem(self.normalise(images)), []
        for stage in self.stages:
            features.append(x := stage(x))
        return features

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encode(images))


def depthwise(channels: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)


def norm(channels: int, stream: bool = False) -> nn.GroupNorm:
    # Batch statistics of small crops do not hold on whole scenes (a drop of 30 mIoU was measured).
    return GroupNorm(8, channels, stream)


# --- The Transformer branch ---------------------------------------------------------------------


class SpatialReductionAttention(nn.Module):
    """Multi-head attention whose keys and values live on a grid reduced by r in each direction."""

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.query = Linear(channels, channels)
        self.key_value = Linear(channels, 2 * channels)
        if reduction > 1:
            self.reduce = Conv2d(channels, channels, reduction, stride=reduction)
            self.reduce_norm = LayerNorm(channels)
        self.project = Linear(channels, channels)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        B, N, C = x.shape  # N = H * W tokens of this stage's grid
        h, D = self.heads, C // self.heads
        q = self.query(x).view(B, N, h, D).transpose(1, 2)  # (B, h, N, D), a view
        if self.reduction > 1:
            x = self.reduce_norm(to_tokens(self.reduce(to_grid(x, H, W))))  # (B, M, C)
        kv = self.key_value(x).view(B, -1, 2, h, D)
        k, v = (x.transpose(1, 2) for x in kv.unbind(2))  # 2 x (B, h, M, D), views
        x = attention(q, k, v)  # (B, h, N, D)
        return self.project(x.transpose(1, 2).reshape(B, N, C))


class MixFFN(nn.Module):
    """Linear, 3x3 depthwise convolution on the grid (it replaces position codes), GELU, linear."""

    def __init__(self, channels: int, expansion: int = 4):
        super().__init__()
        hidden = expansion * channels
        self.expand = Linear(channels, hidden)
        self.mix = Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.reduce = Linear(hidden, channels)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = to_tokens(self.mix(to_grid(self.expand(x), H, W)))
        return self.reduce(F.gelu(x))


class TransformerBlock(nn.Module):
    """Pre-norm attention and Mix-FFN, each added to its input; (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.norm1 = LayerNorm(channels, eps=1e-6)
        self.attention = SpatialReductionAttention(channels, heads, reduction)
        self.norm2 = LayerNorm(channels, eps=1e-6)
        self.ffn = MixFFN(channels)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + self.attention(self.norm1(x), H, W)
        return x + self.ffn(self.norm2(x), H, W)


class TransformerStage(nn.Module):
    """Overlapping patches -> tokens -> blocks -> a feature map, 4 times smaller or 2."""

    def __init__(self, before: int, channels: int, heads: int, depth: int, index: int):
        super().__init__()
        size, stride = (7, 4) if index == 0 else (3, 2)
        self.embed = Conv2d(before, channels, size, stride=stride, padding=size // 2)
        self.embed_norm = LayerNorm(channels, stream=True)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, KEY_REDUCTION[index]) for _ in range(depth)
        )
        self.norm = LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        H, W = x.shape[-2:]
        x = self.embed_norm(to_tokens(x))  # (B, N, C)
        for block in self.blocks:
            x = block(x, H, W)
        return to_grid(self.norm(x), H, W)


class Transformer(nn.Module):
    """The branch that is deployed: images (B, C, H, W), 0..255 -> logits (B, K, H/4, W/4)."""

    def __init__(self, variant: Variant, num_classes: int, in_channels: int):
        super().__init__()
        self.normalise = Normalise(in_channels)
        widths = variant.channels
        before = (in_channels, *widths[:-1])
        shapes = zip(before, widths, variant.heads, variant.depths, range(4), strict=True)
        self.stages = nn.ModuleList(TransformerStage(*shape) for shape in shapes)
        self.head = Head(variant, num_classes, nn.BatchNorm2d(variant.head_width))
        self.stages.apply(initialise)

    def encode(self, images: Tensor) -> list[Tensor]:
        """The features of the four stages, (B, C_s, H / stride_s, W / stride_s)."""
        x, features = self.normalise(images), []
        for stage in self.stages:
            features.append(x := stage(x))
        return features

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encode(images))


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)


def to_grid(x: Tensor, H: int, W: int) -> Tensor:
    # (B, N, C) -> (B, C, H, W); a view, and channels-last in memory, which convolutions like best
    return x.unflatten(1, (H, W)).permute(0, 3, 1, 2)


# --- What both branches have ---------------------------------------------------------------------


class Head(nn.Module):
    """All-MLP head (SegFormer): every stage to one width, upsampled to stride 4, added, classified.

    The published head upsamples, concatenates 4 x width channels and fuses them by a 1x1
    convolution. That fusion is linear, so it commutes with the upsampling: we project each stage at
    its own resolution, with fusion and projection in one matrix, and add. Same function, a quarter
    of the time, no concatenation.
    """

    def __init__(self, variant: Variant, num_classes: int, norm: nn.Module):
        super().__init__()
        self.project = nn.ModuleList(
            nn.Conv2d(channels, variant.head_width, 1, bias=False) for channels in variant.channels
        )
        self.norm = norm
        self.classify = Conv2d(variant.head_width, num_classes, 1)
        self.apply(initialise)
        nn.init.normal_(self.classify.weight, std=0.01)  # start undecided: cross entropy = log K

    def forward(self, features: list[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        total = self.project[0](features[0])
        for project, x in zip(self.project[1:], features[1:], strict=True):
            total += upsample(project(x), size)  # in place: no maps of the model are larger
        return self.classify(F.relu(self.norm(total), inplace=True))  # (B, K, H/4, W/4)


class Projector(nn.Sequential):
    """One branch's features of one stage -> the shared space, (B, shared_dim, H_s, W_s).

    The abstract only names the shared space. We chose a 1x1 convolution and a normalisation
    of each dimension to unit variance over the batch: neither a constant nor a shrinking projection
    can then satisfy the alignment. It is not deployed, so batch statistics do no harm.
    """

    def __init__(self, channels: int, shared_dim: int):
        super().__init__(
            nn.Conv2d(channels, shared_dim, 1, bias=False),
            nn.BatchNorm2d(shared_dim, affine=False, track_running_stats=False),
        )


def initialise(module: nn.Module) -> None:
    """Truncated normal for linear layers, Kaiming (fan out) for convolutions, as in MiT."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0][0].numel() * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- The collaboration --------------------------------------------------------------------------
#
# From here on h is a projection into the shared space, D the dimension of that space, and c, t are
# the CNN and the Transformer.


@dataclass
class ModelConfig:
    variant: Literal["tiny", "b0", "b1", "b2"] = "b0"  # size of both branches
    num_classes: int = 6
    in_channels: int = 3
    encoder: Literal["multiscale", "plain"] = "multiscale"  # of the CNN; plain: a single 3x3
    transfer: Literal[*TRANSFERS] = "selective"  # who teaches whom; selective: by the gate
    align: bool = True  # the shared representation space
    shared_dim: int = 64  # its dimension
    temperature: float = 1.0  # softens both distributions in the transfer
    kappa: float = 0.5  # width of the gate, in nats of cross entropy
    align_weight: float = 0.5  # of the alignment at stages 1 and 2
    region_weight: float = 0.5  # of the regional alignment at stages 3 and 4
    transfer_weight: float = 1.0
    decorrelation_weight: float = 1.0  # of the penalty that keeps the shared space from collapsing
    ignore_index: int = 255  # label of pixels that do not count
    class_weights: tuple[float, ...] | None = None  # of each class's cross entropy, in the gate too

    def __post_init__(self):
        known = {"variant": VARIANTS, "encoder": ("multiscale", "plain"), "transfer": TRANSFERS}
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {value!r}")
        if not 1 <= (K := self.num_classes) <= self.ignore_index:
            raise ValueError(f"num_classes must be 1 to ignore_index={self.ignore_index}; got {K}")
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be positive; got {self.in_channels}")
        weights = self.class_weights
        if weights is not None and (len(weights) != self.num_classes or min(weights) <= 0):
            raise ValueError(f"class_weights must be {self.num_classes} positive numbers")


def class_weights_of(config: ModelConfig) -> Tensor | None:
    return None if config.class_weights is None else torch.tensor(config.class_weights)


class Output(NamedTuple):
    cnn_logits: Tensor  # (B, K, H/4, W/4)
    transformer_logits: Tensor  # (B, K, H/4, W/4)
    cnn_features: list[Tensor]  # four stages, (B, C_s, H_s, W_s)
    transformer_features: list[Tensor]


class Losses(NamedTuple):
    """Scalars. `total` is what is minimised; the others are unweighted, `gate` is a statistic."""

    total: Tensor
    transformer_ce: Tensor
    cnn_ce: Tensor
    cnn_to_transformer: Tensor
    transformer_to_cnn: Tensor
    align: Tensor
    region: Tensor
    decorrelation: Tensor
    gate: Tensor


def alone(x: Tensor) -> Tensor:
    return x


class CTCLM(nn.Module):
    """Both branches, the shared space, and the objective that couples them.

    The Transformer is built first, so that a seed gives it the same initial weights whatever the
    CNN is. Sums over the batch go through `add_up`: where several processes have a part of the
    batch each, train.py lets it add up theirs, and the objective is that of the whole batch.
    """

    add_up: Callable[[Tensor], Tensor] = staticmethod(alone)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        variant = VARIANTS[config.variant]
        size = (variant, config.num_classes, config.in_channels)
        self.transformer = Transformer(*size)
        self.cnn = CNN(*size, config.encoder)
        self.transformer_projectors, self.cnn_projectors = (
            nn.ModuleList(Projector(C, config.shared_dim) for C in variant.channels if config.align)
            for _ in range(2)
        )
        self.register_buffer("class_weights", class_weights_of(config), persistent=False)

    def forward(self, images: Tensor) -> Output:
        """images (B, C, H, W) float, 0..255 -> Output."""
        cnn, transformer = self.cnn.encode(images), self.transformer.encode(images)
        return Output(self.cnn.head(cnn), self.transformer.head(transformer), cnn, transformer)

    def shared_space(self, output: Output) -> list[tuple[Tensor, Tensor]]:
        """(CNN, Transformer) projections of each stage, (B, shared_dim, H_s, W_s), before L2.

        Empty without alignment.
        """
        if not self.config.align:
            return []
        cnn = [p(x) for p, x in zip(self.cnn_projectors, output.cnn_features, strict=True)]
        transformer = [
            p(x)
            for p, x in zip(self.transformer_projectors, output.transformer_features, strict=True)
        ]
        return list(zip(cnn, transformer, strict=True))

    def objective(self, output: Output, labels: Tensor, ramp: float = 1.0) -> Losses:
        """L = CE_t + CE_c + ramp (align + region + transfer) + covariance penalty, each weighted.

        labels (B, H, W) integer, 0..K-1 or ignore_index. `ramp` in [0, 1] holds the collaboration
        back while neither branch knows anything yet (see `ramp_up`). The cross entropies are not
        ramped. Nor is the covariance penalty (the field `decorrelation`), which must act before
        the alignment does.
        """
        c = self.config
        loss = collaborative_loss(
            output.cnn_logits,
            output.transformer_logits,
            labels,
            transfer=c.transfer,
            temperature=c.temperature,
            kappa=c.kappa,
            ignore_index=c.ignore_index,
            class_weights=self.class_weights,
        )
        if self.add_up is not alone:
            n = self.counted(labels)
            share = n / self.add_up(n).clamp(min=torch.finfo(n.dtype).tiny)
            loss = CollaborativeLoss(*self.add_up(share * torch.stack(loss)).unbind())
        align, region, decorrelation = self.alignment(output, labels)
        transfer = loss.cnn_to_transformer + loss.transformer_to_cnn
        collaboration = (
            c.align_weight * align + c.region_weight * region + c.transfer_weight * transfer
        )
        supervised = loss.transformer_ce + loss.cnn_ce
        return Losses(
            total=supervised + ramp * collaboration + c.decorrelation_weight * decorrelation,
            transformer_ce=loss.transformer_ce,
            cnn_ce=loss.cnn_ce,
            cnn_to_transformer=loss.cnn_to_transformer,
            transformer_to_cnn=loss.transformer_to_cnn,
            align=align,
            region=region,
            decorrelation=decorrelation,
            gate=loss.gate,
        )

    def counted(self, labels: Tensor) -> Tensor:
        """What each mean of CollaborativeLoss is over, (5,): summed class weights, then pixels."""
        valid = labels != self.config.ignore_index
        n = weight = valid.sum().float()
        if self.class_weights is not None:
            weight = (valid * self.class_weights[labels.long() * valid]).sum()
        return torch.stack((weight, weight, n, n, n))

    def alignment(self, output: Output, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The shared space's three terms, in float32: align, region, decorrelation.

        At stages 1 and 2 both branches hold useful detail, so both move:
        1/2 [d(h_t, sg h_c) + d(h_c, sg h_t)] with d = 1 - cosine. At stages 3 and 4 features are
        semantic. There, in each region (one position of the grid), only the branch with the higher
        mean cross entropy moves. Positions without a valid pixel do not count.
        """
        align = region = decorrelation = torch.zeros((), device=labels.device)
        if not self.config.align:
            return align, region, decorrelation
        valid, gap = self.labelled_gap(output, labels)  # (B, 1, H/4, W/4), no gradient
        projections = self.shared_space(output)
        with torch.autocast(labels.device.type, enabled=False):
            for s, (h_c, h_t) in enumerate(projections):
                counts = labelled_positions(valid, h_c)
                transformer_moves, cnn_moves = directed_distances(h_c.float(), h_t.float())
                if s < 2:
                    both_move = 0.5 * (transformer_moves + cnn_moves)
                    align = align + masked_mean(both_move, counts, self.add_up) / 2  # of two stages
                else:
                    cnn_is_better = (F.adaptive_avg_pool2d(gap, h_c.shape[-2:]) > 0).float()
                    one_moves = cnn_is_better * transformer_moves + (1 - cnn_is_better) * cnn_moves
                    region = region + masked_mean(one_moves, counts, self.add_up) / 2
                penalty = covariance_penalty(h_c, counts, self.add_up)
                penalty = penalty + covariance_penalty(h_t, counts, self.add_up)
                decorrelation = decorrelation + penalty / 8  # mean of 2 branches x 4 stages
        return align, region, decorrelation

    @torch.no_grad()
    def labelled_gap(self, output: Output, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Share of valid pixels, and l_t - l_c where there are any, both (B, 1, H/4, W/4).

        We compare the branches at stride 4, where their logits are, with the label of the pixel in
        the middle: a region of stage 3 or 4 still averages 16 or 64 of these.
        """
        ignored, size = self.config.ignore_index, output.cnn_logits.shape[-2:]
        valid = F.adaptive_avg_pool2d((labels != ignored)[:, None].float(), size)
        middle = F.interpolate(labels[:, None].float(), size, mode="nearest-exact").long()[:, 0]
        l_t, l_c = (
            F.cross_entropy(z.float(), middle, ignore_index=ignored, reduction="none")  # or 0
            for z in (output.transformer_logits, output.cnn_logits)
        )
        return valid, (l_t - l_c)[:, None]

    @property
    def branches(self) -> dict[str, nn.Module]:
        """The branches that learn, by name; the one that is deployed comes first."""
        return {"transformer": self.transformer, "cnn": self.cnn}

    @property
    def projectors(self) -> nn.ModuleList:
        return nn.ModuleList([*self.cnn_projectors, *self.transformer_projectors])


def labelled_positions(valid: Tensor, h: Tensor) -> Tensor:
    """1 where a position of h (B, D, H_s, W_s) has a pixel with valid (B, 1, H, W) > 0."""
    return (F.adaptive_avg_pool2d(valid, h.shape[-2:]) > 0).float()


def directed_distances(h_c: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine at each position, twice, (B, 1, H, W): the Transformer moves; the CNN moves.

    h_c, h_t (B, D, H, W). The values are the same. The gradient of the first reaches h_t alone, for
    h_c is the teacher and detached; that of the second reaches h_c alone.
    """

    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        norms = student.norm(dim=1, keepdim=True) * teacher.norm(dim=1, keepdim=True)
        return 1 - (student * teacher).sum(1, keepdim=True) / norms.clamp(min=1e-12)

    return distance(h_t, h_c.detach()), distance(h_c, h_t.detach())


def covariance_penalty(h: Tensor, counts: Tensor, add_up=alone) -> Tensor:
    """Mean squared off-diagonal covariance of one branch's projections h (B, D, H, W).

    The decorrelation term of VICReg (Bardes et al., 2022); `counts` (B, 1, H, W) is 1 at positions
    that take part. Alignment alone collapses the space to 2-4 dimensions of 64 within 100 steps.
    """
    D = h.shape[1]
    covariance = masked_covariance(h.float(), counts, add_up)  # (D, D)
    off_diagonal = covariance - torch.diag(torch.diagonal(covariance))
    return off_diagonal.square().sum() / (D * (D - 1))


def masked_covariance(h: Tensor, counts: Tensor, add_up=alone) -> Tensor:
    """Covariance over the positions that count, (B, D, H, W) -> (D, D)."""
    rows = to_tokens(h * counts).flatten(0, 1)  # (B * N, D)
    n = add_up(counts.sum()).clamp(min=1)
    mean = add_up(rows.sum(0)) / n
    return add_up(rows.T @ rows) / n - mean.outer(mean)


def masked_mean(values: Tensor, counts: Tensor, add_up=alone) -> Tensor:
    return add_up((values * counts).sum()) / add_up(counts.sum()).clamp(min=1)


def ramp_up(step: int, steps: int) -> float:
    """Weight of the collaboration at `step`: exp(-5 (1 - t)^2) over the first fifth, then 1.

    The sigmoid-shaped ramp of temporal ensembling (Laine and Aila, 2017).
    """
    t = min(step / max(steps / 5, 1), 1.0)
    return math.exp(-5 * (1 - t) ** 2)
