"""Progress and time left, for everything that a user waits for.

with Progress("scene.tif") as progress:
    for i in range(n): progress((i + 1) / n)        # "scene.tif:  25%, 1:30 left" on stderr
"""

import sys
import time


class Progress:
    """`progress(share)` reports a share in (0, 1] and the time left on stderr, now and then."""

    def __init__(self, what: str):
        self.what, self.begin = what, time.perf_counter()
        self.live = sys.stderr.isatty()  # a terminal is updated in place, a log gets few lines
        self.period, self.last = (0.5 if self.live else 20.0), self.begin

    def __call__(self, share: float) -> None:
        now = time.perf_counter()
        if now - self.last < self.period:
            return
        self.last = now
        left = (now - self.begin) * (1 - share) / share
        line = f"{self.what}: {share:4.0%}, {duration(left)} left"
        print(f"\r{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.live:
            print("\r\033[K", end="", file=sys.stderr)


def duration(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
