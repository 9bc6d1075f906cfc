"""support/cli.py: options from a dataclass, and how a program ends."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from support import cli
from support.cli import option, parse

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Config:
    file: Path = option(None, "what to read", positional=True)
    steps: int = option(10, "how long")
    kind: Literal["a", "b"] = option("a", "which")
    tiles: tuple[str, ...] = option((), "some names")
    loud: bool = option(False, "say more")
    out_dir: Path = option(Path("x"), "where to")


def test_types_follow_the_fields():
    config = parse(Config, "f.txt --steps 3 --kind b --tiles p q --loud --out-dir y".split())
    assert config == Config(Path("f.txt"), 3, "b", ("p", "q"), True, Path("y"))
    assert parse(Config, ["f.txt"]) == Config(Path("f.txt"))


def test_help_has_reasons_and_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Config, ["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "how long (10)" in out and "which (a)" in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("", "the following arguments are required: FILE"),
        ("f --stps 3", "unrecognized arguments: --stps"),
        ("f --steps many", "invalid int value: 'many'"),
        ("f --kind c", "invalid choice: 'c'"),
        ("f --step 3", "unrecognized arguments: --step"),  # no abbreviations
    ],
)
def test_wrong_options(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Config, arguments.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in error and error.count("\n") == 1


def raiser(error):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (cli.UsageError("no such thing"), 2, "program.py: no such thing\n"),
        (LookupError("the user's"), 2, "program.py: the user's\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            2,
            "No space left on device: /x/y",
        ),
        (OSError(errno.EFBIG, "File too large", "/x/y"), 2, "File too large: /x/y"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_how_a_run_ends(program, error, code, sentence):
    ended, stderr = program(raiser(error), (LookupError,))
    assert ended == code and sentence in stderr


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program.py"])
    with pytest.raises(ZeroDivisionError):
        cli.run(raiser(ZeroDivisionError()), LookupError)


def test_a_stop_signal_is_remembered_and_a_second_one_acts(capsys):
    """Within the block the first asks, and the second does what it did before; outside nothing."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with cli.StopSignal() as stop:
        assert stop.received == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert "finishing this step, then saving" in capsys.readouterr().err
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_name_that_a_terminal_cannot_show_is_printed_escaped():
    """Names that are no UTF-8, and a terminal of another encoding."""
    code = (
        "from support import cli\n"
        "def main(arguments): print('caf\\udce9.tif', '\\u0433.tif')\n"
        "cli.run(main)"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0 and b"caf\\udce9.tif \\u0433.tif" in done.stdout, done.stderr
