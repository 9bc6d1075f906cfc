"""Our Transformer's weights by the names under which SegFormer's are published, and back.

    state, unused = segformer.to_ours(tensors)          # of a published file -> a state_dict
    tensors = segformer.to_published(state, "Hugging Face")

"original" are the names in the authors' files (`mit_b0.pth`, `segformer.b0.512x512.ade.160k.pth`),
"Hugging Face" those in the files of `nvidia/mit-b0` and its siblings. Two things are more than
another name:

- Hugging Face keeps keys and values apart. The authors have them in one matrix, keys first, and so
  have we.
- The published head projects each stage to E channels, P_s x + b_s, upsamples, concatenates and
  fuses: F = [F_4 F_3 F_2 F_1], deepest stage first. Ours has one matrix F_s P_s for each stage and
  no bias. What the biases add is the sum of all F_s b_s, a constant for each channel, and it is
  subtracted from the running mean of the batch norm behind. On the way back P_s is our matrix and
  F_s the identity, so going there and back changes no bit.

Files of ImageNet weights have a classifier of 1000 classes in place of this head.

Letters: s stage from 0, n = s + 1, b block of a stage, E width of the head.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

NAMINGS = ("original", "Hugging Face")
BLOCK = ("stages.{s}.blocks.{b}.", "block{n}.{b}.", "encoder.block.{s}.{b}.")
IN_A_BLOCK = [  # ours, then those of NAMINGS; "+": two tensors that are one of ours
    ("norm1", "norm1", "layer_norm_1"),
    ("attention.query", "attn.q", "attention.self.query"),
    ("attention.key_value", "attn.kv", "attention.self.key + attention.self.value"),
    ("attention.reduce", "attn.sr", "attention.self.sr"),
    ("attention.reduce_norm", "attn.norm", "attention.self.layer_norm"),
    ("attention.project", "attn.proj", "attention.output.dense"),
    ("norm2", "norm2", "layer_norm_2"),
    ("ffn.expand", "mlp.fc1", "mlp.dense1"),
    ("ffn.mix", "mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
    ("ffn.reduce", "mlp.fc2", "mlp.dense2"),
]
OUTSIDE = [
    ("stages.{s}.embed", "patch_embed{n}.proj", "encoder.patch_embeddings.{s}.proj"),
    ("stages.{s}.embed_norm", "patch_embed{n}.norm", "encoder.patch_embeddings.{s}.layer_norm"),
    ("stages.{s}.norm", "norm{n}", "encoder.layer_norm.{s}"),
    ("head.P.{s}", "decode_head.linear_c{n}.proj", "decode_head.linear_c.{s}.proj"),  # and b_s
    ("head.F", "decode_head.linear_fuse.conv", "decode_head.linear_fuse"),
    ("head.norm", "decode_head.linear_fuse.bn", "decode_head.batch_norm"),
    ("head.classify", "decode_head.linear_pred", "decode_head.classifier"),
]
ENCODER = ("backbone.", "segformer.")  # before an encoder's names, in a file that has a head too


class Name(NamedTuple):
    """A module here and in one of NAMINGS; the places {s}, {n} and {b} are open."""

    ours: str
    published: list[str]  # whose tensors, one after the other, are ours


def names(naming: str) -> list[Name]:
    column = 1 + NAMINGS.index(naming)
    inside = [
        Name(BLOCK[0] + row[0], [BLOCK[column] + part for part in row[column].split(" + ")])
        for row in IN_A_BLOCK
    ]
    return inside + [Name(row[0], [row[column]]) for row in OUTSIDE]


def find(key: str, name: str) -> dict | None:
    """The places of a tensor's key, if it is of a module of this name: norm3.bias of norm{n}."""
    pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(name))
    found = re.fullmatch(rf"{pattern}\.(?P<tensor>\w+)", key)
    if found is None:
        return None
    places = found.groupdict()
    if "n" in places:
        return places | {"s": int(places["n"]) - 1}
    return places | {"n": int(places["s"]) + 1} if "s" in places else places


def fill(name: str, places: dict) -> str:
    return f"{name}.{{tensor}}".format(**places)


