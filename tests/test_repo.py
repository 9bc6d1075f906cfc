"""What the repository claims about itself: its rooms, its imports, its commands, its links."""

import ast
import re
import shlex
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import data
import infer
import train
from experiments import ablation, bench
from support import cli
from tests.faults import FAULTS

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for pattern in ("*.py", "kernels/*.py", "support/*.py", "experiments/*.py")
    for path in ROOT.glob(pattern)
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += [ROOT / name for name in ("docs/data.md", "docs/training.md", "docs/weights.md")]
PAGES += [ROOT / f"{room}/README.md" for room in ("kernels", "experiments", "notebooks")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- Rooms and imports ----------------------------------------------------------------------------

# Imports run one way: kernels <- ctclm; support <- data <- infer <- train <- experiments.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "ctclm": {"kernels"},
    "support": {"support"},
    "data": {"support"},
    "infer": {"data", "support", "ctclm", "kernels"},
    "train": {"infer", "data", "support", "ctclm", "kernels"},
    "experiments": {"experiments", "train", "infer", "data", "support", "ctclm", "kernels"},
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_path(module: str) -> Path | None:
    """The file of a module of ours: "support.cli" -> support/cli.py; None for anyone else's."""
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").exists() else None


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def defined_names(path: Path) -> set[str]:
    """What a file defines at its top level, in `if` and `try` too."""
    names, bodies = set(), [tree_of(path).body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    names |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.If | ast.Try):
                bodies += [node.body, node.orelse]
                bodies += [handler.body for handler in getattr(node, "handlers", [])]
    return names


def imports_of(path: Path) -> list[tuple[str, str | None, str]]:
    """(module, name or None, what it is called here) of every import, in functions too."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module, a.name, a.asname or a.name) for a in node.names]
    return found


def imported_files(path: Path) -> set[Path]:
    """Files of ours that a file imports; `from support import cli` is support/cli.py."""
    files = set()
    for module, name, _ in imports_of(path):
        inner = module_path(f"{module}.{name}") if name else None
        files.add(inner or module_path(module))
    return files - {None}


def test_the_top_level_shows_the_method_and_nothing_else():
    assert {path.name for path in ROOT.glob("*.py")} == {
        "ctclm.py",
        "data.py",
        "infer.py",
        "train.py",
    }


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_one_way(path):
    for other in imported_files(path):
        assert room_of(other) in MAY_IMPORT[room_of(path)], f"{name_of(path)}: {name_of(other)}"


def test_no_file_imports_itself_in_a_circle():
    """A package's __init__ gathers names for others; its own files do not import from it."""
    files = [path for path in SOURCES if path.name != "__init__.py"]
    order = TopologicalSorter({path: imported_files(path) & set(files) for path in files})
    assert len(list(order.static_order())) == len(files)  # CycleError names a circle


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_names_are_imported_from_the_file_that_defines_them(path):
    """`kernels` alone also hands on what its files define: it is the package's face."""
    for module, name, _ in imports_of(path):
        source = module_path(module)
        if name is None or source is None or module_path(f"{module}.{name}"):
            continue
        if source == ROOT / "kernels/__init__.py" and path.parent != ROOT / "kernels":
            (names,) = (
                ast.literal_eval(node.value)
                for node in tree_of(source).body
                if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
            )
        else:
            names = defined_names(source)
        assert name in names, f"{name_of(path)} takes {name} from {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_reached_through_a_module_that_does_not_define_it(path):
    """`train.checkpoint.save` would be checkpoint's `save` by way of train."""
    modules = {}
    for module, name, here in imports_of(path):
        source = module_path(f"{module}.{name}" if name else module)
        if source and source.name != "__init__.py":
            modules[here] = source
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if source := modules.get(node.value.id):
                assert node.attr in defined_names(source), f"{node.value.id}.{node.attr}"


def test_only_the_listed_packages_are_imported():
    allowed = {"torch", "triton", "numpy", "PIL", *MAY_IMPORT}
    for path in SOURCES:
        packages = {module.split(".")[0] for module, _, _ in imports_of(path)}
        foreign = packages - allowed - set(sys.stdlib_module_names) - {"__future__"}
        assert not foreign, f"{name_of(path)} imports {foreign}"


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=name_of)
def test_every_source_file_has_its_test_file(path):
    """test_distill.py is of distill.py and of its two implementations, distill_rows and _triton."""
    folder = ROOT / "tests" / path.relative_to(ROOT).parent
    names = {path.stem, path.stem.partition("_")[0]}
    assert any((folder / f"test_{name}.py").exists() for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is(path):
    docstring = ast.get_docstring(tree_of(path))
    assert docstring and len(docstring.splitlines()) >= 3


# One idea each that would lose by being cut: the method; the reader of TIFF files.
LONG = {"ctclm.py"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_can_be_read_at_once(path):
    """At most 450 lines a file, and 60 lines a function that is no kernel."""
    assert len(path.read_text().splitlines()) <= 450 or name_of(path) in LONG
    if room_of(path) == "kernels":
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_requirements_meet_the_projects_floors():
    """And nothing builds a wheel: it would install `data`, `train` and `kernels` for everyone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floors = dict(
        re.match(r"([\w-]+)>=([\d.]+)", d).groups() for d in project["project"]["dependencies"]
    )
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert set(pinned) == set(floors) | {"pytest"}
    for name, floor in floors.items():
        assert [*map(int, pinned[name].split("."))] >= [*map(int, floor.split("."))]
    assert "build-system" not in project and "setuptools" not in project["tool"]


# --- Pages ----------------------------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text().replace("$(DEMO)", "runs/demo").replace("$$resume", "")
COMMANDS = re.findall(
    r"^\s*(?:python|\$\(PY\)|torchrun [-\w: ]+?) "
    r"((?:train|infer|data)\.py .*?|-m experiments\.(?:ablation|bench).*?)"
    r"(?:\s{2,}#.*)?\s*$",
    "\n".join(page.read_text() for page in PAGES) + MAKEFILE,
    re.M,
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_and_the_makefile_parse(command):
    program, *arguments = shlex.split(command.removeprefix("-m "))
    configs = {"train.py": train.Config, "infer.py": infer.Config, "data.py": data.Config}
    configs |= {"experiments.ablation": ablation.Config, "experiments.bench": bench.Config}
    options = cli.given(configs[program], arguments)
    options.pop("peer", None)  # it asks for a package that is optional
    configs[program](**options)


def test_there_are_commands_of_every_program():
    programs = [command.removeprefix("-m ").split()[0] for command in COMMANDS]
    for program in ("train.py", "infer.py", "data.py", "experiments.ablation"):
        assert programs.count(program) >= 2, program


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_shows_the_method():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 9000
    text = readme.decode()
    assert "docs/figures/method.png" in text and "```math" in text
    files = re.findall(r"^([\w/]+\.py|[a-z]+/)\s{2,}", text, re.M)  # of the tree
    assert files[0] == "ctclm.py" and len(files) >= 8
    for name in files:
        assert (ROOT / name).exists(), name
    counts = re.findall(r"^([\w/]+\.py) .*?(\d+) lines", text, re.M)
    assert len(counts) >= 6
    for name, shown in counts:  # rounded up to ten
        lines = len((ROOT / name).read_text().splitlines())
        assert int(shown) - 10 < lines <= int(shown), f"{name} has {lines} lines"


def test_committed_files_are_small():
    for path in [*ROOT.glob("docs/**/*"), *ROOT.glob("notebooks/*.ipynb")]:
        assert path.stat().st_size < 1_000_000, path.name


def test_each_fault_has_its_place_and_its_tests():
    """What `python -m tests.faults` plants: code moves, and nobody runs all of them each day."""
    for fault in FAULTS:
        assert (ROOT / fault.file).read_text().count(fault.before) == 1, str(fault)
        for node_id in fault.node_ids():
            path, _, test = node_id.partition("::")
            name = test.partition("[")[0]
            assert f"def {name}(" in (ROOT / path).read_text() or not name, node_id
