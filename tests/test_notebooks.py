"""The notebooks run, and what they show is small and was made by what they say."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# Training and the inner views on smaller images: the same code, and the same words.
SMALLER = {"crop=96, batch_size=4": "crop=32, batch_size=2", "stage, size=192": "stage, size=96"}


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["01_two_branches.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_prints_what_it_shows(path, monkeypatch):
    """Every cell, in order, without jupyter. Printed text is as committed, but for the figures,
    which differ in their last digits from one processor to another."""
    monkeypatch.chdir(path.parent)
    namespace, text = {}, path.read_text()
    for shown, run in SMALLER.items():
        assert text.count(shown) == 1
        text = text.replace(shown, run)
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), namespace)
        shown = "".join(
            "".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout"
        )
        assert words(printed.getvalue()) == words(shown)


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]{2,}", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_from_top_to_bottom(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
