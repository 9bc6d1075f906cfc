"""support/progress.py: the share that is done, and the time that is left."""

import pytest

from support import progress
from support.progress import Interval, LiveLine, Pace, Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """clock[0] is what time.perf_counter() returns."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_progress_shows_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 30.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with Progress("mapping") as report:
        report(0.25)  # after 30 s: 90 s left
    assert capsys.readouterr().err == "mapping:  25%, 1:30 left\n"


def test_duration():
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


@pytest.mark.parametrize("guess", [0, 10, 20, 40])
def test_the_time_left_is_right_after_the_first_tenth(clock, guess):
    """600 steps of half a second, the first of which takes a minute (a compilation), and six
    validations of ten seconds, each taken for `guess` steps before the first."""
    pace, steps, every = Pace(600, 6, guess), 600, 100
    for step in range(1, steps + 1):
        clock[0] += 60 if step == 1 else 0.5
        pace.step(waited=0.1)
        left = (steps - step) * 0.5 + (6 - (step - 1) // every) * 10
        if step >= steps // 10 and left:
            assert pace.seconds_left() == pytest.approx(left, rel=0.2)
        if step % every == 0:
            clock[0] += 10
            pace.validation()
    assert pace.seconds_left() == 0


def test_reports_leave_validations_out(clock):
    pace = Pace(10, 2, 1)
    for _ in range(4):
        clock[0] += 0.5
        pace.step(waited=0.125)
    assert pace.report() == Interval(4, 2.0, 0.5)
    assert pace.step_seconds() == 0.5
    clock[0] += 100
    pace.validation()
    clock[0] += 0.5
    pace.step(waited=0.0)
    assert pace.report() == Interval(1, 0.5, 0.0)


def test_a_file_gets_a_line_every_ten_seconds_and_later_fewer(clock):
    """After an hour one every 36 seconds, so that a week of training fits into a screen or two."""
    live, shown = LiveLine(), []
    for clock[0] in range(7200):
        if live.is_due():
            shown.append(clock[0])
    gaps = [b - a for a, b in zip(shown, shown[1:], strict=False)]
    assert shown[0] == gaps[0] == 10 and 36 in gaps and max(gaps) == 72


def test_only_the_first_process_shows_a_line(clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    live = LiveLine()
    clock[0] = 100.0
    assert not live.is_due()


def test_the_first_steps_have_a_pace_too(clock):
    pace = Pace(3, 1, 0)
    for _ in range(2):
        clock[0] += 0.5
        pace.step(waited=0.0)
        pace.report()
        assert pace.step_seconds() == 0.5
    assert pace.seconds_left() == 0.5
