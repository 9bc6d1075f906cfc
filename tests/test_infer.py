"""infer.py: maps, scores and submissions as a user gets them, and what is said when they cannot."""

import copy
import functools
import gc
import io
import json
import shutil
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import infer
import kernels
from ctclm import CTCLM, ModelConfig
from infer import (
    load_transformer,
    predict,
    predict_classes,
    probabilities,
    save_transformer,
)
from support import checkpoint, geotiff, pictures, toy
from support.about import About
from support.checkpoint import CheckpointError
from support.images import open_rows
from support.labels import decode_colours
from support.layouts import IGNORE, LOVEDA, POTSDAM, Classes
from support.masks import read_indices
from support.metrics import erode
from support.precision import at_precision
from support.protocols import check_submission
from support.raster import DataError, Rows, read_tags
from support.replay import replayed_on
from support.scenes import BatchSize, axis_windows
from support.segformer import to_published

ERRORS = (DataError, CheckpointError)
SMALL = ("--window", 64)


def random_image(H, W, C=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, C), np.uint8)


def save_model(path, classes, in_channels=3, bands="rgb"):
    torch.manual_seed(0)
    config = ModelConfig(variant="tiny", num_classes=len(classes.names), in_channels=in_channels)
    save_transformer(CTCLM(config), path, About(classes, "toy", bands, step=3, val_miou=0.5))
    return path


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("run") / "best.pt", POTSDAM)


@pytest.fixture(scope="module")
def loveda_best(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("run") / "best.pt", LOVEDA)


@pytest.fixture
def printed(capsys):
    """printed(*arguments) runs infer.py, which must succeed -> stdout."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["infer.py", *map(str, arguments)])
            infer.cli.run(infer.main, *ERRORS)
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out

    return call


# --- Maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_maps_are_written(tmp_path, printed, best, suffix):
    scene, out = tmp_path / f"scene{suffix}", tmp_path / "maps"
    Image.fromarray(random_image(70, 90)).save(scene)
    printed(best, scene, "--out", out, "--confidence", *SMALL)
    image, kind = np.asarray(Image.open(scene)), ".tif" if suffix == ".tif" else ".png"
    written = Image.open(out / f"scene_classes{kind}")
    assert written.mode == "P" and written.size == (90, 70)
    expected, confidence = predict_classes(load_transformer(best), image, window=64)
    assert np.array_equal(np.asarray(written), expected)
    palette = written.getpalette()[: 3 * 6]
    assert palette == [value for colour in POTSDAM.colours for value in colour]
    grey = np.asarray(Image.open(out / f"scene_confidence{kind}"))
    assert np.abs(grey / 255 - confidence).max() <= 0.5 / 255 + 1e-6
    assert Image.open(out / "scene_overlay.png").size[0] >= 90
    assert len([*out.iterdir()]) == 3


def test_what_is_loaded_is_what_was_saved(tmp_path):
    torch.manual_seed(0)
    saved = CTCLM(ModelConfig(variant="tiny", num_classes=6)).transformer.state_dict()
    student = load_transformer(save_model(tmp_path / "best.pt", POTSDAM))
    assert all(torch.equal(saved[name], x) for name, x in student.state_dict().items())
    assert student.about == About(POTSDAM._replace(clutter=None), "toy", "rgb", 3, 0.5)
    assert not student.training  # or an image would be scored by its own statistics


def test_a_map_lies_where_its_image_lies(tmp_path, printed, best, write_tiff):
    place = {33550: (12, [0.5, 0.5, 0.0]), 33922: (12, [0.0, 0.0, 0.0, 3e5, 5e6, 0.0])}
    keys = {34735: (3, [1, 1, 0, 1, 3072, 0, 1, 25833])}
    write_tiff(tmp_path / "a.tif", random_image(40, 50), tags=place | keys | {42113: (2, b"0\0")})
    (tmp_path / "a.tfw").write_text("0.5\n0\n0\n-0.5\n300000.25\n4999999.75\n")
    Image.fromarray(random_image(40, 50)).save(tmp_path / "b.png")
    (tmp_path / "b.pgw").write_text("1\n0\n0\n-1\n0.5\n-0.5\n")
    out = tmp_path / "maps"
    printed(best, tmp_path / "a.tif", tmp_path / "b.png", "--out", out, "--confidence", *SMALL)
    for kind in ("classes", "confidence"):
        tags = read_tags(out / f"a_{kind}.tif")
        assert {tag: tags[tag] for tag in place | keys} == {
            tag: (number, tuple(values)) for tag, (number, values) in (place | keys).items()
        }
        assert tags[42113] == (2, b"255\0" if kind == "classes" else b"0\0")
        for name, side in ((f"a_{kind}.tfw", "a.tfw"), (f"b_{kind}.pgw", "b.pgw")):
            assert (out / name).read_bytes() == (tmp_path / side).read_bytes()


def test_where_there_is_no_data_the_map_has_none_and_else_it_is_the_same(
    tmp_path, printed, best, write_tiff
):
    """Bit for bit, and the shares are those of the pixels with data."""
    image, alpha = random_image(150, 100), np.full((150, 100, 1), 255, np.uint8)
    alpha[:80] = alpha[:, 70:] = 0
    write_tiff(tmp_path / "a.tif", np.dstack([image, alpha]), rows=7, tags={338: (3, [2])})
    Image.fromarray(image).save(tmp_path / "b.png")
    out, arguments = tmp_path / "maps", ("--confidence", *SMALL)
    text = printed(best, tmp_path / "a.tif", tmp_path / "b.png", "--out", out, *arguments)
    valid = alpha[..., 0] > 0
    for kind, none in (("classes", IGNORE), ("confidence", 0)):
        with_holes = read_indices(out / f"a_{kind}.tif")
        assert (with_holes[~valid] == none).all()
        assert np.array_equal(with_holes[valid], read_indices(out / f"b_{kind}.png")[valid])
    shares = np.bincount(read_indices(out / "a_classes.tif")[valid], minlength=6) / valid.sum()
    first, second, _ = text.splitlines()
    expected = zip(POTSDAM.names, shares, strict=True)
    assert first.endswith(", ".join(f"{name} {share:.1%}" for name, share in expected))
    assert second == "  no data at 67.3% of the pixels: 255 in the map"
    student, options = load_transformer(best), {"window": 64, "overlap": 0.5}
    found = predict_classes(student, open_rows(tmp_path / "a.tif"), **options)
    whole = predict_classes(student, image, **options)
    for with_holes, without, none in zip(found, whole, (IGNORE, 0), strict=True):
        assert (with_holes[~valid] == none).all()
        assert np.array_equal(with_holes[valid], without[valid])
    parts = [p for _, p in predict(student, open_rows(tmp_path / "a.tif"), **options)]
    sums = np.concatenate(parts, axis=1).sum(0)
    assert (sums[~valid] == 0).all() and np.allclose(sums[valid], 1, atol=1e-5)  # float32


def test_a_map_of_four_bands(tmp_path, printed, write_tiff):
    best = save_model(tmp_path / "best.pt", POTSDAM, in_channels=4, bands="rgbir")
    image = random_image(64, 64, 4)
    out = printed(best, write_tiff(tmp_path / "a.tif", image), "--out", tmp_path / "m", *SMALL)
    assert "was trained on rgbir: the images' bands are taken for these" in out
    expected, _ = predict_classes(load_transformer(best), image, window=64)
    assert np.array_equal(read_indices(tmp_path / "m/a_classes.tif"), expected)
    blind, _ = predict_classes(
        load_transformer(best), image * np.array([1, 1, 1, 0], np.uint8), window=64
    )
    assert not np.array_equal(blind, expected)  # the fourth band is seen


def test_tta_is_another_map(tmp_path, printed, best):
    Image.fromarray(random_image(64, 64)).save(tmp_path / "a.png")
    printed(best, tmp_path / "a.png", "--out", tmp_path / "m", "--tta", *SMALL)
    expected, _ = predict_classes(load_transformer(best), random_image(64, 64), window=64, tta=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "m/a_classes.png")), expected)


class Greys(torch.nn.Module):
    """A student that costs nothing: dark, bright and what lies between."""

    classes = Classes(("a", "b", "c"), ((0, 0, 0), (99, 99, 99), (255, 0, 0)))
    about = About(classes, "toy", "rgb", step=1, val_miou=0.5)

    def forward(self, images):
        levels = torch.tensor([0.0, 128.0, 255.0]).view(1, 3, 1, 1)
        return -((images[:, :1] - levels).abs()) / 10


class Counting(Greys):
    """Now and then it counts the bytes in all tensors there are: Python knows of numpy's only."""

    def __init__(self):
        super().__init__()
        self.calls, self.most = 0, 0

    def forward(self, images):
        self.calls += 1
        if self.calls % 20 == 10:
            tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
            held = [x.untyped_storage() for x in tensors if x.layout == torch.strided]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in held}
            self.most = max(self.most, sum(sizes.values()))
        return super().forward(images)


