"""pretrained.py: what a file has is used or named, and a file that is none gets a sentence."""

import copy
import json
import os
from types import SimpleNamespace

import pytest
import torch

from ctclm import CTCLM, VARIANTS, ModelConfig, Transformer
from support import checkpoint, pretrained, safetensors, segformer
from support.about import About
from support.checkpoint import CheckpointError
from support.cli import UsageError
from support.layouts import Classes


def transformer(variant="tiny", K=5, in_channels=3):
    return Transformer(VARIANTS[variant], K, in_channels)


def tensors_of(model, naming="original"):
    return segformer.to_published(model.state_dict(), naming)


def write(tensors, path):
    """As publishers do: the authors' .pth has more beside the tensors."""
    if path.suffix == ".safetensors":
        safetensors.write(tensors, path, {"format": "pt"})
    elif path.suffix == ".pth":
        torch.save({"meta": {"CLASSES": ("a", "b"), "epoch": 3}, "state_dict": tensors}, path)
    else:
        torch.save(tensors, path)
    return path


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("naming", segformer.NAMINGS)
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_every_tensor_of_a_published_file_is_loaded(tmp_path, suffix, naming):
    trained, model = transformer(), transformer()
    path = write(tensors_of(trained, naming), tmp_path / f"model{suffix}")
    weights = pretrained.read(path)
    assert pretrained.start_from(model, weights) == [f"starts from {path}"]
    assert same(model, trained) and weights.variant(VARIANTS) == "tiny"


def test_our_own_file(tmp_path):
    trained, model = transformer(), transformer()
    contents = {"kind": "ctclm-transformer", "model": trained.state_dict()}
    checkpoint.save(contents, tmp_path / "best.pt")
    pretrained.start_from(model, pretrained.read(tmp_path / "best.pt"))
    assert same(model, trained)


def test_a_run_of_ours_has_both_branches(tmp_path):
    """With other classes and bands, as in the Transformer."""
    trained = CTCLM(ModelConfig("tiny", num_classes=5))
    model = CTCLM(ModelConfig("tiny", num_classes=3, in_channels=4))
    contents = {"kind": "ctclm-training", "model": trained.state_dict()}
    checkpoint.save(contents, tmp_path / "last.pt")
    sentences = pretrained.start_both(model, pretrained.read(tmp_path / "last.pt"))
    assert sentences[-1] == f"the CNN starts from {tmp_path / 'last.pt'}"
    assert same(model.cnn.stages, trained.cnn.stages)
    assert same(model.transformer.stages[1:], trained.transformer.stages[1:])
    assert torch.equal(model.cnn.stem[0].weight[:, :3], trained.cnn.stem[0].weight)


def test_without_one_the_cnn_gets_the_patch_embedding(tmp_path):
    """And nothing else. A kernel that is the same everywhere stays so; the stem keeps its norm."""
    trained, model = transformer(), CTCLM(ModelConfig("tiny", num_classes=5, in_channels=4))
    with torch.no_grad():
        trained.stages[0].embed.weight.copy_(torch.randn(32, 3, 1, 1).expand(-1, -1, 7, 7))
    before = copy.deepcopy(model.cnn)
    path = write(tensors_of(trained), tmp_path / "x.bin")
    assert pretrained.start_both(model, pretrained.read(path))[-1].startswith(
        "the CNN's stem starts from the Transformer's patch embedding"
    )
    stem, old = (cnn.stem[0].weight for cnn in (model.cnn, before))
    middle = model.transformer.stages[0].embed.weight[:16, :, 3:4, 3:4]
    ratio = stem / middle
    torch.testing.assert_close(ratio, ratio[0, 0, 0, 0].expand(ratio.shape))
    torch.testing.assert_close(stem.norm(), old.norm())
    before.stem[0].weight.data.copy_(stem)
    assert same(model.cnn, before)


