"""bench.py, bench_model.py, bench_cpu.py: a check of the kernels, sections, targets, counts."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from experiments import bench, bench_cpu, bench_model, timing
from experiments.timing import Rates, Table

CPU = torch.device("cpu")


def test_no_kernel_errs_here():
    assert bench.kernel_errors(CPU) == []


def test_a_wrong_kernel_is_found(monkeypatch):
    monkeypatch.setattr(
        bench, "attention", lambda q, k, v: 1.001 * bench.attention_reference(q, k, v)
    )
    wrong = bench.kernel_errors(CPU)
    assert len(wrong) == 8 and "attention D=32: tensor 0 errs by" in wrong[0]


def test_two_different_runs_are_found(monkeypatch):
    runs = iter(range(100))
    monkeypatch.setattr(
        bench,
        "attention",
        lambda q, k, v: bench.attention_reference(q, k, v) * (1 + 1e-7 * next(runs)),
    )
    assert any("differs between two runs" in sentence for sentence in bench.kernel_errors(CPU))


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells a peak of memory"
)
def test_cpu_loss_needs_less_memory():
    """At most a fifth of the reference's at B = 4, K = 7, 256 x 256."""
    found = bench.cpu_megabytes(4, 7, 64)
    assert found["eager"] > 4 * 7 * 256**2 * 4 / 1e6  # more than one full-resolution map
    assert found["ours"] <= found["eager"] / 5


# --- Targets --------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Sizes that take no time."""
    monkeypatch.setattr(bench, "STAGES", {stage: (16, 2) for stage in bench.STAGES})
    monkeypatch.setattr(bench, "MAPS", {stage: (16, 8) for stage in bench.MAPS})
    monkeypatch.setattr(bench, "CPU_LOSSES", [(1, 3, 4)])
    monkeypatch.setattr(bench, "GPU_LOSSES", [(1, 7, 4)])
    monkeypatch.setattr(bench, "GPU_UPSAMPLING", (1, 2, 16))
    monkeypatch.setattr(bench, "CPU_UPSAMPLING", (1, 2, 16))
    monkeypatch.setattr(bench, "cpu_megabytes", lambda *_: {"ours": 1.5, "eager": 9.0})
    monkeypatch.setattr(bench_model, "CPU_STEPS", [("tiny", 2, 32)])
    monkeypatch.setattr(bench_model, "CPU_SCENE", ("tiny", 64))
    monkeypatch.setattr(bench_model, "SCENES", 1)
    monkeypatch.setattr(bench_model, "TWO_RUNS", 1)
    monkeypatch.setattr(timing, "CPU_REPEATS", 1)
    for name, value in {"VARIANT": "tiny", "WINDOW": 64, "BATCH": 2, "CROP": 32}.items():
        monkeypatch.setattr(bench_cpu, name, value)
    monkeypatch.setattr(bench_cpu, "Compiled", lambda forward: forward)  # a minute