def test_memory_is_that_of_a_row_of_windows_however_high_the_scene(
    tmp_path, write_tiff, monkeypatch
):
    """All that Python and numpy allocate from reading to writing, for a scene ten times as high."""
    monkeypatch.setattr(pictures, "LARGEST_OVERLAY", 64)
    monkeypatch.setattr(geotiff, "BLOCK_SIZE", 2**12)
    one_at_a_time = threading.Lock()  # a block that is compressed takes 0.27 MB, whatever its size

    def alone(compress):
        def compress_alone(self, rows):
            with one_at_a_time:
                return compress(self, rows)

        return compress_alone

    for writer in (geotiff.TiffWriter, geotiff.PngWriter):
        monkeypatch.setattr(writer, "compress", alone(writer.compress))
    options, peaks, tensors = {"window": 64, "overlap": 0.25, "device": "cpu"}, [], []
    for height in (640, 640, 6400):  # the first time is a warm-up
        image = random_image(height, 96)
        path = write_tiff(tmp_path / f"{height}.tif", image, rows=16, deflate=True)
        tracemalloc.start()
        infer.write_map(Greys(), path, tmp_path, True, options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        student = Counting()
        expected, _ = predict_classes(student, image, window=64)
        assert np.array_equal(read_indices(tmp_path / f"{height}_classes.tif"), expected)
        tensors.append(student.most)
    # What grows are the places of the strips and a row of weights a window, 0.2 MB of 5760 rows:
    # less than 0.8 bytes a pixel, so no array of the scene's size is held anywhere.
    assert peaks[2] - peaks[1] < 0.8 * (6400 - 640) * 96, peaks
    assert tensors[1] > 0 and tensors[2] - tensors[1] < 0.8 * (6400 - 640) * 96, tensors


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_an_interrupted_map_leaves_nothing(tmp_path, program, best, monkeypatch, suffix):
    Image.fromarray(random_image(200, 64)).save(tmp_path / f"a{suffix}")
    predict_parts = infer.predict_parts

    def interrupted(*arguments, **options):
        yield next(predict_parts(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "predict_parts", interrupted)
    arguments = (best, tmp_path / f"a{suffix}", "--out", tmp_path / "m", "--confidence", *SMALL)
    assert program(infer.main, ERRORS, *arguments)[0] == 130
    assert not [*(tmp_path / "m").iterdir()]


def test_options_may_stand_before_the_image(tmp_path, printed, best):
    Image.fromarray(random_image(40, 40)).save(tmp_path / "a.png")
    printed(best, *SMALL, tmp_path / "a.png", "--out", tmp_path / "m")
    assert (tmp_path / "m" / "a_classes.png").exists()


# --- Scores -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def potsdam(tmp_path_factory):
    """One toy tile a split in Potsdam's layout, 96 x 80, with full and with eroded labels."""
    root = tmp_path_factory.mktemp("potsdam")
    toy.write_files(root, scenes_per_split=1)
    (root / "5_Labels_all_noBoundary").mkdir()
    for path in root.glob("*/*.tif"):
        with Image.open(path) as image:
            piece = np.asarray(image)[:96, :80].copy()
        Image.fromarray(piece).save(path)
        if path.parent.name == "5_Labels_all":
            label = decode_colours(piece, POTSDAM.colours)
            piece[erode(label).numpy() == IGNORE] = 0
            name = path.name.replace("_label", "_label_noBoundary")
            Image.fromarray(piece).save(root / "5_Labels_all_noBoundary" / name)
    return root


@pytest.fixture
def small_patches(monkeypatch):
    """GeoSeg's patches of 64 instead of 1024 pixels, mmsegmentation's crops of 50."""
    monkeypatch.setattr(infer, "evaluate", functools.partial(infer.evaluate, patch=64, crop=50))


def test_scores_are_printed(potsdam, printed, best):
    out = printed(best, "--data", "potsdam", "--root", potsdam, "--split", "test", *SMALL)
    for words in ("low vegetation", "overall accuracy", "boundary F1", "on potsdam, test split"):
        assert words in out
    assert "mmseg" not in out and "orientation" not in out


def test_every_protocol_is_printed_and_kept(tmp_path, potsdam, printed, best, small_patches):
    arguments = (best, "--data", "potsdam", "--root", potsdam, "--out", tmp_path / "s", "--tta")
    out = printed(*arguments, "--protocol", "all", *SMALL)
    assert out.index("one orientation") < out.index("averaged over eight orientations")
    entry = json.loads((tmp_path / "s/metrics.json").read_text())
    assert entry["data"] == "potsdam" and entry["split"] == "val" and entry["scenes"] == 1
    names = ["full", "full-no-clutter", "full-clutter-dropped"]
    names += [name.replace("full", "eroded") for name in names]
    names += ["geoseg", "geoseg-padding", "mmseg"]
    for kind in ("plain", "tta"):
        rows = {row["name"]: row for row in entry[kind]["conventions"]}
        assert list(rows) == names
        for row in rows.values():
            line = f"    {row['meaning']}; {row['pixels']:,} pixels of 1 scene\n"
            assert out.count(line) == 2  # below its numbers, of each kind
        # 96 x 80 is padded to 128 x 128; in crops of 50, 4 rows and 20 columns count twice
        assert rows["full"]["pixels"] == 96 * 80 > rows["eroded"]["pixels"]
        assert rows["geoseg-padding"]["pixels"] == rows["geoseg"]["pixels"] + 128**2 - 96 * 80
        assert 0 < rows["mmseg"]["pixels"] - rows["eroded"]["pixels"] <= 100 * 100 - 96 * 80
        assert rows["full"]["miou"] == entry[kind]["miou"]
    assert entry["plain"]["miou"] != entry["tta"]["miou"]


def test_protocols_of_only_eroded_labels(tmp_path, potsdam, printed, best, small_patches):
    for folder in ("2_Ortho_RGB", "5_Labels_all_noBoundary"):
        shutil.copytree(potsdam / folder, tmp_path / folder)
    out = printed(best, "--data", "potsdam", "--root", tmp_path, "--protocol", "geoseg", *SMALL)
    assert "only the label with eroded boundaries is there" in out
    assert "geoseg-padding" in out and "full labels" not in out and "mmseg" not in out


def write_loveda(root, splits=("Val",), numbers=(1, 2), size=(40, 48)):
    rng = np.random.default_rng(0)
    for split in splits:
        for number, domain in zip(numbers, ("Urban", "Rural"), strict=True):
            for kind in ("images_png", "masks_png") if split != "Test" else ("images_png",):
                (root / split / domain / kind).mkdir(parents=True)
                array = rng.integers(0, *((256, (*size, 3)) if kind[0] == "i" else (8, size)))
                path = root / split / domain / kind / f"{number}.png"
                Image.fromarray(array.astype(np.uint8)).save(path)
    return root


def test_loveda_is_scored_per_domain(tmp_path, printed, loveda_best):
    write_loveda(tmp_path)
    arguments = (loveda_best, "--data", "loveda", "--root", tmp_path, "--protocol", "all", *SMALL)
    out = printed(*arguments, "--out", tmp_path / "s")
    entry = json.loads((tmp_path / "s/metrics.json").read_text())["plain"]
    assert set(entry["domains"]) == {"urban", "rural"}
    assert "\nurban  " in out and "\nrural  " in out
    assert [row["name"] for row in entry["conventions"]] == ["full"]


# --- LoveDA's submission ------------------------------------------------------------------------


def test_the_submission(tmp_path, printed, loveda_best, monkeypatch):
    monkeypatch.setattr("support.protocols.LOVEDA_TEST", range(4191, 4193))
    write_loveda(tmp_path, ("Test",), (4191, 4192))
    target = tmp_path / "out" / "loveda.zip"
    arguments = (loveda_best, "--data", "loveda", "--root", tmp_path, "--submission", target)
    assert "2 single-band PNGs with values 0..6, read back" in printed(*arguments, *SMALL)
    with zipfile.ZipFile(target) as archive:
        assert sorted(archive.namelist()) == ["4191.png", "4192.png"]
        image = Image.open(io.BytesIO(archive.read("4192.png")))
    scene = np.asarray(Image.open(tmp_path / "Test/Rural/images_png/4192.png"))
    expected, _ = predict_classes(load_transformer(loveda_best), scene, window=64)
    assert image.mode == "L" and np.array_equal(np.asarray(image), expected)
    assert [*target.parent.iterdir()] == [target]


def grey(values, mode="L"):
    picture = io.BytesIO()
    Image.fromarray(np.array(values, np.uint8)).convert(mode).save(picture, "PNG")
    return picture.getvalue()


SUBMISSIONS = {
    "a name missing": ([("1.png", grey([[6]]))], "holds 1 files, not 2: look at 2.png"),
    "a folder": ([("a/1.png", grey([[0]])), ("2.png", grey([[0]]))], "look at 1.png"),
    "a name too many": ([(f"{n}.png", grey([[0]])) for n in (1, 2, 3)], "look at 3.png"),
    "a name twice": ([(f"{n}.png", grey([[0]])) for n in (1, 2, 2)], "look at 2.png"),
    "a value too high": ([("1.png", grey([[6]])), ("2.png", grey([[7]]))], "2.png is L, .*up to 7"),
    "another size": ([("1.png", grey([[6]])), ("2.png", grey([[1, 1]]))], r"2.png is L, \(1, 2\)"),
    "colours": ([("1.png", grey([[6]])), ("2.png", grey([[1]], "RGB"))], "2.png is RGB"),
    "a palette": ([("1.png", grey([[6]], "P")), ("2.png", grey([[1]]))], "1.png is P"),
}


@pytest.mark.parametrize("how", SUBMISSIONS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_submission_the_server_would_refuse_is_refused_here(tmp_path, how):
    files, message = SUBMISSIONS[how]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
    with pytest.raises(DataError, match=message):
        check_submission(file, "s.zip", {"1.png": (1, 1), "2.png": (1, 1)}, 7)


def test_a_submission_that_fails_its_check_does_not_appear(
    tmp_path, program, loveda_best, monkeypatch
):
    monkeypatch.setattr("support.protocols.LOVEDA_TEST", range(1, 3))
    write_loveda(tmp_path, ("Test",))
    monkeypatch.setattr(infer, "predict_classes", lambda *_, **__: (np.full((40, 48), 7, "u1"), 0))
    arguments = ("--data", "loveda", "--root", tmp_path, "--submission", tmp_path / "s.zip")
    code, error = program(infer.main, ERRORS, loveda_best, *arguments)
    assert code == 2 and "up to 7; expected one band, (40, 48), up to 6" in error
    assert not [*tmp_path.glob("*s.zip*")]


BAD_BEST = {
    "no config": {"config": None},
    "another variant": {"config": {"variant": "b9", "num_classes": 6, "in_channels": 3}},
    "other classes": {"config": {"variant": "tiny", "num_classes": 5, "in_channels": 3}},
    "no about": {"about": None},
    "a weight alone": {"model": {"stages.0.embed.weight": torch.zeros(32, 3, 7, 7)}},
}


@pytest.mark.parametrize("how", BAD_BEST)
def test_a_best_whose_parts_do_not_fit_gets_one_sentence(tmp_path, best, how):
    contents = checkpoint.read(best, "ctclm-transformer") | BAD_BEST[how]
    checkpoint.save(contents, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="bad.pt: its weights, config and about do not fit"):
        load_transformer(tmp_path / "bad.pt")


# --- Published weights, and export ----------------------------------------------------------------


def write_published(path, K=3, variant="tiny", head=True):
    """SegFormer's weights by the authors' names, as `.pth`."""
    model = CTCLM(ModelConfig(variant=variant, num_classes=K)).transformer
    tensors = to_published(model.state_dict(), "original")
    if not head:
        tensors = {k: x for k, x in tensors.items() if not k.startswith("decode_head")}
    torch.save({"state_dict": tensors}, path)
    return model.eval()


def test_published_weights_draw_maps(tmp_path, printed):
    """Their classes have no names: they are numbered."""
    model = write_published(tmp_path / "segformer.pth")
    Image.fromarray(random_image(64, 96)).save(tmp_path / "a.png")
    out = printed(tmp_path / "segformer.pth", tmp_path / "a.png", "--out", tmp_path, *SMALL)
    assert "class 0 " in out and "class 2 " in out
    expected, _ = predict_classes(model, random_image(64, 96), window=64)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a_classes.png")), expected)


def test_a_published_encoder_gives_features_and_no_map(tmp_path, program):
    model = write_published(tmp_path / "mit.pth", head=False)
    images = 255 * torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(
        load_transformer(tmp_path / "mit.pth").encode(images), model.encode(images), strict=True
    ):
        assert torch.equal(ours, theirs)
    Image.fromarray(random_image(64, 96)).save(tmp_path / "a.png")
    code, error = program(infer.main, ERRORS, tmp_path / "mit.pth", tmp_path / "a.png")
    assert code == 2 and "mit.pth: has no head; train.py --pretrained takes it" in error


def test_the_exported_weights_are_read_again(tmp_path, printed, best):
    """By Hugging Face's names; and no kernel of ours is in what is exported."""
    path = tmp_path / "new" / "roads.safetensors"
    assert f"{path}: 3" in printed(best, "--export", path)
    again, first = load_transformer(path), load_transformer(best)
    assert again.about == first.about
    again, first = again.state_dict(), first.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_no_kernel_of_ours_is_exported(tmp_path, printed, best, monkeypatch):
    seen = []

    def spy(model, path, about):
        seen.append((kernels.choose._forced, about["classes"], model.training))
        path.touch()

    monkeypatch.setattr(infer, "export", spy)
    with kernels.force("triton"):
        printed(best, "--export", tmp_path / "x.pt2")
    assert seen == [("pytorch", list(POTSDAM.names), False)]


# --- Bad calls ----------------------------------------------------------------------------------


def bad_call(how, tmp_path, best, write_tiff):
    good = tmp_path / "a.png"
    Image.fromarray(random_image(40, 40)).save(good)
    weights = tmp_path / "text.pth"
    weights.write_text("hello")
    text = tmp_path / "text.png"
    text.write_text("no image")
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(random_image(40, 40)).save(other / "a.png")
    grey = tmp_path / "grey.png"
    Image.new("L", (40, 40)).save(grey)
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:-500])
    tiff = tmp_path / "x.tif"
    if how == "a truncated TIFF":
        Image.fromarray(random_image(40, 40)).save(tiff)
        tiff.write_bytes(tiff.read_bytes()[:-7])
    elif how == "16 bits":
        write_tiff(tiff, random_image(40, 40).astype(np.uint16))
    elif how == "five bands":
        write_tiff(tiff, random_image(40, 40, 5))
    elif how == "infrared":
        write_tiff(tiff, random_image(40, 40, 4))
    elif how == "transparency":
        write_tiff(tiff, random_image(40, 40, 4), tags={338: (3, [2])})
    elif how == "two pages":
        page = Image.fromarray(random_image(40, 40))
        page.save(tiff, save_all=True, append_images=[page])
    to_loveda = ("--data", "loveda", "--root", tmp_path)
    zipped = ("--submission", tmp_path / "s.zip")
    if how in ("not the test set", "an image of another name"):
        number = (4191, 4192) if how == "not the test set" else (4191, 77)
        write_loveda(tmp_path, ("Test",), number)
    elif how == "unlabelled split":
        write_loveda(tmp_path, ("Test",))
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
        "no batch": (best, good, "--batch", "0"),
        "half precision on a CPU": (best, good, "--precision", "fp16", "--device", "cpu"),
        "all overlap": (best, good, "--overlap", "1"),
        "unknown option": (best, good, "--colour", "red"),
        "not a number": (best, good, "--window", "wide"),
        "no cuda": (best, good, "--device", "cuda"),
        "no root": (best, "--data", "potsdam"),
        "a truncated TIFF": (best, tiff),
        "a truncated PNG": (best, cut),
        "16 bits": (best, tiff),
        "five bands": (best, tiff),
        "infrared": (best, tiff),
        "two pages": (best, tiff),
        "one bad image of two": (best, good, grey),
        "a file as folder": (best, good, "--out", text),
        "protocol of images": (best, good, "--protocol", "all"),
        "cache of images": (best, good, "--cache", tmp_path),
        "split of images": (best, good, "--split", "val"),
        "root of images": (best, good, "--root", tmp_path),
        "confidence of scores": (best, "--data", "toy", "--confidence"),
        "unknown protocol": (best, "--data", "toy", "--protocol", "mine"),
        "no eroded labels": (best, "--data", "toy", "--protocol", "geoseg", *SMALL),
        "submission of potsdam": (best, "--data", "potsdam", "--root", tmp_path, *zipped),
        "submission of images": (best, good, *zipped),
        "submission of val": (best, *to_loveda, *zipped, "--split", "val"),
        "submission with scores": (best, *to_loveda, *zipped, "--protocol", "all"),
        "submission is no zip": (best, *to_loveda, "--submission", tmp_path / "s.tar"),
        "no test images": (best, *to_loveda, *zipped),
        "not the test set": (best, *to_loveda, *zipped),
        "an image of another name": (best, *to_loveda, *zipped),
        "unlabelled split": (best, *to_loveda, "--split", "test"),
        "export and maps": (best, good, "--export", tmp_path / "x.pt2"),
        "export to a zip": (best, "--export", tmp_path / "x.zip"),
        "export with orientations": (best, "--export", tmp_path / "x.pt2", "--tta"),
        "export in bf16": (best, "--export", tmp_path / "x.pt2", "--precision", "bf16"),
        "export with windows": (best, "--export", tmp_path / "x.pt2", *SMALL),
        "published weights that are none": (weights, good),
        "empty data set": (best, *to_loveda, "--split", "val"),
    }[how]


