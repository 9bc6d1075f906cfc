"""The command line: options from a dataclass, and how a program ends.

A program declares its options once, as a dataclass. Types, choices, defaults and `--help` follow
from the fields, and the same object is saved in `config.json` and in the checkpoint.

    @dataclass
    class Config:
        steps: int = option(1200, "optimiser steps")

    def main(arguments): config = parse(Config, arguments)
    if __name__ == "__main__": run(main, DataError)

Exit codes: 0 done; 1 the answer is no, in words (an audit with faults, a training that diverged); 2
bad input, one sentence on stderr; 130 / 143 interrupted. Anything else that goes wrong is our own
bug and shows its traceback. `StopSignal` lets a long program save first.
"""

import argparse
import errno
import signal
import sys
from dataclasses import field, fields
from io import TextIOWrapper
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints


class UsageError(ValueError):
    """An option that cannot be honoured; the message says which and what to do."""


def require(condition: bool, sentence: str) -> None:
    """UsageError with this sentence unless the condition holds."""
    if not condition:
        raise UsageError(sentence)


def option(default, help, *, positional: bool = False):
    """A dataclass field that is also a command-line option; `help` is the reason it exists."""
    metadata = {"help": help, "positional": positional}
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """A field's name as it is typed: "max_unknown" -> "--max-unknown"."""
    return "--" + name.replace("_", "-")


def make_folder(path: Path) -> None:
    """A folder for results, with its parents; UsageError when there is a file in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{path}: must be a folder, but there is a file") from None


class OneSentenceParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the options\n")


def parse(config_class, arguments: list[str], description: str = ""):
    """Command line -> an instance of `config_class`. Bad options: one sentence, exit code 2."""
    return config_class(**given(config_class, arguments, description))


def given(config_class, arguments: list[str], description: str = "") -> dict:
    """The fields that the command line names, with their values."""
    parser = OneSentenceParser(description=description, allow_abbrev=False)
    types = get_type_hints(config_class)
    for f in fields(config_class):
        kind, settings = types[f.name], {"help": f.metadata["help"]}
        name = f.name if f.metadata["positional"] else flag(f.name)
        if f.default is not False and f.default not in (None, "", ()):
            settings["help"] += f" ({f.default})"
        if get_origin(kind) is Literal:
            settings |= {"choices": get_args(kind)}
        elif get_origin(kind) is tuple:
            settings |= {"nargs": "*", "type": get_args(kind)[0], "metavar": f.name.upper()}
        elif kind is bool:
            settings |= {"action": "store_true"}
        else:
            settings |= {"type": kind, "metavar": kind.__name__.upper()}
        if f.metadata["positional"]:
            settings["metavar"] = f.name.upper()
        parser.add_argument(name, default=argparse.SUPPRESS, **settings)
    named = vars(parser.parse_intermixed_args(arguments))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()}


# --- Options as they are saved --------------------------------------------------------------------


def as_plain(config) -> dict:
    """A config as types that JSON has: paths are texts, tuples are lists."""

    def plain(value):
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {f.name: plain(getattr(config, f.name)) for f in fields(config)}


def from_plain(config_class, plain: dict, what: str) -> dict:
    """The fields that `as_plain` saved, with their types. UsageError for an unknown name or a value
    of another type."""
    types, found = get_type_hints(config_class), {}
    defaults = {f.name: f.default for f in fields(config_class)}
    for name, value in plain.items():
        require(name in types, f"{what} by a version with {flag(name)}; take that version")
        is_possible = value is defaults[name] is None or is_plain(value, types[name])
        require(is_possible, f"{what} with {flag(name)} {value!r}; mend it in config.json")
        if value is not None and types[name] is Path:
            value = Path(value)
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def is_plain(value, kind) -> bool:
    """Whether `as_plain` makes such a value of an option of this type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(is_plain(v, get_args(kind)[0]) for v in value)
    plain = {Path: str, float: (float, int)}.get(kind, kind)
    return isinstance(value, plain) and isinstance(value, bool) == (kind is bool)


def require_same(
    options: dict, before: dict, what: str, go_on: str, may_change: tuple[str, ...] = ()
) -> None:
    """UsageError unless `before` has these options: "{what} with --lr 1, not 2; {go_on} with ...".

    Those in `may_change` may differ or be missing."""
    others = f" (only {', '.join(map(flag, may_change))} may change)" if may_change else ""
    for key, value in options.items():
        if key in may_change:
            continue
        require(
            key in before,
            f"{what} by a version without {flag(key)}; {go_on} with that version",
        )
        require(
            before[key] == value,
            f"{what} with {flag(key)} {before[key]}, not {value}; {go_on} with the same options"
            f"{others}",
        )


# --- How a program ends ---------------------------------------------------------------------------

DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, a quota, ulimit -f
# The outside world's failures that a sentence explains better than a traceback.
ENVIRONMENT_ERRORS = DISK_IS_FULL | {errno.EACCES, errno.EROFS}


def run(main, *user_errors: type[Exception]) -> None:
    """main(sys.argv[1:]), then exit. UsageError and `user_errors`: one sentence, exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may have what a terminal cannot show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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


class StopSignal:
    """Remembers SIGINT or SIGTERM so that the step can end; a second one acts at once.

    Unless `patient`: torchrun hands a signal on to all of its processes, and then sends another.
    """

    received = 0

    def __init__(self, patient: bool = False):
        self.patient = patient

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        self.received = number
        if self.patient:
            return
        signal.signal(number, signal.SIG_DFL)
        print("\nfinishing this step, then saving (once more to quit at once)", file=sys.stderr)
