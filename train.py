"""Train both students; keep the Transformer.

    python train.py                                     # toy scenes, minutes on a CPU
    python train.py --data folder --root MY_DATA --out runs/mine
    python train.py --data folder --root MY_DATA --out runs/mine --resume

A run writes config.json, log.csv, metrics.json, curves.png, samples.png, story.png (who taught whom
over training), last.pt (everything that is needed to go on) and best.pt (the Transformer alone, at
its best validation mIoU: this is what people pass on). Ctrl-C and SIGTERM finish the step, save,
and exit.

The step number is the whole state of the data and there is no randomness in the model, so a resumed
run ends in the same bits as one that was never stopped.
"""

import csv
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import __version__ as pillow_version
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import cli
import pictures
import story
from ctclm import (
    CTCLM,
    SMALLEST_IMAGE,
    Losses,
    ModelConfig,
    ramp_up,
    save_transformer,
)
from data import BANDS, DATA_SETS, IGNORE, DataError, Dataset, Scene, load
from infer import evaluate, table
from kernels import reliability
from labels import MAX_UNKNOWN, count_cells
from windows import Windows, prefetch, rare_share


@dataclass
class Config:
    data: Literal[*DATA_SETS] = cli.option("toy", "data set")
    root: Path = cli.option(None, "the data set's folder (toy needs none)")
    train_tiles: tuple[str, ...] = cli.option((), "train on these tiles only, by name")
    val_tiles: tuple[str, ...] = cli.option((), "validate on these tiles only, by name")
    bands: Literal["auto", *BANDS] = cli.option("auto", "where the publisher has several")
    max_unknown: float = cli.option(MAX_UNKNOWN, "share of a label whose colour may be no class")
    cache: Path = cli.option(None, "decoded images, for several runs (OUT/cache for this one)")
    rare: float = cli.option(
        None, "share of windows around a pixel of a rare class (0.25 if one has under 1 %%, else 0)"
    )
    variant: Literal["tiny", "b0", "b1", "b2"] = cli.option("tiny", "size of both students")
    steps: int = cli.option(1200, "optimiser steps")
    batch: int = cli.option(8, "windows per step")
    crop: int = cli.option(128, "side of a window in pixels, a multiple of 32")
    lr: float = cli.option(3e-3, "highest learning rate; warm-up, then cosine to zero")
    distill: Literal["none", "cnn_to_transformer", "transformer_to_cnn", "mutual", "selective"] = (
        cli.option("selective", "who teaches whom; selective: at each pixel the more reliable one")
    )
    gamma: float = cli.option(1.0, "weight of the transfer")
    align: Literal["on", "off", "decorrelation"] = cli.option(
        "on", "the shared representation space; decorrelation: its penalty alone, nothing aligned"
    )
    encoder: Literal["multiscale", "plain", "transformer"] = cli.option(
        "multiscale", "the CNN's blocks; transformer: a second Transformer in its place"
    )
    students: Literal["both", "transformer", "cnn"] = cli.option(
        "both", "who is there; one alone has nobody to learn from"
    )
    teacher: Path = cli.option(None, "last.pt of a run whose CNN teaches and stays as it is")
    labelled: int = cli.option(0, "train on so many scenes (0: on all)")
    labelled_from: int = cli.option(0, "the first of these, counted from 0")
    labelled_side: int = cli.option(0, "and of these only on a square of so many pixels (0: all)")
    augment: Literal["on", "turns"] = cli.option(
        "on", "turns: windows are turned and flipped, but keep their scale and light"
    )
    validations: int = cli.option(6, "how often to validate")
    out: Path = cli.option(Path("runs/toy"), "the run's folder")
    resume: bool = cli.option(False, "continue the run in --out")
    seed: int = cli.option(0, "of initial weights and windows")
    precision: Literal["auto", "fp32", "bf16"] = cli.option("auto", "auto: bf16 on a GPU")
    device: Literal["auto", "cpu", "cuda"] = cli.option("auto", "where to train")

    def __post_init__(self):
        for name in ("steps", "batch", "crop", "lr"):
            if not getattr(self, name) > 0:
                raise cli.UsageError(f"--{name} must be positive; got {getattr(self, name)}")
        if self.crop % 32:
            raise cli.UsageError(f"--crop must be a multiple of 32; got {self.crop}")
        if self.batch * self.crop**2 <= 32**2:  # a single position at stride 32 has no variance
            raise cli.UsageError("--batch 1 needs --crop 64 or more")
        for name in ("labelled", "labelled_from", "labelled_side", "gamma"):
            if not getattr(self, name) >= 0:
                raise cli.UsageError(f"{cli.flag(name)} must be at least 0")
        if self.validations < 1:
            raise cli.UsageError("--validations must be positive: the last step is validated")
        taught = (self.students, self.distill, self.align) == ("both", "cnn_to_transformer", "off")
        if self.teacher and (not taught or self.encoder == "transformer"):
            raise cli.UsageError(
                "--teacher, a CNN that does not learn, needs --students both, "
                "--distill cnn_to_transformer and --align off"
            )
        for name in ("rare", "max_unknown"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise cli.UsageError(
                    f"{cli.flag(name)} is a share, 0 to 1; got {getattr(self, name)}"
                )
        if not 0 <= self.seed < 2**63:
            raise cli.UsageError(f"--seed must be at least 0; got {self.seed}")

    def saved(self) -> dict:
        """As plain types. Where to run and whether to resume are not part of what was run."""
        plain = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(self).items()}
        plain |= {"train_tiles": list(self.train_tiles), "val_tiles": list(self.val_tiles)}
        return {k: v for k, v in plain.items() if k not in ("out", "resume", "device", "cache")}