FAULTS = {
    "no such checkpoint": "none.pt: no such checkpoint",
    "an image as checkpoint": "a.png: not a checkpoint",
    "no such image": "none.png: no such image",
    "text as image": "text.png: is not a PNG, JPEG or TIFF",
    "a folder as image": "other: is a folder",
    "a grey image": "grey.png: is L, not RGB",
    "two images of one name": "two images are called a",
    "nothing to do": "give images to map, --data to score on, or --export",
    "both jobs": "give images to map, --data to score on, or --export",
    "window not a multiple": "--window must be a positive multiple of 32; got 100",
    "no window": "--window must be a positive multiple of 32; got 0",
    "no batch": "--batch must be positive; got 0",
    "half precision on a CPU": "--precision fp16 is for a GPU",
    "all overlap": "--overlap must be in",
    "unknown option": "unrecognized arguments: --colour",
    "not a number": "argument --window: invalid int value: 'wide'",
    "no cuda": "has no CUDA GPU",
    "no root": "--data potsdam needs --root",
    "a truncated TIFF": "x.tif: is truncated (7 bytes are missing)",
    "a truncated PNG": "cut.png: is damaged",
    "16 bits": "x.tif: has 16 bits per band; train.py --stretch 2 98 takes 16 bits",
    "five bands": "x.tif: has 5 bands; an image has 3, or 4 with infrared",
    "infrared": "x.tif: has 4 bands, but ",
    "two pages": "x.tif: holds more than one image",
    "one bad image of two": "grey.png: is L, not RGB",
    "a file as folder": "text.png: must be a folder, but there is a file",
    "protocol of images": "--protocol goes with --data, not with images",
    "cache of images": "--cache goes with --data, not with images",
    "split of images": "--split goes with --data, not with images",
    "root of images": "--root goes with --data, not with images",
    "confidence of scores": "--confidence goes with images, not with --data",
    "unknown protocol": "argument --protocol: invalid choice: 'mine'",
    "no eroded labels": "--protocol geoseg: takes labels with eroded boundaries",
    "submission of potsdam": "--submission is for --data loveda",
    "submission of images": "--submission goes with --data, not with images",
    "submission of val": "--submission is of the test split",
    "submission with scores": "--protocol does not go with --submission",
    "submission is no zip": "--submission must end in .zip",
    "no test images": "holds no Urban",
    "not the test set": "is not LoveDA's test set of 1796 images: 4193.png is missing",
    "an image of another name": "is not LoveDA's test set of 1796 images: 4192.png is missing",
    "unlabelled split": "has no labels to score against",
    "export and maps": "give images to map, --data to score on, or --export (one of the three)",
    "export to a zip": "--export must end in .pt2, .onnx, .safetensors; got ",
    "export with orientations": "--tta does not go with --export",
    "export in bf16": "--precision does not go with --export",
    "export with windows": "--window does not go with --export",
    "published weights that are none": "text.pth: not a file of weights",
    "empty data set": "holds no Urban",
}


