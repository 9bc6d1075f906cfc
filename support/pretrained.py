"""Branches that start from weights that somebody has trained before.

    weights = pretrained.read(Path("mit_b0.pth"))
    for sentence in pretrained.start_both(model, weights):      # a CTCLM
        print(sentence)

Published files end in .pth, .bin or .safetensors (support/segformer.py has their names), ours in
.pt: best.pt has the Transformer, last.pt the CNN too. A CNN for which a file has nothing gets the
Transformer's patch embedding into its stem and is random elsewhere (docs/weights.md has what was
measured). Each tensor of a file is used, or a sentence names it. Where classes (their number, or
their names) or bands are others:

    classes     the last layer keeps its initial weights, and everything else is taken
    bands       a band that the file does not know gets the mean of the kernels of those that it
                knows; bands beyond the model's are left out

Only tensors and plain types are ever unpickled (weights_only=True).
"""

import json
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import checkpoint, safetensors, segformer
from support.about import About
from support.checkpoint import CheckpointError
from support.cli import require

PUBLISHED = (".pth", ".bin", ".safetensors")
EMBED, STEM = "stages.0.embed.weight", "stem.0.weight"  # of the Transformer, of the CNN
CLASSIFY = "head.classify.weight"  # of both


class Weights(NamedTuple):
    """What a file has for our Transformer."""

    path: Path
    state: dict[str, Tensor]  # by our names; nothing of a head where the file is of an encoder
    unused: list[str]  # the file's other tensors, by its own names
    cnn: dict[str, Tensor] | None = None  # where the file has one
    about: About | None = None  # its classes and bands, where it was trained here

    @property
    def in_channels(self) -> int:
        return self.state[EMBED].shape[1]

    @property
    def num_classes(self) -> int | None:
        """None where the file is of an encoder."""
        return len(self.state[CLASSIFY]) if CLASSIFY in self.state else None

    def with_about(self, known: Callable[[], dict]) -> "Weights":
        """And with About as the file has it; CheckpointError where that is damaged."""
        try:
            return self._replace(about=About.of_plain(known(), self.num_classes))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise CheckpointError(
                f"{self.path}: what it says about its classes is damaged, or of other weights"
            ) from None

    def variant(self, variants: dict[str, NamedTuple]) -> str:
        """Which of them (ctclm.VARIANTS) it is, by channels and depths of the stages."""
        embed = re.compile(r"stages\.\d+\.embed\.weight")
        channels = tuple(len(self.state[key]) for key in sorted(self.state) if embed.fullmatch(key))
        places = (re.match(r"stages\.(\d+)\.blocks\.(\d+)", key) for key in self.state)
        blocks = {(int(found[1]), found[2]) for found in places if found}
        depths = tuple(sum(s == i for i, _ in blocks) for s in range(len(channels)))
        for name, variant in variants.items():
            if (channels, depths) == (variant.channels, variant.depths):
                return name
        raise CheckpointError(
            f"{self.path}: is none of {', '.join(variants)}: its stages have channels "
            f"{channels} and depths {depths}"
        )

    def of(self, wanted: str, variants: dict[str, NamedTuple]) -> "Weights":
        """Themselves, where they are of the variant that is wanted; otherwise UsageError."""
        found = self.variant(variants)
        require(found == wanted, f"{self.path}: is of variant {found}; take --variant {found}")
        return self


# --- Reading --------------------------------------------------------------------------------------


def read(path: Path) -> Weights:
    """The weights of a file. CheckpointError when it is missing, damaged or something else."""
    path = Path(path)
    if path.suffix in PUBLISHED:
        weights = of_published(path)
    else:
        weights = of_ours(path, checkpoint.read(path, "ctclm-transformer", "ctclm-training"))
    for key, tensor in [*weights.state.items(), *(weights.cnn or {}).items()]:
        if key.endswith((".embed.weight", STEM, CLASSIFY)) and tensor.dim() != 4:
            raise CheckpointError(
                f"{path}: {key} is {tuple(tensor.shape)}, which is no convolution"
            )
    return weights