REPORTS, REPORTS_PER_SAVE = 30, 5  # a run has at most 30 reports and saves 6 times


# --- The run ------------------------------------------------------------------------------------


class Run:
    """One training run: what is trained, what it is trained on, and what has happened so far."""

    def __init__(self, config: Config):
        self.config = config
        self.device = cli.pick_device(config.device)
        self.prepare_folder()
        options = {
            "cache": config.cache or config.out / "cache",
            "bands": None if config.bands == "auto" else config.bands,
            "max_unknown": config.max_unknown,
        }
        self.train_set = load(config.data, config.root, "train", config.train_tiles, **options)
        options["bands"] = self.train_set.bands
        self.val_set = load(config.data, config.root, "val", config.val_tiles, **options)
        if both := {s.path for s in self.train_set.scenes} & {s.path for s in self.val_set.scenes}:
            if both != {None}:  # toy scenes have no file
                raise DataError(
                    f"{sorted(both)[0]}: is in the training and in the validation set; "
                    f"choose with --train-tiles and --val-tiles"
                )
        for split, dataset in (("train", self.train_set), ("val", self.val_set)):
            labels = [scene.label for scene in dataset.scenes]
            if not any(label is not None and (label != IGNORE).any() for label in labels):
                raise DataError(f"{config.root}: no pixel of the {split} split has a label")
        torch.manual_seed(config.seed)
        self.model = CTCLM(
            ModelConfig(
                variant=config.variant,
                num_classes=len(self.train_set.classes.names),
                in_channels=self.train_set.scenes[0].image.shape[2],
                students=config.students,
                encoder=config.encoder,
                distill=config.distill,
                gamma=config.gamma,
                align=config.align == "decorrelation"
                or (config.align == "on" and config.students == "both"),
                **({"alpha": 0.0, "beta": 0.0} if config.align == "decorrelation" else {}),
            )
        ).to(self.device)
        if config.teacher:
            load_teacher(self.model, config.teacher)
        self.students = {}  # those that learn
        if self.model.transformer:
            self.students["transformer"] = self.model.transformer
        if self.model.cnn and not config.teacher:
            self.students["cnn"] = self.model.cnn
        self.branches = dict(self.students)
        projectors = [*self.model.cnn_projectors, *self.model.transformer_projectors]
        if projectors:
            self.branches["projectors"] = torch.nn.ModuleList(projectors)
        self.optimizer = make_optimizer(self.model, config.lr)
        scenes = few_labels(self.train_set, config)
        rare = rare_share(scenes) if config.rare is None else config.rare
        self.windows = Windows(
            scenes,
            config.crop,
            config.batch,
            seed=config.seed,
            rare=rare,
            augment=config.augment == "on",
        )
        bf16 = config.precision == "bf16" or (
            config.precision == "auto" and self.device.type == "cuda"
        )
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.step = 0  # steps done
        self.log: list[dict] = []
        self.best: dict = {"miou": -1.0}  # the best validation scores of the Transformer
        self.seconds = 0.0  # of training so far, over all resumptions
        if config.resume:
            self.restore()

    def prepare_folder(self) -> None:
        out, last = self.config.out, self.config.out / "last.pt"
        if self.config.resume:
            if not last.exists():
                raise cli.UsageError(f"{last}: no such file, so there is nothing to resume")
        elif out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {"cache"}):
            raise cli.UsageError(
                f"{out}: is not empty; continue it with --resume or choose another --out"
            )
        out.mkdir(parents=True, exist_ok=True)

    def restore(self) -> None:
        state = checkpoint.read(self.config.out / "last.pt", "ctclm-training")
        for key, value in self.config.saved().items():
            if state["config"].get(key) != value:
                raise cli.UsageError(
                    f"{self.config.out}: was started with {cli.flag(key)} "
                    f"{state['config'].get(key)}, not {value}; resume it with the same options"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log, self.best = state["step"], state["log"], state["best"]
        self.seconds = state["seconds"]

    def save(self) -> None:
        state = {
            "kind": "ctclm-training",
            "config": self.config.saved(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "log": self.log,
            "best": self.best,
            "seconds": self.seconds,
        }
        checkpoint.save(state, self.config.out / "last.pt")
        write_csv(self.log, self.config.out / "log.csv")

    # --- One step ---

    def train_step(self, images: np.ndarray, labels: np.ndarray) -> Losses:
        """Forward, objective, backward, clip, update. Raises when a gradient is not finite."""
        images = torch.from_numpy(images).to(self.device).float()  # (B, C, H, W), 0..255
        labels = torch.from_numpy(labels).to(self.device)  # (B, H, W)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with self.autocast:
            output = self.model(images)
            losses = self.model.objective(output, labels, self.ramp())
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        for name, branch in self.branches.items():  # per branch: one's spike must not slow another
            norm = torch.nn.utils.clip_grad_norm_(branch.parameters(), 1.0)
            if not norm.isfinite():
                raise DivergedError(
                    f"the {name}'s gradient is not finite at step {self.step} "
                    f"(windows 0..{len(images) - 1} of that step, seed {self.config.seed}); the "
                    f"weights were left as they are in last.pt; try a lower --lr"
                )
        self.optimizer.step()
        self.last_output, self.last_labels = output, labels
        self.step += 1
        return Losses(*(term.detach() for term in losses))

    def learning_rate(self) -> float:
        """Linear warm-up over a twentieth of the run, then cosine to zero."""
        c, warm_up = self.config, max(1, self.config.steps // 20)
        if self.step < warm_up:
            return c.lr * (self.step + 1) / warm_up
        t = (self.step - warm_up) / max(1, c.steps - warm_up)
        return c.lr * 0.5 * (1 + math.cos(math.pi * t))

    def ramp(self) -> float:
        return ramp_up(self.step, self.config.steps)

    # --- The loop ---

    def fit(self) -> None:
        """Train from self.step to the end; report, validate, save."""
        with StopSignal() as stop:
            self.train_until_done(stop)

    def train_until_done(self, stop: "StopSignal") -> None:
        c = self.config
        # Rounded up, so that 4000 steps do not end in a report of 10.
        report_every = math.ceil(c.steps / REPORTS)
        # Multiples, so that a report is always at hand.
        save_every = report_every * REPORTS_PER_SAVE
        validate_every = report_every * max(1, REPORTS // c.validations)
        history, waited, begin, before = [], 0.0, time.perf_counter(), self.seconds
        since, first = begin, self.step
        threads = 1 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        for _, images, labels, wait in prefetch(self.windows, range(self.step, c.steps), threads):
            history.append(self.train_step(images, labels))
            waited += wait
            done = self.step == c.steps
            if self.step % report_every == 0 or done:
                now = time.perf_counter()
                row = self.report(history, waited, now - since)
                left = (now - begin) / (self.step - first) * (c.steps - self.step)
                print(line(row, c.steps, left), flush=True)
                history, waited = [], 0.0
            self.seconds = before + time.perf_counter() - begin
            if self.step % validate_every == 0 or done:
                self.validate()
            if self.step % save_every == 0 or done:
                self.save()
            if self.step % report_every == 0 or done:
                since = time.perf_counter()
            if stop.received and not done:
                self.save()
                print(f"interrupted: saved at step {self.step}; add --resume to go on")
                sys.exit(128 + stop.received)

    @torch.no_grad()
    def report(self, history: list[Losses], waited: float, seconds: float) -> dict:
        """One row of the log: means since the last one."""
        terms = torch.tensor([[float(term) for term in losses] for losses in history]).mean(0)
        row = {"step": self.step} | dict(zip(Losses._fields, terms.tolist(), strict=True))
        row |= {"ramp": self.ramp(), "lr": self.learning_rate()}
        row["images_per_s"] = len(history) * self.config.batch / seconds
        row["data_wait"] = waited / seconds
        if self.config.students == "both":
            with self.autocast:
                projections = self.model.shared_space(self.last_output)
            row |= story.columns(self.last_output, self.last_labels, projections)
        row |= {"transformer_val_miou": None, "cnn_val_miou": None}
        self.log.append(row)
        return row

    def validate(self) -> None:
        """Score the students on whole validation scenes; keep the Transformer if it is better.

        Where the CNN is trained alone its scores are kept, and no best.pt.
        """
        scores = self.evaluate(self.val_set)
        row = self.log[-1]
        for name, result in scores.items():
            row[f"{name}_val_miou"] = result["miou"]
        first, *others = scores
        is_best = scores[first]["miou"] > self.best["miou"]
        shown = (f"{name} {100 * result['miou']:.1f}" for name, result in scores.items())
        print(
            f"      validation mIoU: {', '.join(shown)}" + (", the best so far" if is_best else ""),
            flush=True,
        )
        if is_best:
            self.best = scores[first] | {"step": self.step} | {k: scores[k] for k in others}
            about = {
                "classes": list(self.train_set.classes.names),
                "colours": [list(colour) for colour in self.train_set.classes.colours],
                "data": self.config.data,
                "bands": self.train_set.bands,
                "step": self.step,
                "val_miou": self.best["miou"],
            }
            if self.model.transformer:
                save_transformer(self.model, self.config.out / "best.pt", about)

    def evaluate(self, dataset: Dataset) -> dict[str, dict]:
        """The scores of each student as it is now, on whole scenes."""
        self.model.eval()
        scores = {}
        for name, student in self.students.items():
            with cli.Progress(f"scoring the {name}") as progress:
                scores[name] = evaluate(student, dataset, progress, device=self.device)
        self.model.train()
        return scores

    # --- Before and after ---

    def describe(self) -> dict:
        """Parameters and multiply-adds of what is trained and of what is deployed."""
        trained = count(self.model, self.config.crop)
        deployed = count(next(iter(self.students.values())), self.config.crop)
        return {"trained": trained, "deployed": deployed}

    def finish(self) -> None:
        """metrics.json, curves.png, samples.png."""
        out = self.config.out
        write_json(
            {
                "validation": {k: v for k, v in self.best.items() if k != "cnn"},
                "cnn_validation": self.best.get("cnn"),
                "cost": self.describe(),
                "training_seconds": round(self.seconds, 1),
                "machine": machine(self.device),
            },
            out / "metrics.json",
        )
        pictures.curves(self.log, panels(self.log)).save(out / "curves.png")
        if self.config.students == "both":
            story_panels = story.panels(self.log, self.val_set.classes)
            pictures.curves(story.smooth(self.log), story_panels).save(out / "story.png")
            if rows := self.samples():
                pictures.samples(rows, self.val_set.classes).save(out / "samples.png")

    @torch.no_grad()
    def samples(self, rows: int = 3, side: int = 256) -> list[pictures.Sample]:
        """The middle of some validation scenes, seen by both students as they are now."""
        self.model.eval()
        found = []
        large_enough = [s for s in self.val_set.scenes if min(s.label.shape) >= SMALLEST_IMAGE]
        for scene in large_enough[:rows]:
            H, W = (min(side, length) // 32 * 32 for length in scene.label.shape)
            top, left = (scene.label.shape[0] - H) // 2, (scene.label.shape[1] - W) // 2
            image = scene.image[top : top + H, left : left + W]
            truth = scene.label[top : top + H, left : left + W]
            images = torch.tensor(image).to(self.device).permute(2, 0, 1)[None].float()
            labels = torch.tensor(truth)[None].to(self.device)
            output = self.model(images)
            gate = reliability(output.cnn_logits, output.transformer_logits, labels)
            cnn, transformer = (
                torch.nn.functional.interpolate(z, (H, W), mode="bilinear")[0].argmax(0)
                for z in (output.cnn_logits, output.transformer_logits)
            )
            maps = (m.cpu().numpy().astype(np.uint8) for m in (cnn, transformer))
            found.append(pictures.Sample(image, truth, *maps, gate[0].cpu().numpy()))
        self.model.train()
        return found


class DivergedError(ArithmeticError):
    """Training cannot go on; the message says where and what to try."""


class StopSignal:
    """Remembers SIGINT or SIGTERM so that the step can end; a second one acts at once."""

    received = 0

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        print("\nfinishing this step, then saving (once more to quit at once)", file=sys.stderr)


# --- Parts --------------------------------------------------------------------------------------


def few_labels(dataset: Dataset, config: Config) -> list[Scene]:
    """Some scenes, cut to a square in the middle of each if asked."""
    first, side, K = config.labelled_from, config.labelled_side, len(dataset.classes.names)
    end = first + config.labelled if config.labelled else len(dataset.scenes)
    if not first < end <= len(dataset.scenes):
        raise cli.UsageError(
            f"--labelled {config.labelled} --labelled-from {first}, but there are "
            f"{len(dataset.scenes)} training scenes"
        )
    scenes = dataset.scenes[first:end]
    return [middle(scene, side, K) for scene in scenes] if side else scenes


def middle(scene: Scene, side: int, num_classes: int) -> Scene:
    """The square of `side` pixels in the middle of a scene, or what there is of it."""
    top, left = (max(0, (length - side) // 2) for length in scene.label.shape)
    area = np.s_[top : top + side, left : left + side]
    image, label = np.asarray(scene.image[area]), np.asarray(scene.label[area])
    cells = count_cells(label, num_classes)[..., :num_classes]
    return scene._replace(image=image, label=label, cells=cells)


def load_teacher(model: CTCLM, path: Path) -> None:
    """Give `model` the CNN of the run that wrote `path`; it will not learn."""
    state = checkpoint.read(path, "ctclm-training")["model"]
    weights = {key[4:]: value for key, value in state.items() if key.startswith("cnn.")}
    try:
        model.cnn.load_state_dict(weights)
    except RuntimeError:
        raise checkpoint.CheckpointError(
            f"{path}: has no CNN of this size; train it with the same --variant and --encoder"
        ) from None
    model.cnn.requires_grad_(False)


def make_optimizer(model: CTCLM, lr: float) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices and kernels, not on biases, norms and layer scales."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.dim() > 1]
    others = [p for p in learning if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def count(module: torch.nn.Module, side: int) -> dict:
    """Parameters, and multiply-adds for one image of side x side pixels."""
    training = module.training
    module.eval()
    device = next(module.parameters()).device
    one = (module.transformer or module.cnn) if isinstance(module, CTCLM) else module
    channels = one.normalise.mean.shape[1]
    counter = FlopCounterMode(display=False)
    # Two images (the projectors' statistics need them), a multiply-add is two operations. The
    # counter knows matrix products, not every fused attention.
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        output = module(torch.zeros(2, channels, side, side, device=device))
        if isinstance(module, CTCLM):
            module.shared_space(output)
    module.train(training)
    parameters = sum(p.numel() for p in module.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 4}


def line(row: dict, steps: int, seconds_left: float) -> str:
    """A report a person can read. T the Transformer, C the CNN, C>T the CNN teaches."""
    return (
        f"{row['step']:5d}/{steps}  total {row['total']:.2f}  "
        f"ce T {row['transformer_ce']:.2f} C {row['cnn_ce']:.2f}  "
        f"C>T {row['cnn_to_transformer']:.3f} T>C {row['transformer_to_cnn']:.3f}  "
        f"align {row['align']:.2f} region {row['region']:.2f} decor {row['decorrelation']:.2f}  "
        f"gate {row['gate']:.2f}  lr {row['lr']:.0e}  {row['images_per_s']:.0f} img/s  "
        f"data {row['data_wait']:.0%}  {cli.duration(seconds_left)} left"
    )


def panels(log: list[dict]) -> dict[str, list[pictures.Line]]:
    """What curves.png shows; the Transformer is blue and the CNN orange, as everywhere."""
    T, C = pictures.TRANSFORMER_COLOUR, pictures.CNN_COLOUR
    grey, Line = (110, 110, 110), pictures.Line
    shown = {
        "cross entropy on training windows": [
            Line("transformer_ce", "Transformer", T),
            Line("cnn_ce", "CNN", C),
        ],
        "validation mIoU": [
            Line("transformer_val_miou", "Transformer", T),
            Line("cnn_val_miou", "CNN", C),
        ],
        "transfer": [
            Line("cnn_to_transformer", "CNN teaches", C),
            Line("transformer_to_cnn", "Transformer teaches", T),
            Line("gate", "mean gate", grey),
        ],
    }
    if "cnn_rank_1" in log[0]:
        shown["effective rank of the shared space, stage 4"] = [
            Line("transformer_rank_4", "Transformer", T),
            Line("cnn_rank_4", "CNN", C),
        ]
    return shown


def machine(device: torch.device) -> dict:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": pillow_version,
    }


def write_csv(log: list[dict], path: Path) -> None:
    if log:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, log[0].keys())
            writer.writeheader()
            writer.writerows(log)


def write_json(entry: dict, path: Path) -> None:
    path.write_text(json.dumps(entry, indent=1) + "\n")


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    run = Run(config)
    write_json(config.saved(), config.out / "config.json")
    for name, dataset in (("train", run.train_set), ("val", run.val_set)):
        pixels = sum(scene.label.size for scene in dataset.scenes)
        print(f"{name}: {len(dataset.scenes)} scenes, {pixels / 1e6:.1f} million pixels")
        for note in dataset.notes:
            print(f"  note: {note}")
    if rare := [run.train_set.classes.names[places.k] for places in run.windows.places]:
        print(f"{run.windows.rare:.0%} of windows are drawn around rare classes: {', '.join(rare)}")
    for name, cost in run.describe().items():
        print(
            f"{name}: {cost['parameters']:,} parameters, "
            f"{cost['multiply_adds'] / 1e6:,.0f} million multiply-adds per "
            f"{config.crop} x {config.crop} window"
        )
    try:
        run.fit()
    except DivergedError as error:
        sys.exit(f"train.py: {error}")
    run.finish()
    name = next(iter(run.students))
    print(f"\nthe {name} was best at step {run.best['step']}; on the validation split it scores\n")
    print(table(run.best, run.val_set.classes))
    print(f"\n{config.out}: {', '.join(sorted(path.name for path in config.out.iterdir()))}")


if __name__ == "__main__":
    cli.run(main, DataError, checkpoint.CheckpointError)
