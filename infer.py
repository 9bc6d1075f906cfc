"""Map whole images with the deployed Transformer, or score it on a data set.

    python infer.py runs/demo/best.pt scene.tif --out maps                  # class map and overlay
    python infer.py runs/demo/best.pt --data toy --split test               # scores
    python infer.py runs/p/best.pt --data potsdam --root DIR --split test --protocol all
    python infer.py runs/l/best.pt --data loveda --root DIR --submission loveda.zip
    python infer.py runs/p/best.pt --export model.pt2                       # for other programs

From Python:

    student = load_transformer("runs/demo/best.pt")             # images -> logits (B, K, H/4, W/4)
    for top, p in predict(student, open_rows("scene.tif")):     # p (K, rows, W), from top to bottom
        ...

A scene of any size is cut into overlapping windows. They are predicted in batches and blended where
the model is, so that only classes come back from a GPU (support/scenes.py). Of a TIFF in strips or
tiles a few rows are in memory at a time. The map of a TIFF is a TIFF with the same georeference.

Letters: B batch, C channels, H W pixels, K classes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ctclm import CTCLM, VARIANTS, Transformer
from data import DATA_SETS, Dataset, load
from kernels import force, upsample
from support import checkpoint, cli, pretrained
from support.about import About
from support.checkpoint import CheckpointError
from support.export import ENDINGS, export
from support.images import open_rows
from support.layouts import IGNORE, Classes, distinct_colours
from support.machine import keep_freed_memory, pick_device
from support.maps import MapFiles
from support.nodata import NO_ALPHA
from support.precision import Compiled, at_precision
from support.progress import Progress
from support.protocols import (
    GEOSEG_PATCH,
    MMSEG_CROP,
    Tally,
    geoseg_padding,
    protocol_table,
    require_loveda_test,
    require_protocol,
    table,
    write_submission,
)
from support.ranks import ALONE, Ranks, StalledError
from support.raster import DataError, Rows
from support.replay import replayed_on
from support.scenes import BatchSize, Behind, Part, blend

# --- best.pt: what people pass on -----------------------------------------------------------------


def save_transformer(model: CTCLM, path: Path, about: About) -> None:
    """Write the Transformer alone, and what it knows of its classes."""
    config = {key: getattr(model.config, key) for key in ("variant", "num_classes", "in_channels")}
    contents = {"kind": "ctclm-transformer", "config": config, "about": about.plain()}
    checkpoint.save(contents | {"model": model.transformer.state_dict()}, path)


def load_transformer(path: Path) -> Transformer:
    """The Transformer from `best.pt`, or from a published file of SegFormer, in evaluation mode.

    Its `about` is an About. Published files do not name their classes. Those of ImageNet weights
    have an encoder alone: then `head` is None, and `encode` gives features. Raises CheckpointError
    when the file is missing, damaged or something else.
    """
    if Path(path).suffix in pretrained.PUBLISHED:
        return from_published(pretrained.read(path)).eval()
    contents = checkpoint.read(path, "ctclm-transformer")
    try:
        config = contents["config"]
        size = config["num_classes"], config["in_channels"]
        transformer = Transformer(VARIANTS[config["variant"]], *size)
        transformer.load_state_dict(contents["model"])
        transformer.about = About.of_plain(contents["about"], config["num_classes"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise CheckpointError(
            f"{path}: its weights, config and about do not fit together, or this version of the "
            f"project; take another copy, or the version that wrote it"
        ) from None
    return transformer.eval()


def from_published(weights: pretrained.Weights) -> Transformer:
    K, in_channels = weights.num_classes or 1, weights.in_channels
    transformer = Transformer(VARIANTS[weights.variant(VARIANTS)], K, in_channels)
    pretrained.start_from(transformer, weights)
    if weights.num_classes is None:
        transformer.head = None
    names, bands = tuple(f"class {k}" for k in range(K)), "rgb" if in_channels == 3 else "rgbir"
    classes = Classes(names, tuple(distinct_colours(K)))
    transformer.about = weights.about or About(classes, str(weights.path), bands)
    return transformer


# --- A whole scene, window by window --------------------------------------------------------------

STRIDE = 32  # of the deepest stage: windows are mirrored up to a multiple, their logits cropped


@torch.no_grad()
def predict_parts(
    model: Callable[[Tensor], Tensor],
    image: np.ndarray | Rows,
    window: int = 512,
    overlap: float = 0.25,
    device: str | torch.device = "cpu",
    batch: BatchSize | int | None = None,
    tta: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Part]:
    """Yield Parts from top to bottom; their values are class probabilities, on `device`.

    image (H, W, C) uint8 of any size, an array or the rows of a file; model: images (B, C, H, W)
    0..255 -> logits (B, K, ...) at any resolution; window in pixels, overlap as a share of it;
    batch: windows at a time (1 on a CPU, 16 on a GPU); tta: the mean over the eight orientations of
    each window; progress(share) after each window.
    """
    function, batch = partial(probabilities, model, tta=tta), BatchSize.of(batch, device)
    broken = torch.zeros((), dtype=torch.bool, device=device)
    for part in blend(function, image, window, overlap, torch.device(device), batch, progress):
        broken |= part.values[0].isnan().any()  # looked at once, at the end: it waits for a GPU
        yield part
    cli.require(not broken, "the logits are not finite; infer.py --precision fp32 reaches furthest")


def predict(
    model: Callable[[Tensor], Tensor], image: np.ndarray | Rows, **options
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, class probabilities (K, rows, W) float32) from top to bottom; they are 0
    where a file has no data.

    `options` are those of `predict_parts`.
    """
    for top, _, p, valid in predict_parts(model, image, **options):
        p = p.cpu().numpy()
        yield top, p if valid is None else np.where(valid, p, 0)


