"""support/progress.py: the share that is done, and the time that is left."""

from support import progress
from support.progress import Progress, duration


def test_progress_shows_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 30.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with Progress("mapping") as report:
        report(0.25)  # after 30 s: 90 s left
    assert capsys.readouterr().err == "mapping:  25%, 1:30 left\n"


def test_duration():
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
