"""Train both branches; keep the Transformer.

    python train.py                                     # toy scenes, minutes on a CPU
    python train.py --data folder --root MY_DATA --out runs/mine
    python train.py --data folder --root MY_DATA --out runs/mine --resume

A run writes config.json, log.csv, metrics.json, curves.png, samples.png, story.png (who taught whom
over training), last.pt (everything that is needed to go on) and best.pt (the Transformer alone, at
its best validation mIoU: this is what people pass on). Ctrl-C and SIGTERM finish the step, save,
and exit.

The windows depend on the seed and the step alone, and there is no randomness in the model. So a
run resumed on the same device ends, bit for bit, as one that was never stopped.

Letters: B batch, C channels, H W pixels, K classes.
"""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from ctclm import CTCLM, SMALLEST_IMAGE, Losses, ModelConfig, Output, ramp_up
from data import DATA_SETS, Dataset, Scene, Windows, default_rare_class_fraction, load, prefetch
from infer import About, evaluate, save_transformer
from kernels import force, gate, upsample
from kernels.distill import TRANSFERS
from support import checkpoint, cli, diagnostics, machine, pictures
from support.labels import MAX_UNKNOWN
from support.layouts import BANDS, IGNORE
from support.progress import Progress
from support.protocols import table
from support.raster import DataError
from support.replay import Replayed, ReplayedShapes


@dataclass
class Config:
    data: Literal[*DATA_SETS] = cli.option("toy", "data set")
    root: Path = cli.option(None, "the data set's folder (toy needs none)")
    train_tiles: tuple[str, ...] = cli.option((), "train on these tiles only, by name")
    val_tiles: tuple[str, ...] = cli.option((), "validate on these tiles only, by name")
    bands: Literal["auto", *BANDS] = cli.option("auto", "where the publisher has several")
    max_unknown: float = cli.option(MAX_UNKNOWN, "share of a label whose colour may be no class")
    stretch: tuple[float, ...] = cli.option((), "for images of 16 bits: LOW HIGH in per cent")
    cache: Path = cli.option(None, "decoded images, for several runs (OUT/cache for this one)")
    rare_class_fraction: float = cli.option(
        None, "share of windows around a pixel of a rare class (0.25 if one has under 1 %%, else 0)"
    )
    variant: Literal["tiny", "b0", "b1", "b2"] = cli.option("tiny", "size of both branches")
    steps: int = cli.option(1200, "optimiser steps")
    batch: int = cli.option(8, "windows per step")
    crop: int = cli.option(128, "side of a window in pixels, a multiple of 32")
    lr: float = cli.option(3e-3, "highest learning rate; warm-up, then cosine to zero")
    transfer: Literal[*TRANSFERS] = cli.option(
        "selective", "who teaches whom; selective: weighted by the gate at each pixel"
    )
    align: Literal["on", "off"] = cli.option("on", "the shared representation space")
    encoder: Literal["multiscale", "plain"] = cli.option("multiscale", "the CNN's blocks")
    validations: int = cli.option(6, "how often to validate")
    out: Path = cli.option(Path("runs/toy"), "the run's folder")
    resume: bool = cli.option(False, "continue the run in --out")
    seed: int = cli.option(0, "of initial weights and windows")
    precision: Literal["auto", "fp32", "bf16"] = cli.option("auto", "auto: bf16 on a GPU")
    compile: bool = cli.option(False, "by torch.compile: minutes at the start, then faster steps")
    device: Literal["auto", "cpu", "cuda"] = cli.option("auto", "where to train")

    def __post_init__(self):
        for name in ("steps", "batch", "crop", "lr", "validations"):  # the last step is validated
            value = getattr(self, name)
            cli.require(value > 0, f"{cli.flag(name)} must be positive; got {value}")
        cli.require(self.crop % 32 == 0, f"--crop must be a multiple of 32; got {self.crop}")
        # A single position at stride 32 has no variance.
        cli.require(self.batch * self.crop**2 > 32**2, "--batch 1 needs --crop 64 or more")
        # Said before the training scenes are made.
        cli.require(self.data != "toy" or not self.val_tiles, "--data toy has no tiles to choose")
        for name in ("rare_class_fraction", "max_unknown"):
            value = getattr(self, name)
            is_share = value is None or 0 <= value <= 1
            cli.require(is_share, f"{cli.flag(name)} is a share, 0 to 1; got {value}")
        cli.require(0 <= self.seed < 2**63, f"--seed must be at least 0; got {self.seed}")

    def saved(self) -> dict:
        """As plain types. Where to run and whether to resume are not part of what was run."""
        plain = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(self).items()}
        plain |= {key: list(plain[key]) for key in ("train_tiles", "val_tiles", "stretch")}
        return {k: v for k, v in plain.items() if k not in ("out", "resume", "device", "cache")}


