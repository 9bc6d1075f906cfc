"""infer.py: windows leave no trace, memory is a band, and what is written can be read back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import infer
from checkpoint import CheckpointError
from ctclm import CTCLM, ModelConfig, save_transformer
from data import DataError
from infer import axis_windows, evaluate, predict, predict_classes

ERRORS = (DataError, CheckpointError)


def random_image(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


class Pointwise(nn.Module):
    """Logits from each pixel alone: whatever the windows, its map must be that of one pass."""

    def __init__(self, K=4):
        super().__init__()
        self.conv = nn.Conv2d(3, K, 1)

    def forward(self, images):
        return self.conv(images / 100)


# --- Windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.89])
@pytest.mark.parametrize("window", [32, 64, 96])
def test_weights_sum_to_one_at_every_pixel_of_every_length(window, overlap):
    for length in range(1, 300):
        starts, weights = axis_windows(length, window, overlap)
        # Sums of at most ~10 float64 quotients.
        np.testing.assert_allclose(weights.sum(0), 1, rtol=0, atol=1e-12)
        assert (weights >= 0).all()
        for start, row in zip(starts, weights, strict=True):
            inside = row[start : start + window]
            assert (inside > 0).all() and row.sum() == pytest.approx(inside.sum(), abs=1e-12)
        assert starts[0] == 0 and starts[-1] == max(length - window, 0)
        assert starts == sorted(set(starts))
        gaps = np.diff(starts)
        assert not len(gaps) or gaps.max() <= max(1, round(window * (1 - overlap)))


def test_weights_by_hand():
    """10 pixels, windows of 6, a third shared: starts 0 and 4, a ramp over pixels 4 and 5."""
    starts, weights = axis_windows(10, 6, 1 / 3)
    assert starts == [0, 4]
    expected = [1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0, 0]
    np.testing.assert_allclose(weights, [expected, expected[::-1]])


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("H, W", [(1, 1), (20, 33), (64, 64), (100, 131), (257, 65)])
def test_windows_leave_no_trace(H, W, overlap):
    model, image = Pointwise().eval(), random_image(H, W)
    with torch.no_grad():
        whole = model(torch.from_numpy(image).permute(2, 0, 1)[None].float()).softmax(1)[0]
    bands = list(predict(model, image, window=64, overlap=overlap))
    assert [top for top, _ in bands] == list(np.cumsum([0] + [p.shape[1] for _, p in bands[:-1]]))
    blended = np.concatenate([p for _, p in bands], axis=1)
    # Convex combinations of equal float32 probabilities.
    np.testing.assert_allclose(blended, whole.numpy(), rtol=0, atol=1e-6)


def test_bands_are_no_higher_than_a_window():
    bands = [p.shape for _, p in predict(Pointwise(), random_image(500, 40), window=64)]
    assert max(rows for _, rows, _ in bands) <= 64 and sum(rows for _, rows, _ in bands) == 500


def test_low_resolution_logits_are_upsampled_in_place():
    """A model at stride 4 that says where a bright stripe is: the map has it where it was."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[32:64] = 255

    def student(images):
        bright = nn.functional.avg_pool2d(images[:, :1], 4) / 255
        return torch.cat([1 - bright, bright], 1) * 20

    classes, confidence = predict_classes(student, image, window=64, overlap=0.5)
    assert np.array_equal(classes == 1, image[..., 0] > 0)
    assert confidence.min() >= 0.5 and confidence.max() <= 1 + 1e-6


def test_evaluate_sees_every_scene():
    """A student that is right on half of the pixels, whatever the scene."""
    label = np.tile(np.array([0, 1], np.uint8), (40, 20))
    scenes = [data.Scene(str(i), random_image(40, 40, i), label) for i in range(3)]
    classes = data.Classes(("a", "b"), ((0, 0, 0), (9, 9, 9)))

    def always_a(images):
        return torch.tensor([5.0, 0.0]).view(1, 2, 1, 1).expand(len(images), 2, *images.shape[-2:])

    result = evaluate(always_a, data.Dataset(classes, scenes, []))
    assert result["confusion_matrix"] == [[2400, 0], [2400, 0]]
    assert result["oa"] == 0.5 and result["miou"] == 0.25
    assert "overall accuracy  50.0" in infer.table(result, classes)
    json.dumps(result, allow_nan=False)