def test_files_of_half_precision_and_of_old_versions(tmp_path):
    trained, model = transformer(), transformer()
    halves = {k: x.half() if x.is_floating_point() else x for k, x in tensors_of(trained).items()}
    torch.save(halves, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    pretrained.start_from(model, pretrained.read(tmp_path / "old.pth"))
    wanted = copy.deepcopy(trained).half().float()
    assert same(model, wanted) and model.head.classify.weight.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_is_seen(variant):
    with torch.device("meta"):
        state = transformer(variant).state_dict()
    weights = pretrained.Weights("x.bin", dict(reversed(state.items())), [])
    assert weights.of(variant, VARIANTS) is weights
    other = "b0" if variant != "b0" else "b1"
    with pytest.raises(UsageError, match=f"x.bin: is of variant {variant}; take --variant"):
        weights.of(other, VARIANTS)


# --- Other classes, other bands, no head ----------------------------------------------------------


def test_other_classes_keep_the_rest(tmp_path):
    path = write(tensors_of(transformer(K=150)), tmp_path / "ade.pth")
    model = transformer(K=6)
    before, sentences = copy.deepcopy(model), pretrained.start_from(model, pretrained.read(path))
    assert "has 150 classes, not 6: the last layer starts from random weights" in sentences[1]
    assert len(sentences) == 2
    trained = pretrained.read(path).state
    for name, tensor in model.state_dict().items():
        kept = name.startswith("head.classify")
        assert torch.equal(tensor, before.state_dict()[name] if kept else trained[name])


def test_an_encoder_leaves_the_head(tmp_path):
    """ImageNet weights: their classifier has no use, and is named."""
    trained = transformer()
    encoder = {
        name.removeprefix("backbone."): tensor
        for name, tensor in tensors_of(trained).items()
        if name.startswith("backbone.")
    }
    encoder |= {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}
    path, model = write(encoder, tmp_path / "mit.bin"), transformer()
    head = copy.deepcopy(model.head)
    _, unused, sentence = pretrained.start_from(model, pretrained.read(path))
    assert unused == f"not used of {path}: head.weight, head.bias"
    assert "is of an encoder: the head starts from random weights" in sentence
    assert same(model.stages, trained.stages) and same(model.head, head)


def test_infrared_gets_the_mean_of_the_colours(tmp_path):
    trained, model = transformer(), transformer(in_channels=4)
    path = write(tensors_of(trained), tmp_path / "x.bin")
    _, sentence = pretrained.start_from(model, pretrained.read(path))
    assert "has 3 bands, not 4: the kernels of each further band are the mean over" in sentence
    found, colours = model.stages[0].embed.weight, trained.stages[0].embed.weight
    assert torch.equal(found[:, :3], colours)
    torch.testing.assert_close(found[:, 3], colours.mean(1))


def test_bands_beyond_ours_are_left_out(tmp_path):
    trained, model = transformer(in_channels=4), transformer()
    path = write(tensors_of(trained), tmp_path / "x.bin")
    _, sentence = pretrained.start_from(model, pretrained.read(path))
    assert sentence.endswith("has 4 bands, not 3: those of the first 3 are kept")
    assert torch.equal(model.stages[0].embed.weight, trained.stages[0].embed.weight[:, :3])


CLASSES = Classes(tuple("abcde"), tuple((k, k, k) for k in range(5)))


def written_with_about(model, path):
    about = About(CLASSES, "folder", "irrg").plain()
    if path.suffix == ".safetensors":
        safetensors.write(tensors_of(model), path, {"about": json.dumps(about)})
    else:
        state = {"kind": "ctclm-transformer", "model": model.state_dict()}
        checkpoint.save(state | {"about": about}, path)
    return path


@pytest.mark.parametrize("name", ["best.pt", "x.safetensors"])
def test_as_many_classes_of_other_names_are_other_classes(tmp_path, name):
    trained, model = transformer(), transformer()
    weights = pretrained.read(written_with_about(trained, tmp_path / name))
    same_data = SimpleNamespace(classes=CLASSES, bands="irrg")
    assert len(pretrained.start_from(model, weights, same_data)) == 1 and same(model, trained)
    model = transformer()
    before = copy.deepcopy(model.head.classify)
    other = SimpleNamespace(classes=CLASSES._replace(names=tuple("abcdx")), bands="rgb")
    _, classes, bands = pretrained.start_from(model, weights, other)
    assert "has the classes a, b, c, d, e, not a, b, c, d, x: the last layer starts" in classes
    assert "was trained on irrg, not rgb" in bands
    assert same(model.head.classify, before) and same(model.stages, trained.stages)


def test_an_about_of_other_weights_is_refused(tmp_path):
    path = written_with_about(transformer(K=4), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="x.safetensors: what it says about its classes"):
        pretrained.read(path)


# --- Tensors that are no weights of this model ---------------------------------------------------

NORM, FUSE = "backbone.norm1.weight", "decode_head.linear_fuse.conv.weight"
PROJECT, VARIANCE = "decode_head.linear_c1.proj", "decode_head.linear_fuse.bn.running_var"
ONES = torch.ones(32)
ODD = {
    "sparse": (NORM, ONES.to_sparse(), f"{NORM} is no plain tensor"),
    "without numbers": (NORM, ONES.to("meta"), f"{NORM} is no plain tensor"),
    "float8": (NORM, ONES.to(torch.float8_e4m3fn), f"{NORM} is no plain tensor"),
    "complex": (NORM, ONES * 1j, f"{NORM} is no plain tensor"),
    "one number 2^40 times": (NORM, torch.ones(1).expand(2**40), f"{NORM} is no plain tensor"),
    "integers": (NORM, ONES.to(torch.int8), f"{NORM} has numbers of type torch.int8"),
    "too large for float32": (NORM, ONES.double() * 1e300, f"weights of {NORM} are not finite"),
    "a negative variance": (VARIANCE, -ONES, f"the variance {VARIANCE} is negative"),
    "by two names": (NORM.removeprefix("backbone."), ONES, "norm1.weight is there twice"),
    "fusion of one dimension": (FUSE, ONES, "tensors of its head do not fit together"),
    "fusion of none": (FUSE, torch.tensor(1.0), "tensors of its head do not fit together"),
    "projection of none": (f"{PROJECT}.weight", torch.tensor(1.0), "do not fit together"),
    "bias of none": (f"{PROJECT}.bias", torch.tensor(1.0), "do not fit together"),
    "embedding of none": ("backbone.patch_embed1.proj.weight", torch.tensor(1.0), "no convolution"),
    "embedding of one": ("backbone.patch_embed2.proj.weight", ONES, "which is no convolution"),
    "classes of none": ("decode_head.linear_pred.weight", torch.tensor(1.0), "no convolution"),
}


@pytest.mark.parametrize("how", ODD)
def test_a_tensor_that_is_no_weight_is_named(tmp_path, how, recwarn):
    key, tensor, sentence = ODD[how]
    torch.save(tensors_of(transformer()) | {key: tensor}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="x.pth: .*" + sentence):
        weights = pretrained.read(tmp_path / "x.pth")
        pretrained.start_from(transformer(weights.variant(VARIANTS)), weights)


@pytest.mark.parametrize("shape", [(3,), (3, 3, 3), ()])
def test_keys_that_do_not_fit_to_the_values(tmp_path, shape):
    key = "segformer.encoder.block.0.0.attention.self.key.weight"
    tensors = tensors_of(transformer(), "Hugging Face") | {key: torch.ones(shape)}
    with pytest.raises(
        CheckpointError, match="stages.0.blocks.0.attention.key_value.weight do not"
    ):
        pretrained.read(write(tensors, tmp_path / "x.bin"))


# --- Files that are none --------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def bad_file(how, path):
    tensors = tensors_of(transformer())
    if how == "malicious":
        return torch.save(tensors | {"x": Malicious()}, path)
    if how == "a flipped bit":
        content = bytearray(write(tensors, path).read_bytes())
        content[len(content) // 2] ^= 1
        return path.write_bytes(content)
    if how == "truncated":
        return path.write_bytes(write(tensors, path).read_bytes()[:-1000])
    contents = {
        "foreign": {"layers.0.0.projection.weight": torch.zeros(3)},
        "not finite": tensors | {"backbone.norm1.weight": torch.full((32,), torch.nan)},
        "a tensor missing": {k: x for k, x in tensors.items() if "block3.1.attn.q." not in k},
        "another shape": tensors | {"backbone.norm1.weight": torch.zeros(31)},
        "a head in pieces": {k: x for k, x in tensors.items() if "linear_fuse.conv" not in k},
        "a block too many": tensors | {"backbone.block9.0.attn.q.weight": torch.zeros(3)},
        "numbers": tensors | {"epoch": 3},
        "a list": [torch.zeros(3)],
        "ours": {"kind": "ctclm-transformer"},
    }
    if how in contents:
        return torch.save(contents[how], path)
    return path.write_bytes({"text": b"hello\n" * 9, "HTML": b"<html>", "empty": b""}[how])


BAD = {
    "malicious": "x.pth: not a file of weights, a truncated one, or one that holds more than",
    "a flipped bit": "x.pth: damaged (the checksum of ",
    "truncated": "x.pth: not a file of weights, a truncated one, or",
    "text": "x.pth: not a file of weights",
    "HTML": "x.pth: not a file of weights",
    "empty": "x.pth: not a file of weights",
    "foreign": "published name of SegFormer: they are called layers.0.0.projection.weight",
    "not finite": "x.pth: the weights of backbone.norm1.weight are not finite",
    "a tensor missing": "x.pth: has nothing for stages.2.blocks.1.attention.query.weight",
    "another shape": "x.pth: stages.0.norm.weight would be (31,), but it takes (32,)",
    "a head in pieces": "x.pth: its head lacks decode_head.linear_fuse.conv.weight",
    "a block too many": "x.pth: stages.8.blocks.0.attention.query.weight has no place in",
    "numbers": "x.pth: its entry 'epoch' is no tensor",
    "a list": "x.pth: holds no dict of tensors",
    "ours": "x.pth: is a checkpoint of this project: give it the ending .pt",
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_file_gets_one_sentence(tmp_path, monkeypatch, how, recwarn):
    monkeypatch.chdir(tmp_path)
    bad_file(how, tmp_path / "x.pth")
    model = transformer()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError) as raised:
        pretrained.start_from(model, pretrained.read(tmp_path / "x.pth"))
    assert BAD[how] in str(raised.value) and "\n" not in str(raised.value)
    assert same(model, before) and not recwarn.list
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]  # nothing was executed


def test_a_size_that_is_no_variant(tmp_path):
    """MiT-B3 is B2 with more blocks in its third stage."""
    deeper = Transformer(VARIANTS["tiny"]._replace(depths=(1, 1, 3, 1)), 5, 3)
    weights = pretrained.read(write(tensors_of(deeper), tmp_path / "b3.pth"))
    with pytest.raises(CheckpointError, match=r"is none of tiny, b0, b1, b2: .*\(1, 1, 3, 1\)"):
        weights.variant(VARIANTS)


def test_no_file(tmp_path):
    for name in ("none.pth", "none.safetensors", "none.pt"):
        with pytest.raises(CheckpointError, match=f"{name}: no such "):
            pretrained.read(tmp_path / name)