def predict_classes(model, image: np.ndarray | Rows, **options) -> tuple[np.ndarray, np.ndarray]:
    """Class map (H, W) uint8 and the probability of each pixel's class, (H, W) float32; IGNORE and
    0 where a file has no data, so ignore the labels there too."""
    H, W = image.shape[:2]
    classes, confidence = np.empty((H, W), np.uint8), np.empty((H, W), np.float32)
    for top, pixels, p, valid in predict_parts(model, image, **options):
        (most, labels), rows = p.max(dim=0), slice(top, top + len(pixels))
        classes[rows], confidence[rows] = labels.byte().cpu().numpy(), most.cpu().numpy()
        if valid is not None:
            classes[rows][~valid], confidence[rows][~valid] = IGNORE, 0
    return classes, confidence


def probabilities(model, windows: Tensor, tta: bool = False) -> Tensor:
    """softmax(logits) of windows (B, H, W, C) uint8 at their own size, (B, K, H, W) float32.

    With `tta` the mean over flips and quarter turns: seen from above, no orientation is special.
    """
    if tta:
        total = 0
        for quarter in range(4):
            turned = windows.rot90(quarter, (1, 2))
            p = probabilities(model, turned) + probabilities(model, turned.flip(2)).flip(3)
            total = total + p.rot90(-quarter, (2, 3))
        return total / 8
    H, W = windows.shape[1:3]
    images = mirrored(windows).permute(0, 3, 1, 2).float()
    logits = model(images).float()
    if logits.shape[-2:] != images.shape[-2:]:
        logits = upsample(logits, images.shape[-2:])
    return logits.softmax(dim=1)[:, :, :H, :W]


def mirrored(windows: Tensor) -> Tensor:
    """Windows (B, H, W, C), continued by their mirror images up to a multiple of STRIDE."""
    for axis in (1, 2):
        length = windows.shape[axis]
        if beyond := -length % STRIDE:
            i = torch.arange(length + beyond, device=windows.device) % (2 * length)
            windows = windows.index_select(axis, torch.minimum(i, 2 * length - 1 - i))
    return windows.contiguous()


# --- Scores ---------------------------------------------------------------------------------------


