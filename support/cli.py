"""The command line: options from a dataclass, and how a program ends.

A program declares its options once, as a dataclass. Types, choices, defaults and `--help` follow
from the fields, and the same object is saved in `config.json` and in the checkpoint.

    @dataclass
    class Config:
        steps: int = option(1200, "optimiser steps")

    def main(arguments): config = parse(Config, arguments)
    if __name__ == "__main__": run(main, DataError)

Exit codes: 0 done; 2 bad input, one sentence on stderr; 130 / 143 interrupted. Anything else that
goes wrong is our own bug and shows its traceback. `StopSignal` lets a long program save first.
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


def require_same(options: dict, before: dict, what: str, go_on: str) -> None:
    """UsageError unless `before` has these options: "{what} with --lr 1, not 2; {go_on} with ..."""
    for key, value in options.items():
        require(
            key in before,
            f"{what} by a version without {flag(key)}; {go_on} with that version",
        )
        require(
            before[key] == value,
            f"{what} with {flag(key)} {before[key]}, not {value}; {go_on} with the same options",
        )


# The outside world's failures that a sentence explains better than a traceback.
ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}


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
    """Remembers SIGINT or SIGTERM so that the step can end; a second one acts at once."""

    received = 0

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        print("\nfinishing this step, then saving (once more to quit at once)", file=sys.stderr)