@pytest.mark.parametrize("how", FAULTS)
def test_bad_calls_get_one_sentence_and_exit_2(
    tmp_path, program, best, loveda_best, write_tiff, how, monkeypatch
):
    if how == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    monkeypatch.chdir(tmp_path)
    arguments = bad_call(how, tmp_path, best, write_tiff)
    if "loveda" in arguments:
        arguments = (loveda_best, *arguments[1:])
    code, error = program(infer.main, ERRORS, *arguments)
    assert code == 2
    assert FAULTS[how] in error and error.count("\n") == 1 and "Traceback" not in error
    assert not [*tmp_path.glob("**/*_classes*"), *tmp_path.glob("**/.*")]


def test_another_data_sets_checkpoint_is_refused(tmp_path, program, best, write_folder):
    write_folder(tmp_path / "mine")
    code, error = program(infer.main, ERRORS, best, "--data", "folder", "--root", tmp_path / "mine")
    assert code == 2 and "was trained on impervious" in error and "has a, b, c" in error


def test_the_bands_of_a_checkpoint_are_named(tmp_path, program, loveda_best, write_tiff):
    write_tiff(tmp_path / "x.tif", random_image(40, 40, 4))
    code, error = program(infer.main, ERRORS, loveda_best, tmp_path / "x.tif")
    assert code == 2 and error.endswith("was trained on 3 (rgb)\n")


