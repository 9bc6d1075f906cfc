"""figures.py and its parts: the script draws the same each time, and its texts can be read."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ctclm import MultiScaleConv
from experiments import figures, figures_teaching
from experiments.figures_sheet import SCALE, STORED, WIDTH, Box
from support import toy
from support.pictures import CNN_COLOUR, TRANSFORMER_COLOUR, Sample


def untrained_sample() -> Sample:
    """What the picture of the teaching needs, without training."""
    image, label = (array[:256, :256] for array in toy.scene(0))
    gate = np.linspace(0, 1, 256 * 256).reshape(256, 256)
    return Sample(image, label, np.zeros_like(label), label, gate)


DRAWINGS = figures.FIGURES | {"teaching": lambda: figures_teaching.drawn(untrained_sample())}


@pytest.fixture(scope="module", params=DRAWINGS)
def sheet(request):
    sheet = DRAWINGS[request.param]()
    sheet.name = request.param
    return sheet


def overlap(a, b) -> bool:
    return a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom


def test_it_draws_the_same_pixels_twice(sheet):
    first, second = sheet.finished(), DRAWINGS[sheet.name]().finished()
    assert first.convert("RGB").tobytes() == second.convert("RGB").tobytes()


def test_the_committed_file_is_what_the_script_draws(sheet):
    """In size; how letters are drawn differs between versions of FreeType."""
    path = figures.FOLDER / f"{sheet.name}.png"
    with Image.open(path) as committed:
        assert committed.format == "PNG"
        assert committed.size == sheet.finished().size == (STORED * WIDTH, STORED * sheet.height)
    assert path.stat().st_size < 500_000


def test_no_text_overlaps_another_and_all_lie_on_the_sheet(sheet):
    assert len(sheet.texts) >= 8
    page = Box(4, 4, WIDTH - 4, sheet.height - 4)
    for words, box in sheet.texts:
        assert page.left <= box.left < box.right <= page.right, words
        assert page.top <= box.top < box.bottom <= page.bottom, words
    for one, other in combinations(sheet.texts, 2):
        assert not overlap(one.box, other.box), (one.words, other.words)


def test_a_text_is_inside_its_box_or_outside(sheet):
    """No letter crosses an outline."""
    for box in sheet.boxes:
        for words, ink in sheet.texts:
            inside = box.left < ink.left and ink.right < box.right
            inside &= box.top < ink.top and ink.bottom < box.bottom
            assert inside or not overlap(ink, box), (words, box)


def test_it_can_be_read_on_a_slide(sheet):
    """On a slide 1920 pixels wide a letter of 12 is 26 pixels high."""
    heights = [text.box.bottom - text.box.top for text in sheet.texts if len(text.words) > 2]
    assert min(heights) * 1920 / WIDTH >= 14  # of the ink, capitals and x


def test_each_says_what_it_is_about():
    said = {
        "method": "CNN branch, Transformer branch, gate r, TRAINING ONLY, DEPLOYED",
        "multiscale": "identity, 5 x 5, 11 x 11, 121 multiply-adds instead of 276, 3 x 3",
        "attention": "16,384, 4,096, x 256, softmax, 64 queries",
        "dual_cell": "16 pixels depend on 4 logits, 64 pixels, 1/8, 7/8, a logit",
        "teaching": "truth, CNN wrong, Transformer wrong, who teaches, r = 1, r = 0",
    }
    assert said.keys() == figures.FIGURES.keys()
    for name, expected in said.items():
        words = " ".join(text.words for text in DRAWINGS[name]().texts)
        for part in expected.split(", "):
            assert part in words, (name, part)


def test_branches_have_their_colours():
    colours = {colour for _, colour in figures.method().image.getcolors(1 << 24)}
    assert {CNN_COLOUR, TRANSFORMER_COLOUR} <= colours


def test_the_sum_of_the_kernels_counts_them():
    """The darkness of the last grid is the number of kernels that reach a tap."""
    image = figures.multiscale().image
    cell, left, top = 8.6, 12 + 5 * (8.6 * 11 + 52), 52
    middle = round(SCALE * (top + 5.5 * cell))
    at = [image.getpixel((round(SCALE * (left + (i + 0.5) * cell)), middle)) for i in range(6)]
    reach = [sum(n >= 11 - 2 * i for n in (1, *MultiScaleConv.SIZES)) for i in range(6)]
    blue = [255 - pixel[2] for pixel in at]
    assert blue == pytest.approx([n / 5 * (255 - CNN_COLOUR[2]) for n in reach], abs=2)


def test_errors_are_where_a_branch_is_wrong_and_not_where_the_label_is_ignored():
    sample = untrained_sample()
    sample.truth[:8] = 255
    shown = figures_teaching.errors(sample, sample.cnn, CNN_COLOUR)
    marked = (shown == CNN_COLOUR).all(-1)
    assert np.array_equal(marked, (sample.truth != 0) & (sample.truth != 255))


def test_the_last_one_is_trained_first(monkeypatch):
    monkeypatch.setattr(figures_teaching, "STEPS", 1)
    monkeypatch.setattr(toy, "SPLIT_SEEDS", {"train": range(1), "val": range(2)})
    sample = figures_teaching.trained_sample()
    assert sample.image.shape[:2] == sample.truth.shape == sample.gate.shape == (256, 256)
    assert np.array_equal(sample.image, toy.scene(1)[0][64:320, 64:320])


def test_the_program_writes_what_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "new")
    figures.main(["dual_cell"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dual_cell.png"]
    assert str(tmp_path / "new" / "dual_cell.png") in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no figure nobody; there are method"):
        figures.main(["nobody"])