def evaluate(
    model,
    dataset: Dataset,
    progress=lambda share: None,
    protocols: bool = False,
    patch: int = GEOSEG_PATCH,
    crop: int = MMSEG_CROP,
    ranks: Ranks = ALONE,
    **options,
) -> dict:
    """Scores of `model` on whole scenes: miou, mf1, oa, kappa, iou, f1, boundary_f1, ...

    Against full labels, and against eroded ones where there are no others; `domains` has them per
    domain where scenes have one. With `protocols` also `conventions`, a dict for each published way
    of counting. `options` are those of `predict`; progress(share) is called as it goes.
    """
    tally, scenes = Tally(dataset.classes, crop), ranks.share_of(dataset.scenes)
    options["batch"] = BatchSize.of(options.get("batch"), options.get("device", "cpu"))
    for index, scene in enumerate(scenes):

        def share(done, index=index):
            progress((index + done) / len(scenes))

        prediction, _ = predict_classes(model, scene.image, progress=share, **options)
        tally.add(prediction, scene)
        if protocols and scene.eroded is not None:
            tally.add_protocols(prediction, scene)
            for piece, padding in geoseg_padding(scene.image, patch, options.get("window", 512)):
                tally.add_padding(predict_classes(model, piece, **options)[0][padding])
    tally = Tally.of_all(ranks.gather(tally))
    return tally.result() | ({"conventions": tally.conventions()} if protocols else {})


# --- The program ----------------------------------------------------------------------------------