# --- A whole scene, window by window -------------------------------------------------------------


class Pointwise(nn.Module):
    """Logits from each pixel alone: whatever the windows, its map must be that of one pass."""

    def __init__(self, K=4):
        super().__init__()
        self.conv = nn.Conv2d(3, K, 1)

    def forward(self, images):
        return self.conv(images / 100)


def untrained():
    """The deployed student, with initial weights: its padding makes it depend on the window."""
    return CTCLM(ModelConfig(variant="tiny")).transformer.eval()


# --- Windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("H, W", [(1, 1), (20, 33), (64, 64), (100, 131), (257, 65)])
def test_windows_leave_no_trace(H, W, overlap):
    model, image = Pointwise().eval(), random_image(H, W)
    with torch.no_grad():
        whole = model(torch.from_numpy(image).permute(2, 0, 1)[None].float()).softmax(1)[0]
    parts = list(predict(model, image, window=64, overlap=overlap))
    assert [top for top, _ in parts] == list(np.cumsum([0] + [p.shape[1] for _, p in parts[:-1]]))
    blended = np.concatenate([p for _, p in parts], axis=1)
    # Convex combinations of equal float32 probabilities.
    np.testing.assert_allclose(blended, whole.numpy(), rtol=0, atol=1e-6)


def written_out(model, image, window, overlap, tta):
    """Class probabilities (K, H, W): one window at a time, in numpy, the whole scene in memory."""

    def softmax_of(pixels):
        H, W = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, -H % 32), (0, -W % 32), (0, 0)), "symmetric")
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        logits = nn.functional.interpolate(model(images), images.shape[-2:], mode="bilinear")
        return logits.softmax(dim=1)[0, :, :H, :W].numpy()

    def of_eight(pixels):
        total = 0
        for quarter in range(4):
            turned = np.rot90(pixels, quarter)
            p = softmax_of(turned) + softmax_of(turned[:, ::-1])[:, :, ::-1]
            total = total + np.rot90(p, -quarter, axes=(1, 2))
        return total / np.float32(8)

    H, W = image.shape[:2]
    rows, row_weights = axis_windows(H, window, overlap)
    columns, column_weights = axis_windows(W, window, overlap)
    h, w = min(window, H), min(window, W)
    scene = np.zeros((6, H, W), np.float32)
    for top, of_row in zip(rows, row_weights, strict=True):
        blended = np.zeros((6, h, W), np.float32)
        for left, of_column in zip(columns, column_weights, strict=True):
            pixels = image[top : top + h, left : left + w]
            p = of_eight(pixels) if tta else softmax_of(pixels)
            weights = np.outer(of_row, of_column).astype(np.float32)
            blended[:, :, left : left + w] += p * weights
        scene[:, top : top + h] += blended
    return scene


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("H, W, overlap", [(20, 33, 0.25), (64, 150, 0.5), (150, 110, 0.25)])
@torch.no_grad()
def test_on_a_cpu_every_bit_is_that_of_the_plain_computation(H, W, overlap, tta):
    student, image = untrained(), random_image(H, W)
    expected = written_out(student, image, 64, overlap, tta)
    options = {"window": 64, "overlap": overlap, "tta": tta}
    found = np.concatenate([p for _, p in predict(student, image, **options)], axis=1)
    assert np.array_equal(found, expected)
    classes, confidence = predict_classes(student, image, **options)
    assert np.array_equal(classes, expected.argmax(axis=0))
    assert np.array_equal(confidence, expected.max(axis=0))