def of_published(path: Path) -> Weights:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights")
    tensors = safetensors.read(path) if path.suffix == ".safetensors" else unpickle(path)
    checkpoint.check_tensors(path, tensors)
    try:
        state, unused = segformer.to_ours(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if EMBED not in state:
        example = f": they are called {unused[0]}" if unused else ""
        raise CheckpointError(f"{path}: holds no weights by a published name of SegFormer{example}")
    weights = Weights(path, state, unused)
    if path.suffix != ".safetensors" or "about" not in (known := safetensors.metadata(path)):
        return weights
    return weights.with_about(lambda: json.loads(known["about"]))


def of_ours(path: Path, contents: dict) -> Weights:
    state = contents["model"]
    if contents["kind"] == "ctclm-transformer":
        weights = Weights(path, state, unused=[])
        return weights.with_about(lambda: contents["about"]) if "about" in contents else weights
    transformer, cnn = (
        {key.removeprefix(branch): state[key] for key in state if key.startswith(branch)}
        for branch in ("transformer.", "cnn.")
    )
    return Weights(path, transformer, unused=[], cnn=cnn)


def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by torch.save: those of a dict, or of its entry "state_dict"."""
    try:
        if zipfile.is_zipfile(path):  # older files are none
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not check the checksums
            if damaged:
                raise CheckpointError(f"{path}: damaged (the checksum of {damaged} is wrong)")
        with warnings.catch_warnings(action="ignore"):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception:  # bytes that are no pickle may raise anything
        raise CheckpointError(
            f"{path}: not a file of weights, a truncated one, or one that holds more than tensors"
        ) from None
    if isinstance(contents, dict):
        contents = contents.get("state_dict", contents)
    if isinstance(contents, dict) and "kind" in contents:
        raise CheckpointError(f"{path}: is a checkpoint of this project: give it the ending .pt")
    return contents


# --- Use ------------------------------------------------------------------------------------------


def start_both(model: nn.Module, weights: Weights, data=None) -> list[str]:
    """`start_from` for the branches of a CTCLM."""
    sentences = start_from(model.transformer, weights, data)
    if weights.cnn is None:
        with torch.no_grad():
            stem = model.cnn.get_parameter(STEM)
            stem.copy_(shrunk(model.transformer.get_parameter(EMBED), stem))
        lent = "the CNN's stem starts from the Transformer's patch embedding, shrunk to 3 x 3; "
        return [*sentences, f"{lent}all else of it is random"]
    of_cnn = start_from(model.cnn, weights._replace(state=weights.cnn), data)
    return sentences + [f"the CNN {sentence}" for sentence in of_cnn[:1]]


def shrunk(kernels: Tensor, stem: Tensor) -> Tensor:
    """The first of the kernels (C, bands, 7, 7) as a stem (C', bands, 3, 3), at its norm."""
    small = F.interpolate(kernels[: len(stem)], stem.shape[2:], mode="bilinear", antialias=True)
    return small * (stem.norm() / small.norm())


def start_from(branch: nn.Module, weights: Weights, data=None) -> list[str]:
    """Copy the weights, in place -> sentences that say what was not used and what was adapted.

    data: the Dataset to train on, if its classes and bands are to be compared with the file's.
    CheckpointError when the file lacks a tensor or has one of another shape.
    """
    path, wanted, state = weights.path, branch.state_dict(), dict(weights.state)
    first = EMBED if EMBED in wanted else STEM
    sentences = [f"starts from {path}"]
    if weights.unused:
        sentences.append(f"not used of {path}: {', '.join(weights.unused)}")
    if weights.num_classes is None:
        sentences.append(f"{path} is of an encoder: the head starts from random weights")
        state |= {key: tensor for key, tensor in wanted.items() if key.startswith("head.")}
    elif weights.num_classes != (K := len(wanted[CLASSIFY])):
        sentences.append(
            f"{path} has {weights.num_classes} classes, not {K}: the last layer starts from random "
            f"weights, everything else is kept"
        )
        state |= {key: wanted[key] for key in wanted if key.startswith("head.classify.")}
    elif data and weights.about and weights.about.classes.names != data.classes.names:
        sentences.append(
            f"{path} has the classes {', '.join(weights.about.classes.names)}, not "
            f"{', '.join(data.classes.names)}: the last layer starts from random weights, "
            f"everything else is kept"
        )
        state |= {key: wanted[key] for key in wanted if key.startswith("head.classify.")}
    if data and weights.about and weights.about.bands[:3] != data.bands[:3]:  # rgb begins rgbir
        sentences.append(
            f"{path} was trained on {weights.about.bands}, not {data.bands}: the kernels of its "
            f"bands are kept in their order"
        )
    if missing := [key for key in wanted if key not in state]:
        raise CheckpointError(f"{path}: has nothing for {missing[0]}")
    theirs, ours = state[first].shape[1], wanted[first].shape[1]
    if theirs != ours:
        sentences.append(f"{path} has {theirs} bands, not {ours}: {of_bands(theirs, ours)}")
        kernels = state[first]  # (C, bands, 7, 7), (C, bands, 3, 3)
        mean = kernels.mean(1, keepdim=True).expand(-1, max(0, ours - theirs), -1, -1)
        state[first] = torch.cat([kernels[:, :ours], mean], 1)
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            shapes = tuple(state[key].shape), tuple(tensor.shape)
            raise CheckpointError(f"{path}: {key} would be {shapes[0]}, but it takes {shapes[1]}")
    if extra := state.keys() - wanted.keys():
        raise CheckpointError(f"{path}: {min(extra)} has no place in this model")
    branch.load_state_dict(state)
    return sentences


def of_bands(theirs: int, ours: int) -> str:
    if ours < theirs:
        return f"those of the first {ours} are kept"
    return f"the kernels of each further band are the mean over those {theirs}"