@dataclass
class Config:
    checkpoint: Path = cli.option(None, "best.pt of a run", positional=True)
    images: tuple[Path, ...] = cli.option((), "images to map", positional=True)
    out: Path = cli.option(None, "folder for maps (maps), or for metrics.json when scoring")
    window: int = cli.option(512, "side of a window in pixels, a multiple of 32")
    overlap: float = cli.option(0.25, "share of a window that neighbours have in common, below 0.9")
    batch: int = cli.option(None, "windows at a time (1 on a CPU, 16 on a GPU)")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = cli.option(
        "auto", "of weights and features; auto: fp16 on a GPU, fp32 on a CPU"
    )
    compile: bool = cli.option(False, "on a CPU: a minute or two at the start, then faster windows")
    tta: bool = cli.option(False, "average over flips and quarter turns, eight times the work")
    confidence: bool = cli.option(False, "also write the probability of each pixel's class, 0..255")
    data: Literal["", *DATA_SETS] = cli.option("", "score on this data set instead")
    root: Path = cli.option(None, "the data set's folder")
    split: Literal["val", "test"] = cli.option(None, "the data set's split (val)")
    tiles: tuple[str, ...] = cli.option((), "score on these scenes only, by name")
    max_unknown: float = cli.option(None, "share of a label whose colour may be no class (0.001)")
    cache: Path = cli.option(None, "folder in which decoded images are kept for the next time")
    protocol: Literal["", "all", "geoseg", "mmseg"] = cli.option(
        "", "also what others would print for the same predictions"
    )
    submission: Path = cli.option(None, "LoveDA's test set as a .zip for its server")
    export: Path = cli.option(None, "the model as a .pt2, .onnx or .safetensors for other programs")
    device: Literal["auto", "cpu", "cuda"] = cli.option("auto", "where to run")

    def __post_init__(self):
        window, overlap, batch = self.window, self.overlap, self.batch
        fits = window > 0 and window % STRIDE == 0
        cli.require(fits, f"--window must be a positive multiple of {STRIDE}; got {window}")
        cli.require(0 <= overlap < 0.9, f"--overlap must be in [0, 0.9); got {overlap}")
        cli.require(batch is None or batch > 0, f"--batch must be positive; got {batch}")
        one = bool(self.images) + bool(self.data) + bool(self.export) == 1
        cli.require(one, "give images to map, --data to score on, or --export (one of the three)")
        if self.export:
            others = (
                "out batch compile tta confidence root split tiles max_unknown cache protocol "
                "submission"
            )
            self.refuse("does not go with --export", others)
            for name in ("window", "overlap", "precision", "device"):  # these have defaults
                is_given = getattr(self, name) != getattr(Config, name)
                cli.require(not is_given, f"{cli.flag(name)} does not go with --export")
            fits = self.export.suffix in ENDINGS
            cli.require(fits, f"--export must end in {', '.join(ENDINGS)}; got {self.export}")
        elif self.images:
            self.refuse(
                "goes with --data, not with images",
                "root split tiles max_unknown cache protocol submission",
            )
        else:
            self.refuse("goes with images, not with --data", "confidence")
        if self.submission:
            self.refuse("does not go with --submission", "out protocol tiles")
            cli.require(self.data == "loveda", "--submission is for --data loveda")
            is_test = self.split != "val"
            cli.require(is_test, "--submission is of the test split; leave --split val out")
            is_zip = self.submission.suffix == ".zip"
            cli.require(is_zip, f"--submission must end in .zip; got {self.submission}")

    def refuse(self, why: str, names: str) -> None:
        for name in names.split():
            cli.require(not getattr(self, name), f"{cli.flag(name)} {why}")


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    keep_freed_memory()
    ranks, device = Ranks.join(quiet=not config.images), pick_device(config.device)
    model = load_transformer(config.checkpoint)
    cli.require(model.head, f"{config.checkpoint}: has no head; train.py --pretrained takes it")
    if config.export:
        cli.make_folder(config.export.parent)
        with force("pytorch"):  # no kernel of ours: who opens the file has none
            export(model, config.export, model.about.plain())
        return print(f"{config.export}: {config.export.stat().st_size / 1e6:.1f} MB")
    model = at_precision(model.to(device), config.precision, config.compile)
    if config.compile:
        cli.require(device.type == "cpu", "--compile is for a CPU: a GPU replays its work anyway")
        model.forward = Compiled(model.forward)
    model.forward = replayed_on(device, model.forward)
    options = {"window": config.window, "overlap": config.overlap, "device": device}
    options |= {"batch": BatchSize.of(config.batch, device)}
    try:
        if config.images:
            write_maps(model, config, options | {"tta": config.tta}, ranks)
        elif config.submission:
            alone = "--submission is one process's work: run it without torchrun"
            cli.require(ranks.count == 1, alone)
            submit(model, config, options | {"tta": config.tta})
        else:
            score(model, config, options, ranks)
    except torch.OutOfMemoryError:  # not of a batch, which is halved: a scene's rows
        smaller = "take a smaller --window, or --device cpu"
        raise cli.UsageError(f"the GPU's memory does not hold a scene's rows; {smaller}") from None


# --- Maps ---------------------------------------------------------------------------------------


def write_maps(model, config: Config, options: dict, ranks: Ranks) -> None:
    out = config.out or Path("maps")
    (name, times), *_ = Counter(path.stem for path in config.images).most_common(1)
    cli.require(times == 1, f"two images are called {name}: map them to different folders")
    for path in config.images:  # all of them, before the first hour of work
        rows = open_rows(path, model.about.stretch)
        check_bands(model, config, rows.shape[2], path, rows.no_data.alpha is not None)
    if model.about.bands != "rgb":
        taken = "the images' bands are taken for these"
        print(f"{config.checkpoint} was trained on {model.about.bands}: {taken}")
    cli.make_folder(out)
    for path in ranks.share_of(config.images):
        write_map(model, path, out, config.confidence, options)


def write_map(model, path: Path, out: Path, confidence: bool, options: dict) -> None:
    """The class map of one image, an overlay, and where asked the confidence."""
    rows = open_rows(path, model.about.stretch)
    files = MapFiles(out, path, rows, model.about.classes, confidence)

    def write(top: int, pixels: np.ndarray, labels: Tensor, most: Tensor, valid) -> None:
        files.add(top, pixels, labels.cpu().numpy(), most.cpu().numpy(), valid)

    with Progress(path.name) as progress, files, Behind() as behind:
        # It writes, while the next rows are predicted.
        for top, pixels, p, valid in predict_parts(model, rows, progress=progress, **options):
            most, labels = p.max(dim=0)
            behind(write, top, pixels, labels.byte(), (255 * most).round().byte(), valid)
    print(files.summary())


