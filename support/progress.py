"""Progress and time left, for everything that a user waits for.

with Progress("scene.tif") as progress:
    for i in range(n): progress((i + 1) / n)    # "scene.tif:  25%, 1:30 left" on stderr

pace = Pace(steps, validations, steps_per_validation=20)
for ...:                                        # a training run
    pace.step(waited)
    if ...: pace.validation()
    pace.seconds_left()
"""

import os
import sys
import time
from typing import NamedTuple


class LiveLine:
    """A line on stderr about what goes on: a terminal is updated in place, a file gets a line every
    ten seconds, and after a while fewer."""

    def __init__(self):
        self.in_place = sys.stderr.isatty()
        self.is_first = int(os.environ.get("RANK", 0)) == 0  # of torchrun's processes one shows it
        self.begin = self.last = time.perf_counter()

    def is_due(self) -> bool:
        """Whether it is time for a line."""
        now = time.perf_counter()
        period = 0.5 if self.in_place else max(10.0, (now - self.begin) / 100)
        if now - self.last < period:
            return False
        self.last = now
        return self.is_first

    def show(self, line: str) -> None:
        text, end = (f"\r{line}\033[K", "") if self.in_place else (line, "\n")
        print(text, file=sys.stderr, flush=True, end=end)

    def clear(self) -> None:
        """Before something else is printed."""
        if self.in_place:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.clear()


class Progress(LiveLine):
    """`progress(share)` reports a share in (0, 1] and the time left on stderr, now and then."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def __call__(self, share: float) -> None:
        if self.is_due():
            left = (self.last - self.begin) * (1 - share) / share
            self.show(f"{self.what}: {share:4.0%}, {duration(left)} left")


def duration(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Interval(NamedTuple):
    """Some steps of a run, without the validations between them."""

    steps: int
    seconds: float
    waited: float  # of these seconds, for windows


class Pace:
    """How fast a training run is, and how long it will take: equal steps, and a few validations.

    A validation takes as long as the one before. The first is taken for `steps_per_validation`
    steps. The first steps do not count: kernels are compiled and memory is fetched in them.
    """

    def __init__(self, steps: int, validations: int, steps_per_validation: float):
        """steps, validations: still to be done."""
        self.steps, self.validations = steps, validations
        self.steps_per_validation, self.validation_seconds = steps_per_validation, None
        self.since_report, self.slow = Interval(0, 0.0, 0.0), 3
        self.counted, self.counted_seconds, self.latest = 0, 0.0, 0.0  # steps; the last one
        self.mark = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self.mark = self.mark, time.perf_counter()
        return self.mark - before

    def step(self, waited: float) -> None:
        """A step has been done, which waited so many seconds for its windows."""
        seconds, so_far = self.lap(), self.since_report
        self.latest = seconds
        self.since_report = Interval(
            so_far.steps + 1, so_far.seconds + seconds, so_far.waited + waited
        )
        self.steps -= 1
        if self.slow:
            self.slow -= 1
        else:
            self.counted, self.counted_seconds = self.counted + 1, self.counted_seconds + seconds

    def validation(self) -> None:
        """A validation has been done, and what else is done there."""
        self.validation_seconds = self.lap()
        self.validations -= 1

    def report(self) -> Interval:
        """The steps since the last report."""
        found, self.since_report = self.since_report, Interval(0, 0.0, 0.0)
        return found

    def step_seconds(self) -> float:
        """Of one step."""
        return self.counted_seconds / self.counted if self.counted else self.latest

    def seconds_left(self) -> float:
        step, validation = self.step_seconds(), self.validation_seconds
        if validation is None:
            validation = self.steps_per_validation * step
        return self.steps * step + self.validations * validation