# --- The program --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    about = {
        "classes": list(data.POTSDAM.names),
        "colours": [list(colour) for colour in data.POTSDAM.colours],
    }
    save_transformer(CTCLM(ModelConfig(variant="tiny")), path, about)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_maps_are_written(tmp_path, program, best, suffix):
    image = random_image(70, 90)
    Image.fromarray(image).save(tmp_path / f"scene{suffix}")
    out = tmp_path / "maps"
    code, error = program(
        infer.main, ERRORS, best, tmp_path / f"scene{suffix}", "--out", out, "--confidence"
    )
    assert (code, error) == (0, "")
    written = Image.open(out / f"scene_classes{suffix}")
    assert written.mode == "P" and written.size == (90, 70)
    expected, confidence = predict_classes(infer.load_transformer(best), image)
    assert np.array_equal(np.asarray(written), expected)
    palette = written.getpalette()[: 3 * 6]
    assert palette == [value for colour in data.POTSDAM.colours for value in colour]
    grey = np.asarray(Image.open(out / f"scene_confidence{suffix}"))
    assert np.abs(grey / 255 - confidence).max() <= 0.5 / 255 + 1e-6
    assert Image.open(out / "scene_overlay.png").size[0] >= 90


def test_options_may_stand_before_the_image(tmp_path, program, best):
    Image.fromarray(random_image(40, 40)).save(tmp_path / "a.png")
    code, _ = program(
        infer.main, ERRORS, best, "--window", 64, tmp_path / "a.png", "--out", tmp_path / "m"
    )
    assert code == 0 and (tmp_path / "m" / "a_classes.png").exists()


def test_scores_are_printed(tmp_path, program, best, capsys):
    data.write_toy(tmp_path, scenes_per_split=1)
    arguments = (best, "--data", "potsdam", "--root", tmp_path, "--split", "test")
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["infer.py", *map(str, arguments)])
        infer.cli.run(infer.main, *ERRORS)
    out = capsys.readouterr().out
    assert "low vegetation" in out and "overall accuracy" in out and "boundary F1" in out


def bad_call(how, tmp_path, best):
    good = tmp_path / "a.png"
    Image.fromarray(random_image(40, 40)).save(good)
    text = tmp_path / "text.png"
    text.write_text("no image")
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(random_image(40, 40)).save(other / "a.png")
    grey = tmp_path / "grey.png"
    Image.new("L", (40, 40)).save(grey)
    return {
        "no such checkpoint": (tmp_path / "none.pt", good),
        "an image as checkpoint": (good, good),
        "no such image": (best, tmp_path / "none.png"),
        "text as image": (best, text),
        "a folder as image": (best, other),
        "a grey image": (best, grey),
        "two images of one name": (best, good, other / "a.png"),
        "nothing to do": (best,),
        "both jobs": (best, good, "--data", "toy"),
        "window not a multiple": (best, good, "--window", "100"),
        "no window": (best, good, "--window", "0"),
        "all overlap": (best, good, "--overlap", "1"),
        "unknown option": (best, good, "--colour", "red"),
        "not a number": (best, good, "--window", "wide"),
        "no cuda": (best, good, "--device", "cuda"),
        "no root": (best, "--data", "potsdam"),
        "unlabelled split": (best, "--data", "loveda", "--root", tmp_path, "--split", "test"),
    }[how]


FAULTS = {
    "no such checkpoint": "none.pt: no such checkpoint",
    "an image as checkpoint": "a.png: not a checkpoint",
    "no such image": "none.png: no such image",
    "text as image": "text.png: is not a PNG, JPEG or TIFF",
    "a folder as image": "other: is a folder",
    "a grey image": "grey.png: is L, not RGB",
    "two images of one name": "two images are called a",
    "nothing to do": "give images to map, or --data",
    "both jobs": "give images to map, or --data",
    "window not a multiple": "--window must be a positive multiple of 32; got 100",
    "no window": "--window must be a positive multiple of 32; got 0",
    "all overlap": "--overlap must be in",
    "unknown option": "unrecognized arguments: --colour",
    "not a number": "argument --window: invalid int value: 'wide'",
    "no cuda": "has no CUDA GPU",
    "no root": "--data potsdam needs --root",
    "unlabelled split": "holds no Urban",
}


@pytest.mark.parametrize("how", FAULTS)
def test_bad_calls_get_one_sentence_and_exit_2(tmp_path, program, best, how):
    if how == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    code, error = program(infer.main, ERRORS, *bad_call(how, tmp_path, best))
    assert code == 2
    assert FAULTS[how] in error and error.count("\n") == 1 and "Traceback" not in error


def test_another_data_sets_checkpoint_is_refused(tmp_path, program, best):
    (tmp_path / "val/images").mkdir(parents=True), (tmp_path / "val/masks").mkdir()
    (tmp_path / "classes.json").write_text('{"classes": ["road", "house"]}')
    Image.fromarray(random_image(40, 40)).save(tmp_path / "val/images/a.png")
    Image.new("L", (40, 40)).save(tmp_path / "val/masks/a.png")
    code, error = program(infer.main, ERRORS, best, "--data", "folder", "--root", tmp_path)
    assert code == 2 and "was trained on impervious" in error and "has road, house" in error
