"""experiments/bench.py: a check of the kernels, floors worked out by hand, and a readable table."""

import json
import sys

import pytest
import torch

from experiments import bench

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


def test_floor_by_hand():
    """Attention forward, stage 1, D = 32, on a GPU of 4.3 TB/s, 790 TFLOP/s and 4.2 T exp/s:
    16 x 16384 x 256 exponentials take 16.0 us, and nothing takes longer."""
    rate = bench.Rates(4.3e12, 790e12, 4.2e12)
    pairs = 16 * 16384 * 256
    nbytes = 16 * (16384 + 256) * 32 * 2 * 2
    assert rate.milliseconds(nbytes, 4 * pairs * 32, pairs) == pytest.approx(0.016, rel=0.01)
    assert rate.milliseconds(4.3e9, 0, 0) == pytest.approx(1.0)


def test_medians_are_of_each_contender():
    calls = []
    times = bench.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU)
    assert calls == ["a", "b"] * (2 + bench.CPU_REPEATS)  # in turns, for a machine's speed drifts
    assert set(times) == {"a", "b"} and all(ms >= 0 for ms in times.values())


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells a peak of memory"
)
def test_cpu_loss_needs_less_memory():
    """At most a fifth of the reference's at B = 4, K = 7, 256 x 256."""
    ours, eager = (bench.cpu_megabytes(4, 7, 64, name) for name in ("ours", "eager"))
    assert eager > 4 * 7 * 256**2 * 4 / 1e6  # more than one full-resolution map: it is measured
    assert ours <= eager / 5


def test_program(monkeypatch, tmp_path, capsys):
    """Everything it does on a CPU, at sizes that take no time."""
    monkeypatch.setattr(bench, "STAGES", {4: (16, 2)})
    monkeypatch.setattr(bench, "CPU_REPEATS", 1)
    monkeypatch.setattr(bench, "CPU_LOSSES", [(1, 3, 4)])
    monkeypatch.setattr(bench, "CPU_STEP", ("tiny", 2, 32))
    monkeypatch.setattr(bench, "cpu_megabytes", lambda *_: 1.5)
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(tmp_path / "bench.json")])
    bench.main()
    printed = capsys.readouterr().out
    assert "torch " + torch.__version__ in printed and "correct here" in printed
    entry = json.loads((tmp_path / "bench.json").read_text())
    what = [row["what"] for row in entry["rows"]]
    assert "attention stage 4 D=32 both ways" in what and "loss K=3 B=1 16x16 both ways" in what
    assert all(row["milliseconds"] > 0 for row in entry["rows"])
    assert entry["rows"][0]["times_ours"] == 1


def test_nothing_is_timed_when_a_kernel_errs(monkeypatch):
    monkeypatch.setattr(
        bench, "kernel_errors", lambda device: ["attention D=32: tensor 0 errs by 1"]
    )
    monkeypatch.setattr(bench, "bench_attention", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr("sys.argv", ["bench"])
    with pytest.raises(SystemExit, match="the kernels are wrong here"):
        bench.main()
