"""experiments/timing.py: medians, floors worked out by hand, rows beside their targets."""

import json

import pytest
import torch

from experiments import timing
from experiments.timing import Row, Table, Target

CPU = torch.device("cpu")


@pytest.fixture
def calls():
    """makers(...) of calls that leave their names in makers.log."""

    class Makers(dict):
        log: list[str] = []

    found = Makers({name: lambda name=name: lambda: found.log.append(name) for name in "ab"})
    return found


def test_medians_are_of_contenders_in_turns(calls):
    """A CPU's speed drifts."""
    times = dict(timing.medians(calls, CPU, timer=None))
    assert calls.log == ["a", "b"] * (2 + timing.CPU_REPEATS)
    assert set(times) == {"a", "b"} and all(ms >= 0 for ms in times.values())


def test_who_cannot_run_has_no_time(calls, capsys):
    def fail():
        raise RuntimeError("no such backend\nand more")

    times = dict(timing.medians({"a": calls["a"], "b": fail}, CPU, timer=None))
    assert times["a"] >= 0 and times["b"] is None
    assert capsys.readouterr().err == "  b: RuntimeError: no such backend\n"


def test_on_a_gpu_one_contender_is_alive_and_its_time_known_at_once():
    """A row is written before the next contender is made."""
    seen = []
    makers = {name: lambda name=name: seen.append(f"make {name}") or name for name in "ab"}
    timer = lambda name: seen.append(f"time {name}") or 1.0  # noqa: E731
    for name, _ in timing.medians(makers, torch.device("cuda"), timer):
        seen.append(f"row {name}")
    assert seen == ["make a", "time a", "row a", "make b", "time b", "row b"]


def test_floor_by_hand():
    """Attention forward, stage 1, D = 32, on a GPU of 4.3 TB/s, 790 TFLOP/s and 4.2 T exp/s:
    16 x 16384 x 256 exponentials take 16.0 us, and nothing takes longer."""
    rate = timing.Rates(4.3e12, 790e12, 4.2e12)
    pairs = 16 * 16384 * 256
    nbytes = 16 * (16384 + 256) * 32 * 2 * 2
    assert rate.milliseconds(nbytes, 4 * pairs * 32, pairs) == pytest.approx(0.016, rel=0.01)
    assert rate.milliseconds(4.3e9, 0) == pytest.approx(1.0)


TARGETS = [
    Target("step *", "peer", times=2),
    Target("step *", "ours", most=33, gpu="H100"),
    Target("step *", "ours", most=44),
]


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table that believes itself on an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    return Table(torch.device("cuda"), {"gpu": "H100"}, TARGETS, tmp_path / "rows.json")


def test_rows_stand_beside_their_targets(table):
    table.add("step b0", "ours", 33.0, 33.0)
    table.add("step b0", "peer", 65.9, 33.0)
    table.add("step b0", "other", 20.0, 33.0)
    table.add("step b0", "peer", None, 33.0)
    verdicts = [(row.target, row.met) for row in table.rows]
    assert verdicts == [("<= 33", True), ("2x", False), (None, None), ("2x", None)]
    assert str(table.rows[1]) == "| step b0 | peer | 65.9 ms | 2.00 | 2x | no | - |"
    assert table.summary() == "behind: step b0, other\ntargets missed: step b0, peer"


def test_ours_that_fails_is_a_missed_target(table, monkeypatch):
    monkeypatch.setattr(timing, "medians", lambda *_: iter([("ours", None), ("peer", 2.0)]))
    table.compare("step b0", {})
    assert [row.met for row in table.rows] == [False, False]


def test_targets_are_of_the_gpu_they_name(monkeypatch):
    assert Table(CPU, {}, TARGETS).targets == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    assert Table(torch.device("cuda"), {}, TARGETS).targets == [TARGETS[0], TARGETS[2]]


def test_the_file_has_every_row_so_far(table):
    """An interrupted run keeps what it has."""
    for n in range(3):
        found = json.loads(table.path.read_text())
        assert found["gpu"] == "H100" and len(found["rows"]) == n
        table.add("step b0", "ours", float(n), unit="s", floor=0.5)
        (*_, last) = json.loads(table.path.read_text())["rows"]
        assert Row(**last) == table.rows[-1]


def test_a_contender_that_fails_between_others_is_a_row_without_time(table, monkeypatch):
    monkeypatch.setattr(
        timing, "medians", lambda *_: iter([("ours", 2.0), ("peer", None), ("other", 4.0)])
    )
    assert table.compare("step b0", {}, floor=1.0) == {"ours": 2.0, "peer": None, "other": 4.0}
    assert [row.times_ours for row in table.rows] == [1.0, None, 2.0]
    assert str(table.rows[0]).endswith("| 2 ms | 1.00 | <= 33 | yes | 50% |")