# --- There and back -------------------------------------------------------------------------------


def to_ours(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by a published name -> our Transformer's, in float32, and the keys of the others.

    ValueError when one is there twice (norm1.weight and backbone.norm1.weight) or has no floating
    point, when a head is not complete or tensors do not fit together.
    """
    known = [
        (part, name.ours, i)
        for naming in NAMINGS
        for name in names(naming)
        for i, part in enumerate(name.published)
    ]
    parts, unused = {}, []
    for key, tensor in tensors.items():
        short = key.removeprefix(ENCODER[0]).removeprefix(ENCODER[1])
        for published, ours, i in known:
            if places := find(short, published):
                of = parts.setdefault(fill(ours, places), {})
                if i in of:
                    raise ValueError(f"{key} is there twice, by another name too")
                of[i] = as_float(key, tensor)
                break
        else:
            unused.append(key)
    state = {key: joined(key, [of[i] for i in sorted(of)]) for key, of in parts.items()}
    return fold_head(state), unused


def as_float(key: str, tensor: Tensor) -> Tensor:
    """In float32; the count of a batch norm stays what it is."""
    if key.endswith("num_batches_tracked"):
        return tensor
    if not tensor.is_floating_point():
        raise ValueError(f"{key} has numbers of type {tensor.dtype}, which are no weights")
    return tensor.float()


def joined(key: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]  # may be a single number, which cannot be joined
    try:
        return torch.cat(parts)
    except (RuntimeError, IndexError):
        raise ValueError(f"the tensors that are {key} do not fit together") from None


def to_published(state: dict[str, Tensor], naming: str) -> dict[str, Tensor]:
    """The state_dict of our Transformer by the names of one of NAMINGS."""
    column, tensors = NAMINGS.index(naming), {}
    for key, tensor in unfold_head(state).items():
        for ours, published in names(naming):
            if places := find(key, ours):
                keys = [fill(part, places) for part in published]
                if key.startswith("stages."):
                    keys = [ENCODER[column] + each for each in keys]
                tensors |= zip(keys, tensor.chunk(len(keys)) if keys[1:] else [tensor], strict=True)
    return tensors


# --- The head -------------------------------------------------------------------------------------


def fold_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published head's P, b, F and batch norm -> our projections and batch norm."""
    if not any(key.startswith("head.") for key in state):
        return state  # of an encoder alone
    state, stages = dict(state), range(4)
    needed = [f"head.P.{s}.{tensor}" for s in stages for tensor in ("weight", "bias")]
    needed += ["head.F.weight", "head.norm.running_mean"]
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"its head lacks {original_name(missing[0])}")
    mean = state["head.norm.running_mean"].double()
    try:
        F = state.pop("head.F.weight").flatten(1).double()  # (E, 4 E), as its kernel is 1 x 1
        parts = F.chunk(4, dim=1)[::-1]  # F_1 ... F_4, (E, E)
        for s, F_s in zip(stages, parts, strict=True):
            P = state.pop(f"head.P.{s}.weight").flatten(1).double()  # (E, C_s)
            state[f"head.project.{s}.weight"] = (F_s @ P).float()[:, :, None, None]
            mean = mean - F_s @ state.pop(f"head.P.{s}.bias").double()
    except (RuntimeError, ValueError, IndexError):
        raise ValueError("the tensors of its head do not fit together") from None
    return state | {"head.norm.running_mean": mean.float()}


def unfold_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `fold_head`: F_s is the identity, b_s is zero."""
    state = dict(state)
    E = len(state["head.norm.running_mean"])
    for s in range(4):
        P = state.pop(f"head.project.{s}.weight").flatten(1)
        state |= {f"head.P.{s}.weight": P, f"head.P.{s}.bias": P.new_zeros(E)}
    return state | {"head.F.weight": torch.eye(E).repeat(1, 4)[:, :, None, None]}


def original_name(key: str) -> str:
    """What the authors call a tensor of ours, for a sentence about it."""
    (name,) = (fill(p[0], found) for n, p in names("original") if (found := find(key, n)))
    return name
