"""Who teaches whom, and what becomes of the shared space: the statistics that tell the story.

    row |= story.columns(output, labels, projections)   # of the last batch before a report
    pictures.curves(story.smooth(log), story.panels(log, classes))      # story.png

`columns` looks at the windows of one step, so single values are noisy; the picture shows means of
five reports. Letters: B batch, D shared dimension, H W pixels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import pictures
from ctclm import Output, effective_rank
from data import IGNORE
from kernels import reliability
from metrics import erode

# Distances to a boundary in pixels, (from, to]; the last one is everything further inside.
NEAR, MIDDLE = 3, 8


@torch.no_grad()
def columns(output: Output, labels: Tensor, projections: list[tuple[Tensor, Tensor]]) -> dict:
    """Columns of the log, for two students.

    agreement              share of pixels where both predict the same class
    cnn_leads              share of labelled pixels where the gate is above 1/2: the CNN leads
    cnn_leads_K            the same among pixels of class K
    cnn_leads_near, _middle, _far    and by distance to a boundary: up to 3, up to 8, more pixels
    cosine_S, cka_S        mean cosine and linear CKA of both students' projections at stage S
    cnn_rank_S, transformer_rank_S   effective rank of each student's projections

    None where there is no such pixel. labels (B, H, W); projections as CTCLM.shared_space gives.
    """
    K = output.cnn_logits.shape[1]
    known = labels != IGNORE
    c, t = (
        F.interpolate(z.float(), labels.shape[1:], mode="bilinear").argmax(1)
        for z in (output.cnn_logits, output.transformer_logits)
    )
    leads = reliability(output.cnn_logits.float(), output.transformer_logits.float(), labels) > 0.5
    near, middle = (erode(labels, r).to(labels.device) == IGNORE for r in (NEAR, MIDDLE))
    row = {"agreement": (c == t).float().mean().item(), "cnn_leads": share(leads, known)}
    row |= {f"cnn_leads_{k}": share(leads, labels == k) for k in range(K)}
    row["cnn_leads_near"] = share(leads, known & near)
    row["cnn_leads_middle"] = share(leads, known & middle & ~near)
    row["cnn_leads_far"] = share(leads, known & ~middle)
    for stage, (h_c, h_t) in enumerate(projections, start=1):
        h_c, h_t = h_c.float(), h_t.float()
        row[f"cosine_{stage}"] = F.cosine_similarity(h_c, h_t, dim=1).mean().item()
        row[f"cka_{stage}"] = linear_cka(h_c, h_t)
        row[f"cnn_rank_{stage}"] = effective_rank(h_c)
        row[f"transformer_rank_{stage}"] = effective_rank(h_t)
    return row


def share(what: Tensor, among: Tensor) -> float | None:
    return what[among].float().mean().item() if among.any() else None


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Similarity of two representations (B, D, H, W) of the same positions, in [0, 1].

    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred rows (Kornblith et al., 2019): 1 when one is a
    rotation of the other, whatever the axes; cosine asks for the same axes.
    """
    x, y = (h.transpose(0, 1).flatten(1) for h in (x, y))  # (D, B * N)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    norms = torch.linalg.norm(x @ x.T) * torch.linalg.norm(y @ y.T)
    return ((x @ y.T).square().sum() / norms.clamp(min=1e-12)).item()


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


def panels(log: list[dict], classes) -> dict[str, list[pictures.Line]]:
    """What story.png shows, as far as the log has it."""
    T, C, Line = pictures.TRANSFORMER_COLOUR, pictures.CNN_COLOUR, pictures.Line
    stages = [(40, 40, 40), (100, 60, 160), (20, 140, 90), (200, 50, 60)]
    shown = {
        "share of pixels where the CNN leads, by distance to a boundary": [
            Line("cnn_leads_near", f"up to {NEAR} px", (200, 50, 60)),
            Line("cnn_leads_middle", f"up to {MIDDLE} px", C),
            Line("cnn_leads_far", "further inside", T),
        ],
        "share of pixels where the CNN leads, by class": [
            Line(f"cnn_leads_{k}", name, dark(colour))
            for k, (name, colour) in enumerate(zip(classes.names, classes.colours, strict=True))
        ],
        "share of pixels on which the students agree": [Line("agreement", "", (40, 40, 40))],
    }
    if "cka_1" in log[0]:
        for column, title in (
            ("cosine", "mean cosine in the shared space"),
            ("cka", "linear CKA of the shared space"),
        ):
            shown[title] = [
                Line(f"{column}_{s + 1}", f"stage {s + 1}", stages[s]) for s in range(4)
            ]
        shown["effective rank of the shared space, stage 4"] = [
            Line("transformer_rank_4", "Transformer", T),
            Line("cnn_rank_4", "CNN", C),
        ]
    return shown


def dark(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """A class's colour that can be seen on white."""
    return tuple(min(value, 200) for value in colour) if sum(colour) > 450 else colour
