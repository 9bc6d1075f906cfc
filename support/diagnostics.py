"""Who teaches whom, and what becomes of the shared space: the statistics that tell the story.

    row |= statistics(cnn, transformer, gate, labels) | shared_space_statistics(projections)
    pictures_of(log, classes)["story"].save("story.png")

The statistics are of the windows of one step, so single values are noisy. story.png shows means of
five reports. Letters: B batch, D shared dimension, H W pixels, K classes.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support import pictures
from support.layouts import IGNORE, Classes
from support.metrics import erode
from support.progress import Pace, duration

# Distances to a boundary in pixels, (from, to]; the last one is everything further inside.
NEAR, MIDDLE = 3, 8


@torch.no_grad()
def statistics(cnn: Tensor, transformer: Tensor, gate: Tensor, labels: Tensor, K: int) -> dict:
    """Columns of the log: shares of pixels, None where there is no such pixel.

    agreement              where both branches predict the same class
    cnn_teaches            where the gate is above 1/2, of the labelled pixels
    cnn_teaches_K          the same, of the pixels of class K
    cnn_teaches_near, _middle, _far    and by distance to a boundary: up to 3, up to 8, more pixels

    cnn, transformer, labels (B, H, W) classes; gate (B, H, W) in [0, 1], NaN where ignored.
    """
    known, teaches = labels != IGNORE, gate > 0.5
    near, middle = (erode(labels, r).to(labels.device) == IGNORE for r in (NEAR, MIDDLE))
    row = {"agreement": (cnn == transformer).float().mean().item()}
    row["cnn_teaches"] = share(teaches, known)
    row |= {f"cnn_teaches_{k}": share(teaches, labels == k) for k in range(K)}
    row["cnn_teaches_near"] = share(teaches, known & near)
    row["cnn_teaches_middle"] = share(teaches, known & middle & ~near)
    row["cnn_teaches_far"] = share(teaches, known & ~middle)
    return row


def share(what: Tensor, among: Tensor) -> float | None:
    return what[among].float().mean().item() if among.any() else None


@torch.no_grad()
def shared_space_statistics(projections: list[tuple[Tensor, Tensor]]) -> dict:
    """Columns of the log, for stages S = 1.. of (CNN, Transformer) projections (B, D, H_s, W_s).

    cosine_S, cka_S                  mean cosine and linear CKA of the two
    cnn_rank_S, transformer_rank_S   effective rank of each
    """
    row = {}
    for stage, (h_c, h_t) in enumerate(projections, start=1):
        h_c, h_t = h_c.float(), h_t.float()
        row[f"cosine_{stage}"] = F.cosine_similarity(h_c, h_t, dim=1).mean().item()
        row[f"cka_{stage}"] = linear_cka(h_c, h_t)
        row[f"cnn_rank_{stage}"] = effective_rank(h_c)
        row[f"transformer_rank_{stage}"] = effective_rank(h_t)
    return row


@torch.no_grad()
def effective_rank(h: Tensor) -> float:
    """exp(entropy of the covariance's spectrum) of projections (B, D, H, W): 1 collapsed, D full.

    Roy and Vetterli, "The effective rank", 2007.
    """
    covariance = torch.cov(h.float().transpose(0, 1).flatten(1), correction=0)  # (D, D)
    spectrum = torch.linalg.eigvalsh(covariance).clamp(min=0)
    p = spectrum / spectrum.sum().clamp(min=1e-12)
    return torch.special.entr(p).sum().exp().item()


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Similarity of two representations (B, D, H, W) of the same positions, in [0, 1].

    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred rows (Kornblith et al., 2019): 1 when one is a
    rotation of the other, whatever the axes. Cosine asks for the same axes.
    """
    x, y = (h.transpose(0, 1).flatten(1) for h in (x, y))  # (D, B * N)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    norms = torch.linalg.norm(x @ x.T) * torch.linalg.norm(y @ y.T)
    return ((x @ y.T).square().sum() / norms.clamp(min=1e-12)).item()


def score_columns(branch: str, miou: float | None, ious: list[float | None]) -> dict:
    """Columns of the log: a branch's scores on the validation scenes, of class k in *_iou_k."""
    columns = {f"{branch}_val_iou_{k}": iou for k, iou in enumerate(ious)}
    return {f"{branch}_val_miou": miou} | columns


# --- What is printed ------------------------------------------------------------------------------


@torch.no_grad()
def count(module: nn.Module, shape: tuple[int, int, int], after=None) -> dict:
    """Parameters, and multiply-adds for one image of shape (C, H, W); `after` is called with the
    output and counts too."""
    training, device = module.training, next(module.parameters()).device
    module.eval()
    counter = FlopCounterMode(display=False)
    # Two images (the projectors' statistics need them), a multiply-add is two operations. The
    # counter knows matrix products, not every fused attention.
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = module(torch.zeros(2, *shape, device=device))
        if after:
            after(output)
    module.train(training)
    parameters = sum(p.numel() for p in module.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 4}


def cost(model: nn.Module, shape: tuple[int, int, int]) -> dict:
    """`count` of what is trained and of what is deployed, the first of the model's branches."""
    deployed = next(iter(model.branches.values()))
    return {
        "trained": count(model, shape, model.shared_space),
        "deployed": count(deployed, shape),
    }


def cost_lines(cost: dict, crop: int) -> str:
    return "\n".join(
        f"{name}: {c['parameters']:,} parameters, {c['multiply_adds'] / 1e6:,.0f} million "
        f"multiply-adds per {crop} x {crop} window"
        for name, c in cost.items()
    )


LEGEND = """
CE       cross entropy of the Transformer (T) and the CNN (C) on training windows, nats
C>T      transfer loss, nats: the CNN teaches the Transformer; T>C: the Transformer teaches the CNN
align    1 - cosine in the shared space at stages 1 and 2; region: at stages 3 and 4
decor    the covariance penalty that keeps the shared space from collapsing
gate     its mean: 100 % where only the CNN teaches, 0 % where only the Transformer does
data     share of the time spent waiting for windows
"""
COMPILING = "The first step compiles the kernels: a minute or two, once on a machine.\n"


def line(row: dict, steps: int, seconds_left: float) -> str:
    """A report a person can read, in the words of LEGEND."""
    return (
        f"{row['step']:5d}/{steps}  total {row['total']:.2f}  "
        f"CE T {row['transformer_ce']:.2f} C {row['cnn_ce']:.2f}  "
        f"C>T {row['cnn_to_transformer']:.3f} T>C {row['transformer_to_cnn']:.3f}  "
        f"align {row['align']:.2f} region {row['region']:.2f} decor {row['decorrelation']:.2f}  "
        f"gate {100 * row['gate']:.0f} %  lr {row['lr']:.0e}  {row['images_per_s']:.0f} img/s  "
        f"data {100 * row['data_wait']:.0f} %  {duration(seconds_left)} left"
    )


def steps_per_validation(scenes, pixels: int) -> float:
    """How many steps of so many pixels take as long as predicting the scenes, roughly.

    To predict a pixel takes a third of learning from it, and windows overlap by a quarter."""
    area = sum(scene.image.shape[0] * scene.image.shape[1] for scene in scenes)
    return area / 0.75**2 / 3 / pixels


def live_line(step: int, steps: int, losses, pace: Pace) -> str:
    """Between two reports: the loss of the last step."""
    return (
        f"{step:5d}/{steps}  total {losses.total.item():.2f}  "
        f"{1 / pace.step_seconds():.1f} steps/s  {duration(pace.seconds_left())} left"
    )


# --- What is drawn --------------------------------------------------------------------------------

T, C, INK = pictures.TRANSFORMER_COLOUR, pictures.CNN_COLOUR, (40, 40, 40)
STAGE_COLOURS = [INK, (100, 60, 160), (20, 140, 90), (200, 50, 60)]
Line = pictures.Line


def pictures_of(log: list[dict], classes: Classes | None) -> dict[str, Image.Image]:
    """curves, and with `classes` the story of who teaches whom, which a branch alone has not."""
    log = in_per_cent(log)
    drawn = {"curves": pictures.curves(log, training_panels(log))}
    if classes:
        drawn["story"] = pictures.curves(smooth(log), teaching_panels(log, classes))
    return drawn


def in_per_cent(log: list[dict]) -> list[dict]:
    """The log with its shares and scores in per cent, as they are printed and drawn."""

    def is_share(name: str) -> bool:
        return name.startswith(("agreement", "cnn_teaches", "gate")) or name.endswith("_miou")

    return [
        {k: 100 * v if v is not None and is_share(k) else v for k, v in row.items()} for row in log
    ]


def smooth(log: list[dict]) -> list[dict]:
    """Each value as the mean of up to five reports: its own, two before and two after."""
    rows = []
    for i, row in enumerate(log):
        near = log[max(0, i - 2) : i + 3]
        rows.append({"step": row["step"]})
        for key in row.keys() - {"step"}:
            values = [r[key] for r in near if r[key] is not None]
            rows[-1][key] = sum(values) / len(values) if values else None
    return rows


def training_panels(log: list[dict]) -> dict[str, list[Line]]:
    """What curves.png shows. The Transformer is blue and the CNN orange, as everywhere."""
    shown = {
        "cross entropy on training windows, nats": [
            Line("transformer_ce", "Transformer", T),
            Line("cnn_ce", "CNN", C),
        ],
        "validation mIoU, %": [
            Line("transformer_val_miou", "Transformer", T),
            Line("cnn_val_miou", "CNN", C),
        ],
        "transfer, nats": [
            Line("cnn_to_transformer", "CNN teaches", C),
            Line("transformer_to_cnn", "Transformer teaches", T),
        ],
        "gate, mean in %": [Line("gate", "above 50: the CNN teaches more", INK)],
    }
    return shown | rank_panel(log)


def rank_panel(log: list[dict]) -> dict[str, list[Line]]:
    if "cnn_rank_1" not in log[0]:
        return {}
    lines = [Line("transformer_rank_4", "Transformer", T), Line("cnn_rank_4", "CNN", C)]
    return {"effective rank of the shared space, stage 4": lines}


def teaching_panels(log: list[dict], classes: Classes) -> dict[str, list[Line]]:
    """What story.png shows, as far as the log has it."""
    named = zip(classes.names, classes.colours, strict=True)
    shown = {
        "pixels where the CNN teaches, by distance to a boundary, %": [
            Line("cnn_teaches_near", f"up to {NEAR} px", (200, 50, 60)),
            Line("cnn_teaches_middle", f"up to {MIDDLE} px", C),
            Line("cnn_teaches_far", "further inside", T),
        ],
        "pixels where the CNN teaches, by class, %": [
            Line(f"cnn_teaches_{k}", name, dark(colour)) for k, (name, colour) in enumerate(named)
        ],
        "pixels on which the branches agree, %": [Line("agreement", "", INK)],
    }
    if "cka_1" in log[0]:
        for column, title in (
            ("cosine", "mean cosine in the shared space"),
            ("cka", "linear CKA of the shared space"),
        ):
            shown[title] = [
                Line(f"{column}_{s + 1}", f"stage {s + 1}", STAGE_COLOURS[s]) for s in range(4)
            ]
    return shown | rank_panel(log)


def dark(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """A class's colour that can be seen on white."""
    return tuple(min(value, 200) for value in colour) if sum(colour) > 450 else colour
