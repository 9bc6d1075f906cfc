"""experiments/static.py: every kernel compiles well for three generations of GPUs, without one.

All builds take minutes. So what the compiler made of them is committed, experiments/static.json,
with a hash of the source of each: here the hashes are held against the kernels of today, the
figures are judged, and a sample is compiled again.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments import static

MAKE = "run `python -m experiments.static --json experiments/static.json`"


@pytest.fixture(scope="module")
def committed():
    """Triton's version, and the builds."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return static.read(static.COMMITTED)


COMPILE_SAMPLE = """
import json
from experiments import static
from kernels.choose import triton
found = [static.compile_for(build, arch) for arch, build in static.sample()]
print(json.dumps([triton.__version__, found]))
"""


@pytest.fixture(scope="module")
def sample(committed):
    """Triton's version, and builds, in a process of its own: here kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE_SAMPLE]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    version, builds = json.loads(ended.stdout)
    return version, [static.Compiled(*build) for build in builds]


def test_every_build_is_there_and_of_todays_kernels(committed):
    found = {(c.arch, c.build): c.source for c in committed[1]}
    todays = {
        (arch, build.name): static.source_hash(build)
        for arch in (80, 90, 100)
        for build in static.builds(arch)
    }
    assert found == todays, MAKE
    assert len(todays) == len(committed[1]) >= 3 * 36


def test_no_register_spills(committed):
    assert [c for c in committed[1] if c.spilled] == []


def test_shared_memory_suffices(committed):
    assert [c for c in committed[1] if c.shared > static.SHARED_MEMORY[c.arch]] == []


def test_products_reach_the_matrix_units(committed):
    """fp32 is exact, which they are not; the loss has no products."""
    wanted = [c for c in committed[1] if c.build.startswith("attention") and "fp32" not in c.build]
    assert len(wanted) >= 3 * 16
    assert [c for c in wanted if c.matrix == 0] == []
    # Batches of products, a channel each, are mma.sync in every generation.
    wanted = [c for c in committed[1] if c.build.startswith(("multiscale y", "multiscale dk"))]
    assert len(wanted) == 3 * 3
    assert [c for c in wanted if c.older_matrix == 0] == []


def test_the_table_of_the_readme_is_that_of_the_builds(committed):
    readme = (static.COMMITTED.parent.parent / "kernels" / "README.md").read_text()
    head, *rows = static.table(committed[1]).splitlines()
    shown = readme.partition(head)[2].strip().partition("\n\n")[0].splitlines()
    assert len(shown) >= 20 and [row for row in shown if row not in rows] == []


def test_a_sample_has_every_kernel_and_generation():
    pytest.importorskip("triton", reason="Triton is not installed")
    chosen = static.sample()
    every = {build.kernel for arch in (80, 90, 100) for build in static.builds(arch)}
    assert {build.kernel for _, build in chosen} == every
    assert {arch for arch, _ in chosen} == {80, 90, 100}


def test_a_sample_compiles_to_the_committed_figures(committed, sample):
    """Another version of Triton may use other registers, more or less shared memory and other
    instructions: there the sample is judged as the committed builds are."""
    version, builds = committed
    known = {c[:2]: c for c in builds}
    for found in sample[1]:
        before = known[found[:2]]
        if sample[0] == version:
            assert found == before, MAKE
        assert found.spilled == 0 and found.shared <= static.SHARED_MEMORY[found.arch]
        assert (found.matrix > 0) == (before.matrix > 0)


# --- What is compiled again -----------------------------------------------------------------------


def test_a_hash_is_of_what_the_compiler_is_given(committed, monkeypatch):
    build = static.builds(90)[0]
    changed = [
        build,
        build._replace(warps=2 * build.warps),
        build._replace(ragged=not build.ragged),
        build._replace(constants=build.constants | {"D": 1}),
        build._replace(types=build.types | {"q_ptr": "*fp64"}),
        static.builds(90)[1]._replace(constants=build.constants, types=build.types),
    ]
    monkeypatch.setattr(static, "code", lambda function: function.__name__)
    hashes = [static.source_hash(b) for b in changed]
    monkeypatch.setattr(static, "code", lambda function: function.__name__.upper())
    hashes.append(static.source_hash(build))
    assert len(set(hashes)) == len(changed) + 1


def test_a_comment_is_no_change():
    def written():
        def kernel(x):
            """What it does."""
            # and why
            return x + 1  # one

        return kernel

    def rewritten():
        def kernel(x):
            return x + 1

        return kernel

    def changed():
        def kernel(x):
            return x + 2

        return kernel

    one, two, three = (static.code(make()) for make in (written, rewritten, changed))
    assert one == two != three


def test_only_what_changed_is_compiled_again(committed, monkeypatch):
    _, builds = committed
    compiled = []

    def compile_one(arch, name):
        compiled.append((arch, name))
        return next(c for c in builds if c[:2] == (name, arch))

    monkeypatch.setattr(static, "compile_one", compile_one)
    monkeypatch.setattr(static, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    known = [builds[0]._replace(source="another"), *builds[1:-1]]
    assert static.compile_all(known) == builds
    assert compiled == [(c.arch, c.build) for c in (builds[0], builds[-1])]


def test_table_names_what_it_shows():
    row = static.Compiled("loss forward K=7 T=1", 90, 72, 0, 512, 4, 0, 0, "")
    assert (
        "| loss forward K=7 T=1 | - / 4 / - | - / 72 / - | - / 0 / - | - / 0.5 / - | - / 0 / - |"
        in static.table([row])
    )
