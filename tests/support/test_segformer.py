"""segformer.py: every tensor finds its place, there and back, and the published model is ours."""

import pytest
import torch
import torch.nn.functional as F

from ctclm import VARIANTS, Transformer
from experiments.bench_model import peer
from kernels import collaborative_loss
from support import pretrained, safetensors, segformer

# As they are in files that anybody can download.
PUBLISHED = {
    "original": """
        backbone.patch_embed1.proj.weight backbone.patch_embed4.norm.bias backbone.norm3.weight
        backbone.block1.0.norm1.weight backbone.block1.0.attn.q.bias
        backbone.block3.1.attn.kv.weight backbone.block2.1.attn.sr.weight
        backbone.block1.1.attn.norm.bias
        backbone.block4.0.attn.proj.weight backbone.block4.1.norm2.weight
        backbone.block1.0.mlp.fc1.weight backbone.block1.0.mlp.dwconv.dwconv.weight
        backbone.block1.0.mlp.fc2.bias decode_head.linear_c4.proj.weight
        decode_head.linear_c1.proj.bias decode_head.linear_fuse.conv.weight
        decode_head.linear_fuse.bn.weight decode_head.linear_fuse.bn.running_var
        decode_head.linear_fuse.bn.num_batches_tracked decode_head.linear_pred.weight""",
    "Hugging Face": """
        segformer.encoder.patch_embeddings.0.proj.weight
        segformer.encoder.patch_embeddings.3.layer_norm.bias segformer.encoder.layer_norm.2.weight
        segformer.encoder.block.0.0.layer_norm_1.weight
        segformer.encoder.block.0.0.attention.self.query.bias
        segformer.encoder.block.2.1.attention.self.key.weight
        segformer.encoder.block.2.1.attention.self.value.weight
        segformer.encoder.block.1.1.attention.self.sr.weight
        segformer.encoder.block.0.1.attention.self.layer_norm.bias
        segformer.encoder.block.3.0.attention.output.dense.weight
        segformer.encoder.block.3.1.layer_norm_2.weight
        segformer.encoder.block.0.0.mlp.dense1.weight
        segformer.encoder.block.0.0.mlp.dwconv.dwconv.weight
        segformer.encoder.block.0.0.mlp.dense2.bias decode_head.linear_c.3.proj.weight
        decode_head.linear_c.0.proj.bias decode_head.linear_fuse.weight
        decode_head.batch_norm.weight decode_head.batch_norm.running_var
        decode_head.batch_norm.num_batches_tracked decode_head.classifier.weight""",
}
TINY, TENSORS_OF_B0 = (
    VARIANTS["tiny"],
    {"original": 192, "Hugging Face": 208},
)  # the latter has keys and values apart


