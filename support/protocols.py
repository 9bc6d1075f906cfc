"""Scores of a student on whole scenes: one prediction per scene, every convention from it.

    result = evaluate(student, dataset)                     # miou, mf1, oa, kappa, iou, ...
    print(table(result, dataset.classes))
    result = evaluate(student, dataset, protocols=True)     # with result["conventions"]
    print(protocol_table(result, "all"))

What GeoSeg and mmsegmentation would print is worked out for our predictions: the pixels that they
count, as often as they count them, their classes and their formulas. What is not reproduced is how
the two predict: GeoSeg sees patches of 1024 and mmsegmentation crops of 512 pixels without their
surroundings, we overlapping windows, so the same model in their programs predicts other pixels.

Letters: H W pixels, K classes.
"""

import numpy as np
import torch
from torch import Tensor

import metrics
from data import Classes, Dataset, Scene
from scenes import predict_classes

GEOSEG_PATCH = 1024  # scenes are padded to a multiple
MMSEG_CROP = 512


class Tally:
    """What is counted of predictions, scene by scene, all of it integers that add up."""

    def __init__(self, classes: Classes, crop: int):
        self.classes, self.crop = classes, crop
        K = len(classes.names)
        self.labelled, self.full, self.eroded, self.crops = (
            torch.zeros(K, K, dtype=torch.int64) for _ in range(4)
        )
        self.boundary = torch.zeros(K, 4, dtype=torch.int64)
        self.padding = torch.zeros(K, dtype=torch.int64)
        self.domains: dict[str, Tensor] = {}
        self.scenes = {"full": 0, "eroded": 0}

    def add(self, scene: Scene, prediction: np.ndarray) -> None:
        """Against the label there is: the full one, or else the one with eroded boundaries."""
        K, label = len(self.classes.names), scene.label[:]
        matrix = metrics.confusion_matrix(prediction, label, K)
        self.labelled += matrix
        if scene.domain:
            self.domains[scene.domain] = self.domains.get(scene.domain, 0) + matrix
        if scene.eroded is not scene.label:
            self.full += matrix
            self.scenes["full"] += 1
            self.boundary += metrics.boundary_counts(prediction, label, K)

    def add_protocols(self, scene: Scene, prediction: np.ndarray, padding: Tensor) -> None:
        """Against the eroded label, which the protocols take, if there is one."""
        K, label = len(self.classes.names), scene.eroded[:]
        self.eroded += metrics.confusion_matrix(prediction, label, K)
        times = np.outer(*(metrics.crop_counts(length, self.crop) for length in label.shape))
        self.crops += metrics.confusion_matrix(prediction, label, K, times=times)
        self.padding += padding
        self.scenes["eroded"] += 1

    def result(self) -> dict:
        """As plain types."""
        found = metrics.scores(self.labelled)
        found["boundary_f1"] = metrics.boundary_f1(self.boundary)["boundary_f1"]
        found["confusion_matrix"] = self.labelled.tolist()
        if self.domains:
            found["domains"] = {
                name: metrics.scores(self.domains[name]) for name in sorted(self.domains)
            }
        return found

    def conventions(self) -> list[dict]:
        full = self.scenes["full"] > 0
        eroded = self.scenes["eroded"] > 0
        emulated = eroded and self.classes.clutter is not None
        rows = metrics.conventions(
            self.full if full else None,
            self.eroded if eroded else None,
            self.classes.clutter,
            self.boundary,
            self.padding if emulated else None,
            self.crops if emulated else None,
        )
        return [
            row._asdict() | {"scenes": self.scenes["full" if "full" in row.name else "eroded"]}
            for row in rows
        ]


# --- As text ------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "    -" if value is None else f"{100 * value:5.1f}"


def table(result: dict, classes: Classes) -> str:
    """Per-class and mean scores in per cent, then those of each domain."""
    lines = [f"{'class':16} {'IoU':>5} {'F1':>5}"]
    for name, iou, f1 in zip(classes.names, result["iou"], result["f1"], strict=True):
        lines.append(f"{name:16} {percent(iou)} {percent(f1)}")
    lines.append(f"{'mean':16} {percent(result['miou'])} {percent(result['mf1'])}")
    lines.append(
        f"overall accuracy {percent(result['oa'])}   kappa {percent(result['kappa'])}   "
        f"boundary F1 within 3 pixels {percent(result['boundary_f1'])}"
    )
    for name, found in result.get("domains", {}).items():
        lines.append(
            f"{name:16} {percent(found['miou'])} {percent(found['mf1'])}   "
            f"overall accuracy {percent(found['oa'])}   kappa {percent(found['kappa'])}"
        )
    return "\n".join(lines)


def protocol_table(result: dict, protocol: str) -> str:
    """The rows of `conventions` that belong to all, geoseg or mmseg; what each counts below it."""
    names = "mIoU mF1 mAcc OA OA-clutter kappa boundaryF1".split()
    keys = ("miou", "mf1", "macc", "oa", "oa_without_clutter", "kappa", "boundary_f1")
    lines = [f"{'':22} " + " ".join(f"{name:>10}" for name in names)]
    for row in result["conventions"]:
        if protocol == "all" or row["name"].startswith(protocol):
            values = " ".join(f"{percent(row[key]):>10}" for key in keys)
            lines.append(f"{row['name']:22} {values}")
            scenes = f"{row['scenes']} scene{'s' if row['scenes'] > 1 else ''}"
            lines.append(f"    {row['meaning']}; {row['pixels']:,} pixels of {scenes}")
    return "\n".join(lines)
