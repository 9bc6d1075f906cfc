"""experiments/static.py: every kernel compiles well for three generations of GPUs, without one."""

import json
import os
import subprocess
import sys

import pytest

from experiments import static


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """In a process of its own: this one's kernels are for the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    path = tmp_path_factory.mktemp("static") / "builds.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "experiments.static", "--json", str(path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return [static.Compiled(**row) for row in json.loads(path.read_text())["builds"]]


def test_every_build_is_there(compiled):
    for arch in (80, 90, 100):
        names = [build.name for build in static.builds(arch)]
        assert [c.build for c in compiled if c.arch == arch] == names
        assert len(set(names)) == len(names) >= 36


def test_no_register_spills(compiled):
    assert [c for c in compiled if c.spilled] == []


def test_shared_memory_suffices(compiled):
    assert [c for c in compiled if c.shared > static.SHARED_MEMORY[c.arch]] == []


def test_products_reach_the_matrix_units(compiled):
    """fp32 is exact, which they are not; the loss has no products."""
    wanted = [c for c in compiled if c.build.startswith("attention") and "fp32" not in c.build]
    assert len(wanted) >= 3 * 16
    assert [c for c in wanted if c.matrix == 0] == []


def test_table_names_what_it_shows():
    row = static.Compiled("loss forward K=7 T=1", 90, 72, 0, 512, 4, 0, 0)
    assert "| loss forward K=7 T=1 | 90 | 4 | 72 | 0 | 0.5 | 0 |" in static.table([row])
