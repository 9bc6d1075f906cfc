"""figures.py: the diagram is drawn by the script, the same each time, and its texts can be read."""

from itertools import combinations

import pytest
from PIL import Image

from experiments import figures


@pytest.fixture(scope="module")
def sheet():
    return figures.method()


def overlap(a, b) -> bool:
    return a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom


def test_it_draws_the_same_pixels_twice(sheet):
    first, second = sheet.finished(), figures.method().finished()
    assert first.convert("RGB").tobytes() == second.convert("RGB").tobytes()


def test_the_committed_file_is_what_the_script_draws(sheet):
    """In size; how letters are drawn differs between versions of FreeType."""
    with Image.open(figures.METHOD) as committed:
        assert committed.format == "PNG"
        assert committed.size == sheet.finished().size
    assert figures.METHOD.stat().st_size < 200_000


def test_no_text_overlaps_another_and_all_lie_on_the_sheet(sheet):
    assert len(sheet.texts) > 20
    page = figures.Box(4, 4, figures.WIDTH - 4, figures.HEIGHT - 4)
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


def test_it_says_what_the_method_is(sheet):
    words = " ".join(text.words for text in sheet.texts)
    for name in ("CNN branch", "Transformer branch", "gate r", "TRAINING ONLY", "DEPLOYED"):
        assert name in words, name
    for branch in (figures.CNN_COLOUR, figures.TRANSFORMER_COLOUR):
        assert branch in {colour for _, colour in sheet.image.getcolors(1 << 24)}


def test_the_program_writes_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "method.png"
    monkeypatch.setattr(figures, "METHOD", path)
    figures.main()
    assert Image.open(path).size == (
        figures.STORED * figures.WIDTH,
        figures.STORED * figures.HEIGHT,
    )
    assert str(path) in capsys.readouterr().out