@pytest.mark.parametrize("batch, tta", [(2, False), (5, True), (100, False)])
def test_the_batch_changes_nothing(batch, tta):
    """But the last bits of a float: batches reach over rows of windows, and the last is smaller."""
    student, image, sizes = untrained(), random_image(150, 150), []

    def watched(images):
        sizes.append(len(images))
        return student(images)

    options = {"window": 64, "tta": tta}
    expected = np.concatenate([p for _, p in predict(student, image, **options)], axis=1)
    parts = predict(watched, image, batch=batch, **options)
    found = np.concatenate([p for _, p in parts], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    times = 8 if tta else 1
    assert sizes == [
        n for n in {2: [2] * 4 + [1], 5: [5, 4], 100: [9]}[batch] for _ in range(times)
    ]


def test_parts_are_no_higher_than_a_window():
    parts = [p.shape for _, p in predict(Pointwise(), random_image(500, 40), window=64)]
    assert max(rows for _, rows, _ in parts) <= 64 and sum(rows for _, rows, _ in parts) == 500


def test_low_resolution_logits_are_upsampled_in_place():
    """A model at stride 4 that says where a bright stripe is: the map has it where it was."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[8:64] = 255  # begins near the edge of a window, where aligned corners would move it

    def student(images):
        bright = nn.functional.avg_pool2d(images[:, :1], 4) / 255
        return torch.cat([1 - bright, bright], 1) * 20

    classes, confidence = predict_classes(student, image, window=64, overlap=0.5)
    assert np.array_equal(classes == 1, image[..., 0] > 0)
    assert confidence.min() >= 0.5 and confidence.max() <= 1 + 1e-6


def test_a_small_tile_is_mirrored():
    """Up to a multiple of 32: black pixels would be something to see."""
    tile, seen = random_image(20, 33), []

    def student(images):
        seen.append(images)
        return images[:, :2]

    assert probabilities(student, torch.from_numpy(tile)[None]).shape == (1, 2, 20, 33)
    image = seen[0][0].permute(1, 2, 0).numpy()
    assert image.shape == (32, 64, 3) and np.array_equal(image[:20, :33], tile)
    assert np.array_equal(image[20:], image[8:20][::-1])
    assert np.array_equal(image[:, 33:], image[:, 2:33][:, ::-1])


# --- Precision and memory of the device ---------------------------------------------------------


class Narrow(nn.Module):
    """A GPU that holds only `most` windows, and class 1 everywhere."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, images):
        if len(images) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return torch.stack([0 * images[:, 0], 9 + 0 * images[:, 0]], dim=1)


def test_a_batch_that_does_not_fit_is_halved_for_all_scenes_to_come(capsys):
    batch, image = BatchSize(16), random_image(200, 200)
    for _ in range(2):
        classes, _ = predict_classes(Narrow(3), image, window=64, batch=batch)
        assert (classes == 1).all() and batch.size == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{n} windows at a time do not fit into the GPU's memory; going on with {n // 2}"
        for n in (16, 8, 4)
    ]