# --- The run --------------------------------------------------------------------------------------

REPORTS, REPORTS_PER_SAVE = 30, 5  # a run has at most 30 reports and saves 6 times


class Run:
    """One training run: a model, the windows it sees, and what has happened so far.

    The model is a CTCLM, or anything else with its `config`, `branches`, `projectors`,
    `shared_space` and `objective`: the controls of experiments/settings.py use the same loop.
    """

    def __init__(self, config: Config, model: nn.Module, windows: Windows, val_set: Dataset):
        self.config, self.windows, self.val_set = config, windows, val_set
        self.device = machine.pick_device(config.device)
        self.model, on_gpu = model.to(self.device), self.device.type == "cuda"
        self.optimizer = make_optimizer(model, config.lr, on_gpu)
        bf16 = {"auto": on_gpu, "bf16": True, "fp32": False}[config.precision]
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.forward = torch.compile(self.loss) if config.compile else self.loss
        self.one_update = Replayed(self.update) if on_gpu else self.update
        torch.backends.cudnn.deterministic = True  # the same bits in every run
        self.norms: list[torch.Tensor] = []  # of gradients since the last check
        self.log, self.best = [], {"miou": -1.0}  # reports; the deployed branch's best validation
        self.step, self.seconds = 0, 0.0  # done so far, over all resumptions

    # --- One step ---

    def train_step(self, images: np.ndarray, labels: np.ndarray) -> Losses:
        """One update by images (B, C, H, W) and labels (B, H, W), uint8 both -> its losses.

        On a GPU nothing waits: the next `check_gradients` looks at its gradients. On a CPU it looks
        at once, and raises DivergedError when one is not finite. Weights are then as before.
        """
        inputs = (torch.from_numpy(images), torch.from_numpy(labels))
        numbers = self.learning_rate(), ramp_up(self.step, self.config.steps)
        if self.device.type == "cuda":  # a number in a graph is a tensor, or it is a constant
            inputs = [x.pin_memory() for x in (*inputs, *map(torch.tensor, numbers))]
        else:
            inputs += numbers
        self.last_output, losses, norms = self.one_update(*inputs)
        self.last_labels, losses = inputs[1], Losses(*losses.clone())  # a replay overwrites them
        self.norms.append(norms.clone())
        self.step += 1
        if self.device.type != "cuda":
            self.check_gradients()
        return losses

    def update(self, images, labels, lr, ramp) -> tuple[Output, torch.Tensor, torch.Tensor]:
        """Forward, objective, backward, clip, AdamW -> output, losses (9,), norms of gradients.
        AdamW skips an update with a gradient that is not finite: nothing is read back from a GPU.
        """
        with self.autocast:
            output, losses = self.forward(images.float(), labels, ramp)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norms = self.clip_gradients()
        skip = (~norms.isfinite().all()).float()  # on a CPU AdamW takes long to look: only if so
        self.optimizer.found_inf = skip if self.device.type == "cuda" or skip else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return output, torch.stack(losses).detach(), norms

    def loss(self, images, labels, ramp) -> tuple[Output, Losses]:
        output = self.model(images)
        return output, self.model.objective(output, labels, ramp)

    def parts(self) -> dict[str, nn.Module]:
        """What gradients are clipped for apart from each other: a spike in one slows no other."""
        parts = self.model.branches | {"projectors": self.model.projectors}
        return {name: part for name, part in parts.items() if list(part.parameters())}

    def clip_gradients(self, largest: float = 1.0) -> torch.Tensor:
        """Each part's to a norm of `largest`; returns the norms before, (number of parts,)."""
        norms = (nn.utils.clip_grad_norm_(p.parameters(), largest) for p in self.parts().values())
        return torch.stack([*norms])

    def check_gradients(self) -> None:
        """DivergedError for the first step since the last call whose gradient was not finite."""
        recent, self.norms = self.norms, []
        for step, norms in enumerate(recent, self.step - len(recent)):
            for name, norm in zip(self.parts(), norms.tolist(), strict=True):
                if not math.isfinite(norm):
                    raise DivergedError(
                        f"the gradient of the {name} is not finite at step {step} (windows "
                        f"0..{self.config.batch - 1} of that step, seed {self.config.seed}); the "
                        f"weights were left as they are in last.pt; try a lower --lr"
                    )

    def learning_rate(self) -> float:
        """Linear warm-up over a twentieth of the run, then cosine to zero."""
        c, warm_up = self.config, max(1, self.config.steps // 20)
        if self.step < warm_up:
            return c.lr * (self.step + 1) / warm_up
        t = (self.step - warm_up) / max(1, c.steps - warm_up)
        return c.lr * 0.5 * (1 + math.cos(math.pi * t))

    # --- The loop ---

    def fit(self) -> None:
        """Train from self.step to the end; report, validate, save. A stop signal saves first."""
        steps = self.config.steps
        report_every = math.ceil(steps / REPORTS)  # up: no report covers only a few steps
        save_every = report_every * REPORTS_PER_SAVE  # multiples, so that a report is at hand
        validate_every = report_every * max(1, REPORTS // self.config.validations)
        threads = 1 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        history, waited, before, first = [], 0.0, self.seconds, self.step
        begin = since = time.perf_counter()
        print(diagnostics.LEGEND)
        with cli.StopSignal() as stop:
            for _, images, labels, wait in prefetch(self.windows, range(first, steps), threads):
                history.append(self.train_step(images, labels))
                waited += wait
                done = self.step == steps
                if (report := self.step % report_every == 0 or done) or stop.received:
                    self.check_gradients()
                if report:
                    now = time.perf_counter()
                    row = self.report(history, waited, now - since)
                    left = (now - begin) / (self.step - first) * (steps - self.step)
                    print(diagnostics.line(row, steps, left), flush=True)
                    history, waited = [], 0.0
                self.seconds = before + time.perf_counter() - begin
                if self.step % validate_every == 0 or done:
                    self.validate()
                if self.step % save_every == 0 or done:
                    self.save()
                if report:
                    since = time.perf_counter()
                if stop.received and not done:
                    self.save()
                    print(f"interrupted: saved at step {self.step}; add --resume to go on")
                    sys.exit(128 + stop.received)

    @torch.no_grad()
    def report(self, history: list[Losses], waited: float, seconds: float) -> dict:
        """One row of the log: means since the last one."""
        terms = torch.stack([torch.stack(losses) for losses in history]).mean(0)
        row = {"step": self.step} | dict(zip(Losses._fields, terms.tolist(), strict=True))
        row |= {"ramp": ramp_up(self.step, self.config.steps), "lr": self.learning_rate()}
        row["images_per_s"] = len(history) * self.config.batch / seconds
        row["data_wait"] = waited / seconds
        if isinstance(self.model, CTCLM):
            with self.autocast:
                projections = self.model.shared_space(self.last_output)
            seen = opinions(self.last_output, self.last_labels.to(self.device))
            row |= diagnostics.statistics(*seen, len(self.val_set.classes.names))
            row |= diagnostics.shared_space_statistics(projections)
        row |= {"transformer_val_miou": None, "cnn_val_miou": None}
        self.log.append(row)
        return row

    def validate(self) -> None:
        """Score the branches on whole validation scenes; keep the Transformer if it is better."""
        scores = self.evaluate(self.val_set)
        for name, result in scores.items():
            self.log[-1][f"{name}_val_miou"] = result["miou"]
        deployed, *others = scores
        is_best = scores[deployed]["miou"] > self.best["miou"]
        shown = (f"{name} {100 * result['miou']:.1f} %" for name, result in scores.items())
        best = ", the best so far" if is_best else ""
        print(f"      validation mIoU: {', '.join(shown)}{best}", flush=True)
        if is_best:
            self.best = scores[deployed] | {"step": self.step} | {k: scores[k] for k in others}
            if deployed == "transformer":
                data, (classes, _, _, bands, stretch) = self.config.data, self.val_set
                about = About(classes, data, bands, self.step, self.best["miou"], stretch)
                save_transformer(self.model, self.config.out / "best.pt", about)

    def evaluate(self, dataset: Dataset) -> dict[str, dict]:
        """The scores of each branch as it is now, on whole scenes, in float32."""
        self.model.eval()
        scores = {}
        for name, branch in self.model.branches.items():
            if self.device.type == "cuda":
                branch = ReplayedShapes(branch)
            with Progress(f"scoring the {name}") as progress:
                scores[name] = evaluate(branch, dataset, progress, device=self.device)
        self.model.train()
        return scores

    # --- Before and after ---

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
        checkpoint.save_csv(self.log, self.log[0] if self.log else [], self.config.out / "log.csv")

    def restore(self) -> None:
        """Go on where last.pt was written; raises UsageError when it was with other options."""
        out, state = self.config.out, checkpoint.read(self.config.out / "last.pt", "ctclm-training")
        cli.require_same(self.config.saved(), state["config"], f"{out}: was started", "resume it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["capturable"] = self.device.type == "cuda"  # now, not where it was saved
        self.step, self.log, self.best = state["step"], state["log"], state["best"]
        self.seconds = state["seconds"]

    def cost(self) -> dict:
        """Parameters and multiply-adds of what is trained and of what is deployed."""
        shape = (self.windows.scenes[0].image.shape[2], self.config.crop, self.config.crop)
        with force("pytorch"):  # the counter does not know our kernels
            return diagnostics.cost(self.model, shape)

    def finish(self) -> None:
        """metrics.json, curves.png, story.png, samples.png."""
        out, classes, about = self.config.out, self.val_set.classes, machine.describe(self.device)
        entry = {"validation": {k: v for k, v in self.best.items() if k != "cnn"}}
        entry |= {"cnn_validation": self.best.get("cnn"), "cost": self.cost()}
        entry |= {"training_seconds": round(self.seconds, 1), "machine": about}
        checkpoint.save_json(entry, out / "metrics.json")
        log = diagnostics.in_per_cent(self.log)
        pictures.curves(log, diagnostics.training_panels(log)).save(out / "curves.png")
        if isinstance(self.model, CTCLM):
            panels = diagnostics.teaching_panels(log, classes)
            pictures.curves(diagnostics.smooth(log), panels).save(out / "story.png")
            if rows := samples(self.model, self.val_set.scenes):
                pictures.samples(rows, classes).save(out / "samples.png")


class DivergedError(ArithmeticError):
    """Training cannot go on; the message says where and what to try."""


# --- Its parts ------------------------------------------------------------------------------------


def prepare(config: Config) -> Run:
    """The run that the options describe: folder, data, model, and what a resumed one has done."""
    checkpoint.prepare_folder(config.out, config.resume)
    train_set, val_set = load_data(config)
    torch.manual_seed(config.seed)
    model = CTCLM(
        ModelConfig(
            variant=config.variant,
            num_classes=len(train_set.classes.names),
            in_channels=train_set.scenes[0].image.shape[2],
            encoder=config.encoder,
            transfer=config.transfer,
            align=config.align == "on",
        )
    )
    run = Run(config, model, make_windows(config, train_set.scenes), val_set)
    if config.resume:
        run.restore()
    return run


def load_data(config: Config) -> tuple[Dataset, Dataset]:
    """The training and the validation split; raises DataError where training would be wrong."""
    options = {"cache": config.cache or config.out / "cache", "max_unknown": config.max_unknown}
    options |= {"bands": None if config.bands == "auto" else config.bands}
    options |= {"stretch": config.stretch}
    train_set = load(config.data, config.root, "train", config.train_tiles, **options)
    options |= {"bands": train_set.bands, "stretch": train_set.stretch}
    val_set = load(config.data, config.root, "val", config.val_tiles, **options)
    both = {s.path for s in train_set.scenes} & {s.path for s in val_set.scenes}
    if both - {None}:  # toy scenes have no file
        where = "in the training and in the validation set; choose with --val-tiles"
        raise DataError(f"{sorted(both)[0]}: is {where}")
    for split, dataset in (("train", train_set), ("val", val_set)):
        labels = [scene.label for scene in dataset.scenes]
        if not any(label is not None and (label != IGNORE).any() for label in labels):
            raise DataError(f"{config.root}: no pixel of the {split} split has a label")
        pixels = sum(label.size for label in labels)
        print(f"{split}: {len(labels)} scenes, {pixels / 1e6:.1f} million pixels")
        for note in dataset.notes:
            print(f"  note: {note}")
    return train_set, val_set


def make_windows(config: Config, scenes: list[Scene], augment: bool = True) -> Windows:
    fraction = config.rare_class_fraction
    if fraction is None:
        fraction = default_rare_class_fraction(scenes)
    size = (config.crop, config.batch, config.seed)
    return Windows(scenes, *size, rare_class_fraction=fraction, augment=augment)


def make_optimizer(model: nn.Module, lr: float, capturable: bool) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices and kernels, not on biases, norms and layer scales."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.dim() > 1]
    others = [p for p in learning if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True, capturable=capturable)


# --- What is shown --------------------------------------------------------------------------------


def opinions(output, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Classes of the CNN and of the Transformer, the gate, and labels, (B, H, W) each."""
    logits = output.cnn_logits.float(), output.transformer_logits.float()
    size = labels.shape[1:]
    cnn, transformer = (upsample(z, size).argmax(1) for z in logits)
    return cnn, transformer, gate(*logits, labels), labels


@torch.no_grad()
def samples(
    model: CTCLM, scenes: list[Scene], rows: int = 3, side: int = 256
) -> list[pictures.Sample]:
    """The middle of some scenes, seen by both branches as they are now."""
    model.eval()
    device, found = next(model.parameters()).device, []
    large_enough = [s for s in scenes if min(s.label.shape) >= SMALLEST_IMAGE]
    for scene in large_enough[:rows]:
        H, W = (min(side, length) // 32 * 32 for length in scene.label.shape)
        top, left = (scene.label.shape[0] - H) // 2, (scene.label.shape[1] - W) // 2
        image = scene.image[top : top + H, left : left + W]
        images = torch.tensor(image).to(device).permute(2, 0, 1)[None].float()
        labels = torch.tensor(scene.label[top : top + H, left : left + W])[None].to(device)
        seen = [x[0].cpu().numpy() for x in opinions(model(images), labels)]
        cnn, transformer, r, truth = seen
        found.append(pictures.Sample(image, truth, cnn, transformer, r))
    model.train()
    return found


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    machine.keep_freed_memory()
    run = prepare(config)
    checkpoint.save_json(config.saved(), config.out / "config.json")
    classes, windows = run.val_set.classes, run.windows
    if rare := [classes.names[pixels.k] for pixels in windows.rare_classes]:
        share = f"{windows.rare_class_fraction:.0%}"
        print(f"{share} of windows are drawn around rare classes: {', '.join(rare)}")
    print(diagnostics.cost_lines(run.cost(), config.crop))
    try:
        run.fit()
    except DivergedError as error:
        sys.exit(f"train.py: {error}")
    run.finish()
    step = run.best["step"]
    print(f"\nthe Transformer was best at step {step}; on validation it scores, in %:\n")
    print(table(run.best, classes))
    print(f"\n{config.out}: {', '.join(sorted(path.name for path in config.out.iterdir()))}")


if __name__ == "__main__":
    cli.run(main, DataError, checkpoint.CheckpointError)
