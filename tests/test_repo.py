"""What the repository claims about itself."""

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

import ablation
import cli
import data
import infer
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")])
NAMES = {path.stem for path in SOURCES if path.parent == ROOT}

# Imports run one way: a file may import those of the lines above its own, never those below.
LAYERS = [
    {"cli", "checkpoint", "toy", "raster", "kernels"},
    {"cache", "layouts"},
    {"labels"},
    {"audit"},
    {"ctclm", "data", "maps", "metrics"},
    {"pictures", "scenes", "windows"},
    {"scoring"},
    {"infer", "story"},
    {"train"},
    {"ablation", "bench"},  # kernels/bench.py times a training step of the whole model
]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_readmes_line_counts():
    rows = dict(re.findall(r"\| `([\w/]+\.py)` \| (\d+) \|", README))
    listed = {str(path.relative_to(ROOT)) for path in SOURCES} - {"kernels/__init__.py"}
    assert set(rows) == listed
    for name, lines in rows.items():
        actual = len((ROOT / name).read_text().splitlines())
        assert abs(int(lines) - actual) <= 10, f"README says {name} has {lines} lines: {actual}"


def test_every_source_file_has_its_test_file():
    for path in SOURCES:
        if path.name != "__init__.py":
            assert (ROOT / "tests" / f"test_{path.name}").exists(), path.name


def test_imports_run_one_way():
    layer_of = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    assert NAMES | {"kernels", "bench"} == set(layer_of)
    for path in SOURCES:
        own = "kernels" if path.parent.name == "kernels" and path.stem != "bench" else path.stem
        for name in imported(path) & set(layer_of) - {own}:
            assert layer_of[name] < layer_of[own], f"{path.name} imports {name}"


def test_only_the_listed_packages_are_imported():
    allowed = {"torch", "triton", "numpy", "PIL"} | NAMES | {"kernels"}

    for path in SOURCES:
        foreign = imported(path) - allowed - set(sys.stdlib_module_names)
        assert not foreign, f"{path.name} imports {foreign}"


def test_every_module_says_what_it_is():
    for path in SOURCES:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring and len(docstring.splitlines()) >= 3, path.name


def test_requirements_meet_the_projects_floors():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floors = dict(
        re.match(r"([\w-]+)>=([\d.]+)", d).groups() for d in project["project"]["dependencies"]
    )
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert set(pinned) == set(floors) | {"pytest"}
    for name, floor in floors.items():
        assert [*map(int, pinned[name].split("."))] >= [*map(int, floor.split("."))]
    modules = set(project["tool"]["setuptools"]["py-modules"])
    assert modules == NAMES


COMMANDS = re.findall(
    r"^\s*(?:python|\$\(PY\)) ((?:train|infer|data|ablation)\.py .*?)(?:\s{2,}#.*)?$",
    README + (ROOT / "Makefile").read_text(),
    re.M,
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_and_the_makefile_parse(command):
    program, *arguments = shlex.split(command)
    modules = {"train.py": train, "infer.py": infer, "data.py": data, "ablation.py": ablation}
    config = modules[program].Config
    cli.parse(config, arguments)


def test_readme_has_commands_and_its_links_lead_somewhere():
    assert len(COMMANDS) >= 5
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert not re.findall(r"@[A-Z]+@", README)


def test_committed_files_are_small():
    for path in [*ROOT.glob("docs/*"), *ROOT.glob("notebooks/*.ipynb")]:
        assert path.stat().st_size < 1_000_000, path.name