def test_one_window_that_does_not_fit_ends_in_a_sentence():
    with pytest.raises(infer.cli.UsageError, match="not hold one window of the scene; infer.py"):
        predict_classes(Narrow(0), random_image(64, 64), window=64, batch=4)


def test_rows_that_do_not_fit_end_in_a_sentence(tmp_path, program, best, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(infer, "write_maps", full)
    code, error = program(infer.main, ERRORS, best, tmp_path / "a.png", *SMALL)
    assert code == 2 and "does not hold a scene's rows; take a smaller --window" in error


def test_logits_that_are_not_finite_are_no_map(tmp_path, program, best, monkeypatch):
    """What half precision makes of weights that are too large for it."""
    Image.fromarray(random_image(40, 40)).save(tmp_path / "a.png")
    load = infer.load_transformer

    def too_large(path):
        student = load(path)
        student.head.classify.bias.data[2] = torch.inf
        return student

    monkeypatch.setattr(infer, "load_transformer", too_large)
    arguments = (best, tmp_path / "a.png", "--out", tmp_path / "m", *SMALL)
    code, error = program(infer.main, ERRORS, *arguments)
    assert code == 2 and "the logits are not finite; infer.py --precision fp32" in error
    assert not [*(tmp_path / "m").iterdir()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_draws_the_same_map():
    """As a CPU but for 0.5 % of its pixels, at each precision: a student with decided opinions."""
    student, (image, _) = untrained(), toy.scene(0)
    with torch.no_grad():
        student.head.classify.weight *= 30
    with kernels.force("pytorch"):
        expected, _ = predict_classes(student, image, window=128)
    assert np.bincount(expected.ravel(), minlength=6).max() < 0.9 * expected.size
    for precision in ("fp32", "auto"):
        on_gpu = at_precision(copy.deepcopy(student).cuda(), precision)
        on_gpu.forward = replayed_on(torch.device("cuda"), on_gpu.forward)  # as main does
        for batch in (1, 5, None):
            found, _ = predict_classes(on_gpu, image, window=128, device="cuda", batch=batch)
            assert (found != expected).mean() < 0.005, (precision, batch)


# --- Files --------------------------------------------------------------------------------------


class Watched(Rows):
    """An image that notes which rows it was asked for."""

    def __init__(self, image):
        self.image, self.shape, self.spans = image, image.shape, []

    def read(self, top, bottom):
        self.spans.append((top, bottom))
        return self.image[top:bottom]


def test_at_most_one_row_of_windows_is_read_ahead():
    image = Watched(random_image(300, 80))
    for top, p in predict(Pointwise(), image, window=64, overlap=0.25):
        assert image.spans[-1][0] <= top + 48 and p.shape[1] <= 64  # one row is read ahead
    assert image.spans == [(top, top + 64) for top in (0, 48, 96, 144, 192)] + [(236, 300)]


def test_how_the_file_is_cut_changes_no_bit(tmp_path, write_tiff):
    student, image = untrained(), random_image(150, 110)
    options = {"window": 64, "overlap": 0.25}
    expected = np.concatenate([p for _, p in predict(student, image, **options)], axis=1)
    layouts = {
        "one strip": {},
        "strips": {"rows": 7, "deflate": True},
        "tiles": {"tile": (16, 48), "deflate": True},
        "planes": {"rows": 1, "planar": True},
    }
    for name, layout in layouts.items():
        rows = open_rows(write_tiff(tmp_path / f"{name}.tif", image, **layout))
        found = np.concatenate([p for _, p in predict(student, rows, **options)], axis=1)
        assert np.array_equal(found, expected), name


# --- Seams --------------------------------------------------------------------------------------


def seam_score(classes, window, overlap):
    """How often the class changes across a border of windows, over how often it does elsewhere."""
    changes, at_border = [], []
    for labels in (classes, classes.T):
        length = labels.shape[1]
        borders = np.zeros(length - 1, bool)  # between position i and i + 1
        for start in axis_windows(length, window, overlap)[0]:
            for edge in (start, start + window):
                if 0 < edge < length:
                    borders[edge - 1] = True
        changes.append((labels[:, 1:] != labels[:, :-1]).ravel())
        at_border.append(np.broadcast_to(borders, labels[:, 1:].shape).ravel())
    changes, at_border = np.concatenate(changes), np.concatenate(at_border)
    return changes[at_border].mean() / changes[~at_border].mean()


def leaning(images):
    """Five classes by brightness, which it believes to rise to the lower right of its window."""
    H, W = images.shape[-2:]
    slope = torch.linspace(-15, 15, H)[:, None] + torch.linspace(-15, 15, W)
    brightness = images[:, 0] + slope
    levels = torch.tensor([25.0, 75.0, 125.0, 175.0, 225.0]).view(1, 5, 1, 1)
    return -((brightness[:, None] - levels) ** 2) / 500


def test_seams_are_there_without_overlap_and_gone_with_it():
    y, x = np.mgrid[:300, :300]
    hills = 127 + 60 * np.sin(x / 31 + y / 53) + 60 * np.cos(y / 23 - x / 71)
    image = np.repeat(hills.astype(np.uint8)[..., None], 3, axis=2)
    scores = {
        overlap: seam_score(
            predict_classes(leaning, image, window=64, overlap=overlap)[0], 64, overlap
        )
        for overlap in (0.0, 0.25, 0.5)
    }
    assert scores[0.0] > 5  # the student does make seams
    assert scores[0.25] < 1.5 and scores[0.5] < 1.5, scores


# --- Orientations -------------------------------------------------------------------------------


def test_the_mean_over_eight_orientations():
    """Of a student that always sees class 1 in the left half of what it is shown."""

    def left(images):
        W = images.shape[-1]
        right = torch.zeros(len(images), 2, *images.shape[-2:])
        right[:, 1, :, : W // 2] = 20.0
        right[:, 0, :, W // 2 :] = 20.0
        return right

    tiles = torch.from_numpy(random_image(64, 64))[None].expand(2, -1, -1, -1)
    plain = probabilities(left, tiles)
    assert plain[:, 1, :, :32].min() > 0.99 and plain[:, 1, :, 32:].max() < 0.01
    # In the eight orientations each quarter of the tile is on the left four times.
    assert (probabilities(left, tiles, tta=True) - 0.5).abs().max() < 1e-6


def test_with_every_orientation_none_is_special():
    student, image = untrained(), random_image(60, 96)
    options = {"window": 96, "tta": True}
    p = np.concatenate([p for _, p in predict(student, image, **options)], axis=1)
    for turn, back in (
        (np.rot90, lambda p: np.rot90(p, -1, axes=(1, 2))),
        (np.flipud, lambda p: p[:, ::-1]),
        (np.fliplr, lambda p: p[:, :, ::-1]),
    ):
        turned = np.concatenate([p for _, p in predict(student, turn(image), **options)], axis=1)
        # The same eight terms in another order of summation.
        np.testing.assert_allclose(back(turned), p, rtol=0, atol=1e-6)
    plain = np.concatenate([p for _, p in predict(student, image, window=96)], axis=1)
    assert np.abs(plain - p).max() > 1e-4  # it is not the plain prediction
