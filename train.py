"""Train both branches; keep the Transformer.

    python train.py                                     # toy scenes, minutes on a CPU
    python train.py --data folder --root MY_DATA --out runs/mine
    python train.py --out runs/mine --resume            # config.json has the other options
    torchrun --nproc-per-node 8 train.py ...            # eight GPUs, one batch (support/ranks.py)

A run writes config.json, log.csv, metrics.json, curves.png, samples.png, story.png (who taught whom
over training), last.pt (all that it needs to go on), previous.pt (the one before) and best.pt (the
Transformer alone, at its best validation mIoU). Ctrl-C and SIGTERM finish the step, save, and exit.

The windows depend on the seed and the step alone, and there is no randomness in the model. So a
run resumed on the same CPU, or GPU with our kernels, ends with the bits of one never stopped.

Letters: B batch, C channels, H W pixels, K classes.
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

import data
from ctclm import CTCLM, SMALLEST_IMAGE, VARIANTS, Losses, ModelConfig, Output, ramp_up
from data import DATA_SETS, Dataset, Scene, Windows, load, prefetch
from infer import evaluate, save_transformer
from kernels import computes_bf16, force, gate, has_kernels, upsample
from kernels.distill import TRANSFERS
from support import checkpoint, cli, diagnostics, machine, memory, pictures, pretrained, resume
from support.about import About
from support.audit import require_trainable
from support.gradients import DivergedError, require_finite
from support.labels import MAX_UNKNOWN
from support.layouts import BANDS
from support.progress import Interval, LiveLine, Pace, Progress
from support.protocols import table
from support.ranks import ALONE, Ranks, StalledError
from support.raster import DataError
from support.replay import Replayed, replayed_on
from support.tensorboard import Board, find_writer


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
    batch: int = cli.option(8, "windows per step, of all processes together")
    accumulate: int = cli.option(
        1, "equal parts in which a batch is encoded: less memory, the same gradients"
    )
    crop: int = cli.option(128, "side of a window in pixels, a multiple of 32")
    lr: float = cli.option(3e-3, "highest learning rate; warm-up, then cosine to zero")
    class_weights: Literal["off", "auto"] = cli.option("off", "auto: rare classes count for more")
    transfer: Literal[*TRANSFERS] = cli.option(
        "selective", "who teaches whom; selective: weighted by the gate at each pixel"
    )
    align: Literal["on", "off"] = cli.option("on", "the shared representation space")
    encoder: Literal["multiscale", "plain"] = cli.option("multiscale", "the CNN's blocks")
    pretrained: Path = cli.option(None, "weights to start from: SegFormer's, a best.pt, a last.pt")
    validations: int = cli.option(6, "how often to validate")
    out: Path = cli.option(Path("runs/toy"), "the run's folder")
    resume: bool = cli.option(False, "continue the run in --out")
    seed: int = cli.option(0, "of initial weights and windows")
    precision: Literal["auto", "fp32", "bf16"] = cli.option("auto", "auto: bf16 on a GPU")
    compile: bool = cli.option(False, "by torch.compile: minutes at the start, then faster steps")
    device: Literal["auto", "cpu", "cuda"] = cli.option("auto", "where to train")
    tensorboard: bool = cli.option(False, "write OUT/tensorboard too, where TensorBoard is")

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "crop", "lr", "validations"):
            value = getattr(self, name)
            cli.require(value > 0, f"{cli.flag(name)} must be positive; got {value}")
        cli.require(self.crop % 32 == 0, f"--crop must be a multiple of 32; got {self.crop}")
        # A single position at stride 32 has no variance.
        cli.require(self.batch * self.crop**2 > 32**2, "--batch 1 needs --crop 64 or more")
        # Said before the training scenes are made.
        cli.require(self.data != "toy" or not self.val_tiles, "--data toy has no tiles to choose")
        for name in ("rare_class_fraction", "max_unknown"):
            is_share = (value := getattr(self, name)) is None or 0 <= value <= 1
            cli.require(is_share, f"{cli.flag(name)} is a share, 0 to 1; got {value}")
        cli.require(0 <= self.seed < 2**63, f"--seed must be at least 0; got {self.seed}")
        if self.tensorboard:
            find_writer()

    def saved(self) -> dict:
        """What is run, as plain types: not where, and not whether it is resumed."""
        return resume.what_is_run(self)


# --- The run --------------------------------------------------------------------------------------

REPORTS, SECONDS_PER_SAVE = 30, 600.0  # so many at most; what a run that is killed loses at most


class Run:
    """One training run: a model, the windows it sees, and what has happened so far.

    The model is a CTCLM, or anything else with its `config`, `branches`, `projectors`,
    `shared_space` and `objective`: the controls of experiments/settings.py use the same loop.
    """

    def __init__(self, config: Config, model: nn.Module, windows: Windows, val_set, ranks=ALONE):
        self.config, self.windows, self.val_set, self.ranks = config, windows, val_set, ranks
        self.device = machine.pick_device(config.device)
        self.model, on_gpu = model.to(self.device), self.device.type == "cuda"
        self.optimizer = make_optimizer(model, config.lr, on_gpu)
        bf16 = {"auto": computes_bf16(self.device), "bf16": True, "fp32": False}[config.precision]
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        memory.encode_in_parts(model.branches.values(), config.accumulate)
        ranks.share_batch(model)
        self.forward = torch.compile(self.loss) if config.compile else self.loss
        self.one_update = Replayed(self.update, ranks.count == 1) if on_gpu else self.update
        torch.backends.cudnn.deterministic = True  # the same bits in every run
        self.norms: list[torch.Tensor] = []  # of gradients since the last check
        self.history: list[Losses] = []  # of the steps since the last report
        self.log, self.best = [], {"miou": -1.0}  # reports; the deployed branch's best validation
        self.step, self.seconds = 0, 0.0  # done so far, over all resumptions

    # --- One step ---

    def train_step(self, images: np.ndarray, labels: np.ndarray) -> Losses:
        """One update by images (B, C, H, W) and labels (B, H, W), uint8 both -> its losses.

        On a GPU nothing waits: the next `check_gradients` looks at its gradients. On a CPU it looks
        at once, and raises DivergedError when one is not finite. Weights are then as before.
        """
        inputs = (torch.from_numpy(images), torch.from_numpy(labels))
        numbers = self.learning_rate(self.step), ramp_up(self.step, self.config.steps)
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
            output, losses = self.forward(images, labels, ramp)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.ranks.average(p.grad for p in self.model.parameters() if p.grad is not None)
        norms = self.clip_gradients()
        skip = (~norms.isfinite().all()).float()  # on a CPU AdamW takes long to look: only if so
        self.optimizer.found_inf = skip if self.device.type == "cuda" or skip else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return output, torch.stack(losses).detach(), norms

    def loss(self, images, labels, ramp) -> tuple[Output, Losses]:
        output = self.model(images.float(memory_format=torch.channels_last))
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
        what = f"the {self.config.batch} windows of that step, seed {self.config.seed}"
        require_finite(recent, [*self.parts()], self.step - len(recent), what)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over a twentieth of the run, then cosine to zero."""
        c, warm_up = self.config, max(1, self.config.steps // 20)
        if step < warm_up:
            return c.lr * (step + 1) / warm_up
        t = (step - warm_up) / max(1, c.steps - warm_up)
        return c.lr * 0.5 * (1 + math.cos(math.pi * t))

    # --- The loop ---

    def fit(self) -> None:
        """Train from self.step to the end; report, validate, save. A stop signal saves first.

        Reports and validations go by steps, so a resumed run has the log of a whole one. The live
        line goes by time, and so do saves between validations.
        """
        c, before = self.config, self.seconds
        report_every = math.ceil(c.steps / REPORTS)  # up: no report covers only a few steps
        validate_every = report_every * math.ceil(REPORTS / c.validations)
        validations = math.ceil(c.steps / validate_every) - self.step // validate_every
        guess = diagnostics.steps_per_validation(self.val_set.scenes, c.batch * c.crop**2)
        pace = Pace(c.steps - self.step, validations, guess / self.ranks.count)
        threads = 1 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        batches = prefetch(self.windows, range(self.step, c.steps), threads)
        shown = c.tensorboard and self.ranks.is_first
        board = Board(c.out / "tensorboard", self.step) if shown else None
        begin = saved = time.perf_counter()
        print(diagnostics.LEGEND + diagnostics.COMPILING * has_kernels(self.device))
        with cli.StopSignal(self.ranks.count > 1) as stop, LiveLine() as live:
            for _, images, labels, waited in batches:
                losses = self.train_step(images, labels)
                self.history.append(losses)
                pace.step(waited)
                done = self.step == c.steps
                report = self.step % report_every == 0 or done
                validate = self.step % validate_every == 0 or done
                if report:
                    live.clear()
                    row = self.report(pace.report())
                    print(diagnostics.line(row, c.steps, pace.seconds_left()), flush=True)
                if validate:
                    self.validate()
                    pace.validation()
                if report and board:
                    board.add(self.log[-1])
                now = time.perf_counter()
                self.seconds = before + now - begin
                stopped = self.ranks.agree(stop.received)
                if validate or stopped or now - saved > SECONDS_PER_SAVE:
                    self.save()
                    saved = now
                if stopped and not done:
                    self.ranks.agree(0)  # that rank 0 has saved
                    print(f"interrupted: saved at step {self.step}; add --resume to go on")
                    sys.exit(128 + stopped)
                if not done and live.is_due():
                    live.show(diagnostics.live_line(self.step, c.steps, losses, pace))

    @torch.no_grad()
    def report(self, since: Interval) -> dict:
        """One row of the log: means of the steps since the last one."""
        self.check_gradients()
        terms = torch.stack([torch.stack([*losses]) for losses in self.history]).mean(0)
        self.history = []
        row = {"step": self.step} | dict(zip(Losses._fields, terms.tolist(), strict=True))
        last, images = self.step - 1, since.steps * self.config.batch
        row |= {"ramp": ramp_up(last, self.config.steps), "lr": self.learning_rate(last)}
        row |= {"images_per_s": images / since.seconds, "data_wait": since.waited / since.seconds}
        K = len(self.val_set.classes.names)
        if isinstance(self.model, CTCLM):
            with self.autocast:
                projections = self.model.shared_space(self.last_output)
            seen = opinions(self.model, self.last_output, self.last_labels)
            row |= diagnostics.statistics(*seen, K)
            row |= diagnostics.shared_space_statistics(projections)
        for name in ("transformer", "cnn"):
            row |= diagnostics.score_columns(name, None, [None] * K)  # until `validate`
        self.log.append(row)
        return row

    def validate(self) -> None:
        """Score the branches on whole validation scenes; keep the Transformer if it is better."""
        scores = self.evaluate(self.val_set)
        for name, result in scores.items():
            self.log[-1] |= diagnostics.score_columns(name, result["miou"], result["iou"])
        deployed, *others = scores
        is_best = scores[deployed]["miou"] > self.best["miou"]
        shown = [f"{name} {100 * result['miou']:.1f} %" for name, result in scores.items()]
        shown += ["the best so far"] * is_best
        print(f"      validation mIoU: {', '.join(shown)}", flush=True)
        if is_best:
            self.best = scores[deployed] | {"step": self.step} | {k: scores[k] for k in others}
        if not self.ranks.is_first:
            return
        if is_best and deployed == "transformer":
            (classes, _, _, bands, stretch), source = self.val_set, self.config.data
            about = About(classes, source, bands, self.step, self.best["miou"], stretch)
            save_transformer(self.model, self.config.out / "best.pt", about)
        self.draw()

    def evaluate(self, dataset: Dataset) -> dict[str, dict]:
        """The scores of each branch as it is now, on whole scenes, in float32."""
        self.model.eval()
        scores = {}
        options = {"device": self.device, "ranks": self.ranks}
        for name, branch in self.model.branches.items():
            with Progress(f"scoring the {name}") as shown:
                scores[name] = evaluate(replayed_on(self.device, branch), dataset, shown, **options)
        self.model.train()
        return scores

    def save(self) -> None:
        """last.pt (what was last.pt is previous.pt), log.csv."""
        self.check_gradients()
        if self.ranks.is_first:
            out, columns = self.config.out, self.log[0] if self.log else []
            checkpoint.save_newest(resume.state_of(self), out)
            checkpoint.save_csv(self.log, columns, out / "log.csv")

    def restore(self) -> None:
        """Go on where the run was last saved; raises UsageError when it was with other options."""
        state = self.ranks.from_first(lambda: checkpoint.read_newest(self.config.out))
        if state:  # else it was stopped before it was saved for the first time
            resume.put_back(self, state)

    @cached_property
    def cost(self) -> dict:
        """Parameters and multiply-adds of what is trained and of what is deployed."""
        shape = (self.windows.scenes[0].image.shape[2], self.config.crop, self.config.crop)
        with force("pytorch"):  # the counter does not know our kernels
            return diagnostics.cost(self.model, shape)

    def draw(self) -> None:
        """curves.png, story.png, samples.png: the run so far."""
        classes, is_ctclm = self.val_set.classes, isinstance(self.model, CTCLM)
        drawn = diagnostics.pictures_of(self.log, classes if is_ctclm else None)
        if is_ctclm and (rows := samples(self.model, self.val_set.scenes)):
            drawn["samples"] = pictures.samples(rows, classes)
        for name, picture in drawn.items():
            checkpoint.save_picture(picture, self.config.out / f"{name}.png")

    def finish(self) -> None:
        """metrics.json."""
        best, cnn = {k: v for k, v in self.best.items() if k != "cnn"}, self.best.get("cnn")
        entry = {"validation": best, "cnn_validation": cnn, "cost": self.cost}
        entry |= {"training_seconds": round(self.seconds, 1)}
        about, peak = machine.describe(self.device), memory.peak_bytes(self.device)
        entry |= {"machine": about, "peak_memory_bytes": peak}
        if self.ranks.is_first:
            checkpoint.save_json(entry, self.config.out / "metrics.json")


# --- Its parts ------------------------------------------------------------------------------------


def prepare(config: Config, ranks: Ranks = ALONE) -> Run:
    """The run that the options describe: folder, data, model, and what a resumed one has done."""
    goes_on = config.resume and ranks.from_first(lambda: checkpoint.was_saved(config.out))
    starts = config.pretrained and not goes_on  # a run that goes on has weights of its own
    weights = starts and pretrained.read(config.pretrained).of(config.variant, VARIANTS)
    machine.pick_device(config.device)  # or a UsageError, before anything is read or made
    share = ranks.share_of_batch(config.batch)
    memory.require_equal_parts(share, config.accumulate)
    ranks.from_first(lambda: checkpoint.prepare_folder(config.out, config.resume))
    train_set, val_set = load_data(config)
    torch.manual_seed(config.seed)
    size = len(train_set.classes.names), train_set.scenes[0].image.shape[2]
    settings = config.encoder, config.transfer, config.align == "on"
    balance = data.class_weights(train_set.scenes) if config.class_weights == "auto" else None
    model = CTCLM(ModelConfig(config.variant, *size, *settings, class_weights=balance))
    if weights:
        print(*pretrained.start_both(model, weights, train_set), sep="\n")
    run = Run(config, model, make_windows(config, train_set.scenes, ranks=ranks), val_set, ranks)
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
    require_trainable(train_set, val_set, config.root)
    return train_set, val_set


def make_windows(config: Config, scenes: list[Scene], augment=True, ranks=ALONE) -> Windows:
    """Of this process: its share of the batch."""
    fraction = config.rare_class_fraction
    fraction = data.default_rare_class_fraction(scenes) if fraction is None else fraction
    size = (config.crop, ranks.share_of_batch(config.batch), config.seed, ranks.rank)
    return Windows(scenes, *size, rare_class_fraction=fraction, augment=augment)


def make_optimizer(model: nn.Module, lr: float, capturable: bool) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices and kernels, not on biases, norms and layer scales."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.dim() > 1]
    others = [p for p in learning if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True, capturable=capturable)


def opinions(model: CTCLM, output: Output, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Classes of the CNN and of the Transformer, the gate, and labels, (B, H, W) each."""
    logits = output.cnn_logits.float(), output.transformer_logits.float()
    labels = labels.to(logits[0].device)
    cnn, transformer = (upsample(z, labels.shape[1:]).argmax(1) for z in logits)
    options = {"kappa": model.config.kappa, "class_weights": model.class_weights}
    return cnn, transformer, gate(*logits, labels, **options), labels


@torch.no_grad()
def samples(model: CTCLM, scenes: list[Scene]) -> list[pictures.Sample]:
    """The middle of some scenes, seen by both branches as they are now."""
    model.eval()
    device, found = next(model.parameters()).device, []
    for image, label in pictures.middles(scenes, SMALLEST_IMAGE):
        images = torch.tensor(image).to(device).permute(2, 0, 1)[None].float()
        seen = opinions(model, model(images), torch.tensor(label)[None])
        cnn, transformer, r, truth = (x[0].cpu().numpy() for x in seen)
        found.append(pictures.Sample(image, truth, cnn, transformer, r))
    model.train()
    return found


def main(arguments: list[str]) -> None:
    machine.keep_freed_memory()
    ranks = Ranks.join()
    config = ranks.from_first(lambda: resume.parse(Config, arguments, __doc__.partition("\n")[0]))
    run = prepare(config, ranks)
    classes, windows, out = run.val_set.classes, run.windows, config.out
    if rare := ", ".join(classes.names[pixels.k] for pixels in windows.rare_classes):
        print(f"{windows.rare_class_fraction:.0%} of windows are drawn around rare classes: {rare}")
    print(f"{diagnostics.cost_lines(run.cost, config.crop)}\non {machine.name_of(run.device)}")
    ranks.from_first(lambda: checkpoint.save_json(resume.options(config), out / "config.json"))
    try:
        run.fit()
    except DivergedError as error:
        sys.exit(f"train.py: {error}")
    except RuntimeError as error:
        raise memory.explained(error, run) from None
    run.finish()
    step, scores = run.best["step"], table(run.best, classes)
    print(f"\nthe Transformer was best at step {step}; on validation it scores, in %:\n\n{scores}")
    print(f"\n{out}: {', '.join(sorted(path.name for path in out.glob('*')))}")


if __name__ == "__main__":
    cli.run(main, DataError, checkpoint.CheckpointError, StalledError)