def test_every_target_is_of_a_row_that_a_gpu_would_fill(small, monkeypatch):
    """The sections as on a GPU, but nobody is timed and every time is 1."""
    monkeypatch.setattr(timing, "medians", lambda makers, *_: ((name, 1.0) for name in makers))
    monkeypatch.setattr(bench, "extra_megabytes", lambda call: 1.0)
    monkeypatch.setattr(bench, "compiled", lambda *_: lambda: None)
    monkeypatch.setattr(bench_model, "batch_of", lambda *_: None)
    monkeypatch.setattr(bench_model, "add_profile", lambda *_: None)
    monkeypatch.setattr(bench_model, "our_run", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(
        bench_model,
        "add_two_runs",
        lambda table, what, *_: table.add(f"{what} two runs", "ours", 0),
    )
    monkeypatch.setattr(bench_model, "GPU_SCENE", bench_model.CPU_SCENE)
    table, options = Table(CPU, {}), SimpleNamespace(compiled=True, peer=True)
    table.targets = bench.TARGETS
    for section in bench.SECTIONS.values():
        section(table, Rates(1e12, 1e12, 1e12), options)
    used = {id(table.target_of(row.what, row.how)) for row in table.rows}
    assert [t for t in bench.TARGETS if id(t) not in used] == []
    goals = {(row.what, row.how): row.target for row in table.rows}
    assert goals["attention stage 1 D=64 both ways", "SDPA cuDNN"] == "2.5x"
    assert goals["attention stage 4 D=32 both ways", "SDPA efficient"] == "1x"
    assert goals["training step b2 B=16 512x512 both branches", "transformers"] == "1x"
    assert goals["inference b2 B=1 512x512 fp32", "transformers"] == "1x"


# --- The model ------------------------------------------------------------------------------------


def event(name, parent=None, kernels=(), device=DeviceType.CPU, **more):
    kernels = [SimpleNamespace(duration=us) for us in kernels]
    return SimpleNamespace(
        name=name, cpu_parent=parent, kernels=kernels, device_type=device, **more
    )


def test_time_inside_one_of_our_operations_is_its_own():
    attention = event("ctclm::attention_backward", kernels=[300])
    events = [
        attention,
        event("aten::sum", attention, [100]),
        event("aten::sum", event("aten::mean"), [50, 50]),
        event(
            "forward_kernel", device=DeviceType.CUDA, is_user_annotation=False, device_time_total=1
        ),
        event("Optimizer.step", device=DeviceType.CUDA, is_user_annotation=True),
    ]
    times, launches = bench_model.device_times(events)
    assert times == {"ctclm::attention_backward": 0.4, "aten::sum": 0.1} and launches == 1


def test_operations_are_counted_without_views():
    x = torch.ones(4, 4, requires_grad=True)
    with bench_model.Operations() as counter:
        y = x.T.reshape(2, 8) @ x.view(8, 2)  # a copy, a product, and views
    assert counter.count == 2 and y.shape == (2, 2)


# --- The program ----------------------------------------------------------------------------------


def test_program(small, monkeypatch, tmp_path, capsys):
    """Everything it does on a CPU."""
    monkeypatch.setattr(bench_model, "GPU_STEPS", [("tiny", 16, 64)])  # for its counts
    bench.main(["--json", str(tmp_path / "bench.json")])
    printed = capsys.readouterr().out
    assert "torch " + torch.__version__ in printed and "correct here" in printed
    entry = json.loads((tmp_path / "bench.json").read_text())
    assert entry["torch"] == torch.__version__
    rows = {(row["what"], row["how"]): row for row in entry["rows"]}
    assert rows["attention stage 4 D=32 both ways", "eager"]["value"] > 0
    assert rows["loss K=3 B=1 16x16 extra memory", "eager"]["times_ours"] == 6
    assert rows["training step tiny B=2 32x32 both branches", "ours"]["times_ours"] == 1
    assert rows["training step tiny B=2 32x32 weights, two runs", "ours"]["value"] == 0
    step = "training step tiny B=2 32x32"
    assert rows[f"{step}, the parts of both branches", "objective"]["value"] > 0
    assert rows["inference tiny B=1 64x64", "ours, --compile"]["value"] > 0
    assert ("inference tiny B=1 64x64 pixels of another class", "ours, --compile") in rows
    assert rows["scene tiny 64x64 speed", "ours"]["unit"] == "Mpx/s"
    assert rows["step tiny, operations", "both branches"]["value"] > 500


def test_sections_are_chosen_by_name(small, monkeypatch, capsys):
    for name in bench.SECTIONS:
        run = lambda *_, name=name: print(f"section {name}")  # noqa: E731
        monkeypatch.setitem(bench.SECTIONS, name, run)
    bench.main(["upsample", "loss", "--compiled"])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("section")] == [
        "section upsample",
        "section loss",
    ]


def test_a_peer_that_is_not_installed_has_an_empty_row(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    table = Table(CPU, {})
    bench_cpu.bench_training(table)
    assert {row.how: row.value for row in table.rows}["transformers"] is None
    assert "transformers: ModuleNotFoundError" in capsys.readouterr().err


def test_an_unknown_section_and_a_missing_peer_are_refused(program, monkeypatch):
    code, said = program(bench.main, (), "attention", "lossy")
    assert code == 2 and "no section lossy; there are attention, loss, multiscale" in said
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises ImportError
    code, said = program(bench.main, (), "step", "--peer")
    assert code == 2 and "--peer takes the package transformers" in said


def test_nothing_is_timed_when_a_kernel_errs(monkeypatch):
    monkeypatch.setattr(bench, "kernel_errors", lambda *_: ["attention D=32: tensor 0 errs by 1"])
    monkeypatch.setitem(bench.SECTIONS, "attention", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="the kernels are wrong here"):
        bench.main([])
