"""What the three programs share on the command line: options from a dataclass, and how a run ends.

A program declares its options once, as a dataclass; types, choices, defaults and `--help` follow
from the fields, and the same object is saved in `config.json` and in the checkpoint.

    @dataclass
    class Config:
        steps: int = option(1200, "optimiser steps")

    def main(arguments): config = parse(Config, arguments)
    if __name__ == "__main__": run(main, DataError)

Exit codes: 0 done; 2 bad input, one sentence on stderr; 130 / 143 interrupted. Anything else that
goes wrong is our own bug and shows its traceback.
"""

import argparse
import ctypes
import errno
import platform
import signal
import sys
import time
from dataclasses import field, fields
from typing import Literal, get_args, get_origin, get_type_hints

import torch


class UsageError(ValueError):
    """An option that cannot be honoured; the message says which and what to do."""


def option(default, help, *, positional: bool = False):
    """A dataclass field that is also a command-line option; `help` is the reason it exists."""
    metadata = {"help": help, "positional": positional}
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """A field's name as it is typed: "max_unknown" -> "--max-unknown"."""
    return "--" + name.replace("_", "-")


class OneSentenceParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the options\n")


def parse(config_class, arguments: list[str], description: str = ""):
    """Command line -> an instance of `config_class`. Bad options: one sentence, exit code 2."""
    parser = OneSentenceParser(description=description, allow_abbrev=False)
    types = get_type_hints(config_class)
    for f in fields(config_class):
        kind, settings = types[f.name], {"help": f.metadata["help"]}
        default = f.default
        name = f.name if f.metadata["positional"] else flag(f.name)
        if get_origin(kind) is Literal:
            settings |= {"choices": get_args(kind), "default": default}
        elif get_origin(kind) is tuple:
            settings |= {"nargs": "*", "type": get_args(kind)[0], "default": default}
            settings |= {"metavar": f.name.upper()}
        elif kind is bool:
            settings |= {"action": "store_true"}
        else:
            settings |= {"type": kind, "default": default, "metavar": kind.__name__.upper()}
        if settings.get("default") not in (None, "", [], ()):
            settings["help"] += " (%(default)s)"
        if f.metadata["positional"]:
            settings["metavar"] = f.name.upper()
        parser.add_argument(name, **settings)
    given = vars(parser.parse_intermixed_args(arguments))
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


# The outside world's failures that a sentence explains better than a traceback.
ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}


def run(main, *user_errors: type[Exception]) -> None:
    """main(sys.argv[1:]), then exit; UsageError and `user_errors`: one sentence and exit code 2."""
    keep_freed_memory()
    try:
        sys.exit(main(sys.argv[1:]))
    except (UsageError, *user_errors) as error:
        sentence = str(error)
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        sentence = f"{error.strerror}: {error.filename or 'the output folder'}"
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    print(f"{sys.argv[0].rpartition('/')[2]}: {sentence}", file=sys.stderr)
    sys.exit(2)


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks instead of returning them to the system each time.

    Every activation of a convolution is such a block; page faults on getting it back cost a CPU
    training step about a third of its time. Does nothing on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> the device; raises UsageError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine or this PyTorch has no CUDA GPU")
    return torch.device(name)


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