def randomised(model):
    """Every parameter and statistic is drawn, or a swap of two that are alike would not show."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, *((0, 0.05) if parameter.dim() > 1 else (0.5, 0.3)))
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("naming", segformer.NAMINGS)
def test_the_names_are_those_of_published_files(naming):
    state = Transformer(VARIANTS["b0"], 6, 3).state_dict()
    found = segformer.to_published(state, naming)
    assert {*PUBLISHED[naming].split()} <= found.keys()
    assert len(found) == TENSORS_OF_B0[naming]


@pytest.mark.parametrize("naming", segformer.NAMINGS)
@pytest.mark.parametrize("variant", ["tiny", "b0"])
def test_there_and_back_is_the_identity(variant, naming):
    state = randomised(Transformer(VARIANTS[variant], 5, 4)).state_dict()
    found, unused = segformer.to_ours(segformer.to_published(state, naming))
    assert unused == [] and found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_both_namings_are_of_the_same_weights():
    state = randomised(Transformer(TINY, 5, 3)).state_dict()
    original, theirs = (segformer.to_published(state, naming) for naming in segformer.NAMINGS)
    kv = original["backbone.block2.0.attn.kv.weight"]
    attention = "segformer.encoder.block.1.0.attention.self"
    assert torch.equal(kv[:64], theirs[f"{attention}.key.weight"])
    assert torch.equal(kv[64:], theirs[f"{attention}.value.weight"])


def test_an_encoder_alone_has_its_names_without_the_models():
    """As in `mit_b0.pth` and in what SegformerModel writes; the classifier is named as unused."""
    state = Transformer(TINY, 5, 3).state_dict()
    for naming, prefix in zip(segformer.NAMINGS, segformer.ENCODER, strict=True):
        tensors = segformer.to_published(state, naming)
        encoder = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
        found, unused = segformer.to_ours(encoder | {"head.weight": torch.zeros(1000, 128)})
        assert found.keys() == {name for name in state if name.startswith("stages.")}
        assert unused == ["head.weight"]


def published_head(tensors, features):
    """The head as published: project with bias, upsample, concatenate, fuse, normalise."""
    size, levels = features[0].shape[-2:], []
    for s in (3, 2, 1, 0):
        linear = (tensors[f"decode_head.linear_c.{s}.proj.{name}"] for name in ("weight", "bias"))
        x = F.linear(features[s].permute(0, 2, 3, 1), *linear).permute(0, 3, 1, 2)
        levels.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
    x = F.conv2d(torch.cat(levels, 1), tensors["decode_head.linear_fuse.weight"])
    norm = [tensors[f"decode_head.batch_norm.{name}"] for name in ("running_mean", "running_var")]
    norm += [tensors[f"decode_head.batch_norm.{name}"] for name in ("weight", "bias")]
    x = F.relu(F.batch_norm(x, *norm))
    classifier = (tensors[f"decode_head.classifier.{name}"] for name in ("weight", "bias"))
    return F.conv2d(x, *classifier)


def test_the_head_is_folded():
    """With biases and a fusion of its own, which ours does not have."""
    ours = randomised(Transformer(TINY, 5, 3))
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    tensors = segformer.to_published(state, "Hugging Face")
    for name in tensors:
        if "linear_c" in name or "linear_fuse" in name:
            tensors[name] = torch.randn(tensors[name].shape) / 10
    ours.load_state_dict(segformer.to_ours(tensors)[0])
    features = [torch.randn(2, C, n, n) for C, n in zip(TINY.channels, (16, 8, 4, 2), strict=True)]
    torch.testing.assert_close(
        ours.head(features), published_head(tensors, features), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "without, sentence",
    [
        ("decode_head.linear_c2.proj.weight", "its head lacks decode_head.linear_c2.proj.weight"),
        ("decode_head.linear_c1.proj.bias", "its head lacks decode_head.linear_c1.proj.bias"),
        ("decode_head.linear_fuse.conv.weight", "lacks decode_head.linear_fuse.conv.weight"),
        (
            "decode_head.linear_fuse.bn.running_mean",
            "lacks decode_head.linear_fuse.bn.running_mean",
        ),
    ],
)
def test_a_head_without_one_of_its_tensors(without, sentence):
    tensors = segformer.to_published(Transformer(TINY, 5, 3).state_dict(), "original")
    del tensors[without]
    with pytest.raises(ValueError, match=sentence):
        segformer.to_ours(tensors)


def test_a_head_whose_tensors_do_not_fit():
    tensors = segformer.to_published(Transformer(TINY, 5, 3).state_dict(), "original")
    tensors["decode_head.linear_fuse.conv.weight"] = torch.zeros(96, 12, 1, 1)
    with pytest.raises(ValueError, match="do not fit together"):
        segformer.to_ours(tensors)


# --- Next to Hugging Face's -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


def both_models(variant, folder, K=5):
    """Theirs with random weights, and ours from the file that it writes."""
    torch.manual_seed(0)
    theirs = randomised(peer(variant, K))
    theirs.save_pretrained(folder)
    ours = Transformer(VARIANTS[variant], K, 3).eval()
    weights = pretrained.read(folder / "model.safetensors")
    assert weights.unused == [] and weights.variant(VARIANTS) == variant
    pretrained.start_from(ours, weights)
    return ours, theirs


@pytest.mark.parametrize("variant", ["tiny", "b0", "b1", "b2"])
def test_logits_are_theirs(transformers, variant, tmp_path):
    ours, theirs = both_models(variant, tmp_path)
    for H, W in ((64, 96), (97, 131)) if variant == "b2" else ((64, 64), (128, 96), (97, 131)):
        images = 255 * torch.rand(2, 3, H, W)
        with torch.no_grad():
            found = ours(images)
            expected = theirs(pixel_values=ours.normalise(images)).logits
        assert found.shape == expected.shape and expected.std() > 0.1
        assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("variant, H, W", [("tiny", 97, 131), ("b0", 64, 96)])
def test_gradients_are_theirs(transformers, variant, H, W, tmp_path):
    """Of the cross entropy at full size, theirs and that of our training loss."""
    ours, theirs = both_models(variant, tmp_path)
    images, labels = 255 * torch.rand(2, 3, H, W), torch.randint(0, 5, (2, H, W))
    labels[:, :9] = 255
    logits = ours(images)
    loss = collaborative_loss(torch.zeros_like(logits), logits, labels).transformer_ce
    loss.backward()
    expected = theirs(pixel_values=ours.normalise(images), labels=labels).loss
    expected.backward()
    assert abs(loss - expected) < 1e-5

    # Their file's names are not those in memory: the gradients go through a file, too.
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    weights = safetensors.read(tmp_path / "model.safetensors")
    theirs.save_pretrained(tmp_path)
    gradients = safetensors.read(tmp_path / "model.safetensors")
    own = {name: parameter.grad for name, parameter in ours.named_parameters()}
    state, _ = segformer.to_ours({k: x for k, x in gradients.items() if "encoder" in k})
    pairs = [(own[name], gradient) for name, gradient in state.items()]
    for module, name in (("norm", "batch_norm"), ("classify", "classifier")):
        for kind in ("weight", "bias"):
            expected = gradients[f"decode_head.{name}.{kind}"]
            pairs.append((own[f"head.{module}.{kind}"], expected))
    parts = weights["decode_head.linear_fuse.weight"][:, :, 0, 0].chunk(4, 1)[::-1]
    for s, F_s in enumerate(parts):  # of F_s P_s, as the file has F_s and P_s
        gradient = F_s.T @ own[f"head.project.{s}.weight"][:, :, 0, 0]
        pairs.append((gradient, gradients[f"decode_head.linear_c.{s}.proj.weight"]))
    assert len(pairs) == len(own)
    for gradient, expected in pairs:
        assert (gradient - expected).norm() <= 1e-3 * expected.norm() + 1e-8