def check_bands(model, config: Config, bands: int, what, transparency: bool = False) -> None:
    """DataError when `what` has other bands than the images that the model was trained on."""
    wanted = model.normalise.in_channels
    if bands != wanted:
        and_more = " and transparency" if transparency else ""
        hint = f"; if that is infrared: {NO_ALPHA}" if transparency and wanted > bands else ""
        raise DataError(
            f"{what}: has {bands} bands{and_more}, but {config.checkpoint} was trained on {wanted} "
            f"({model.about.bands}){hint}"
        )


# --- Scores -------------------------------------------------------------------------------------


def load_scenes(model, config: Config, split: str) -> Dataset:
    """The data set, if its classes and bands are those that the model knows."""
    options = {"cache": config.cache, "max_unknown": config.max_unknown}
    options |= {"bands": model.about.bands, "stretch": model.about.stretch}
    dataset = load(config.data, config.root, split, config.tiles, **options)
    if dataset.classes.names != model.about.classes.names:
        raise DataError(
            f"{config.checkpoint}: was trained on {', '.join(model.about.classes.names)}; "
            f"{config.data} has {', '.join(dataset.classes.names)}"
        )
    for scene in dataset.scenes:
        check_bands(model, config, scene.image.shape[2], scene.path or scene.name)
    return dataset


def score(model, config: Config, options: dict, ranks: Ranks) -> None:
    """Print the scores, two tables with --tta; metrics.json has them all."""
    split = config.split or "val"
    dataset = load_scenes(model, config, split)
    if any(scene.label is None for scene in dataset.scenes):
        raise DataError(f"the {split} split of {config.data} has no labels to score against")
    require_protocol(config.protocol, dataset, f"{split} split", config.data)
    what = f"tiles {' '.join(config.tiles)}" if config.tiles else f"{split} split"
    print(f"{config.checkpoint} on {config.data}, {what}")
    for note in dataset.notes:
        print(f"  note: {note}")
    results = {}
    for name in ("plain", "tta") if config.tta else ("plain",):
        settings = options | {"tta": name == "tta", "protocols": bool(config.protocol)}
        with Progress(f"{len(dataset.scenes)} scenes") as progress:
            result = results[name] = evaluate(model, dataset, progress, ranks=ranks, **settings)
        if config.tta:
            print("\naveraged over eight orientations" if name == "tta" else "\none orientation")
        print(f"\n{table(result, dataset.classes)}")
        if config.protocol:
            print(f"\n{protocol_table(result, config.protocol)}")
    if config.out and ranks.is_first:
        entry = {"checkpoint": str(config.checkpoint), "data": config.data, "split": split}
        entry |= {"window": config.window, "overlap": config.overlap}
        entry |= {"classes": list(dataset.classes.names), "scenes": len(dataset.scenes)} | results
        cli.make_folder(config.out)
        checkpoint.save_json(entry, config.out / "metrics.json")


def submit(model, config: Config, options: dict) -> None:
    """The test set's maps as the server wants them, verified by reading the file back."""
    dataset = load_scenes(model, config, "test")
    sizes = {scene.path.name: scene.image.shape[:2] for scene in dataset.scenes}
    require_loveda_test(sizes, config.root)
    cli.make_folder(config.submission.parent)
    with Progress(f"{len(sizes)} images") as progress:

        def maps():
            for index, scene in enumerate(dataset.scenes):
                yield scene.path.name, predict_classes(model, scene.image, **options)[0]
                progress((index + 1) / len(sizes))

        write_submission(config.submission, maps(), sizes, len(dataset.classes.names))
    print(f"{config.submission}: {len(sizes)} single-band PNGs with values 0..6, read back")


if __name__ == "__main__":
    cli.run(main, DataError, CheckpointError, StalledError)
