"""Kill a training run again and again, and resume it: is anything unreadable, lost or different?

    python -m tests.soak --kills 200            # about 10 minutes on a core of one's own
    python -m tests.soak --kills 20 --seed 7    # other moments

A small run of train.py is stopped by SIGKILL, SIGTERM or SIGINT: at any time, while it starts, at
the moment when a file is being written, or while it validates. After each kill all its files are
read. Then `train.py --resume --out FOLDER` goes on, with nothing else on the command line. A run
that comes to its end is compared with one that was never disturbed, and the next run begins. Each
is a process of its own, forked from this one so that importing PyTorch is not most of the time.

    unreadable   files that could not be read after a kill
    lost         files that had been there, and steps that a checkpoint had had
    different    finished runs whose weights, optimiser, scores or log differ in any bit

It ends with 1 unless all three are 0. Ctrl-C prints what there is so far. pytest does not collect
this file.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from multiprocessing import Process, get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train
from support import checkpoint, cli
from support.progress import Progress
from support.raster import DataError

# A report after every second step, a validation and a save after every tenth.
OPTIONS = "--data folder --steps 60 --batch 2 --crop 32 --validations 6 --device cpu".split()
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("any time", "start", "writing", "validating")
KINDS = {"best.pt": "ctclm-transformer", "last.pt": "ctclm-training"}
KINDS |= {"previous.pt": "ctclm-training"}


# --- A run ----------------------------------------------------------------------------------------


def write_data(root: Path) -> None:
    """Two images and masks a split, of three classes."""
    rng = np.random.default_rng(0)
    root.mkdir()
    (root / "classes.json").write_text('{"classes": ["a", "b", "c"], "ignore": 255}')
    for split in ("train", "val"):
        for kind, highest, shape in (("images", 256, (64, 96, 3)), ("masks", 3, (64, 96))):
            (root / split / kind).mkdir(parents=True)
            for name in ("x", "y"):
                pixels = rng.integers(0, highest, shape, np.uint8)
                Image.fromarray(pixels).save(root / split / kind / f"{name}.png")


def start(out: Path, root: Path, log: Path) -> Process:
    """A new run, or one that goes on; it prints into `log`."""
    options = ["--resume"] if (out / "config.json").exists() else [*OPTIONS, "--root", str(root)]
    process = get_context("fork").Process(target=run, args=(["--out", str(out), *options], log))
    log.write_text("")
    process.start()
    return process


def run(arguments: list[str], log: Path) -> None:
    """The program train.py in this process."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    sys.argv = ["train.py", *arguments]
    cli.run(train.main, DataError, checkpoint.CheckpointError)


def wait_for(process: Process, condition) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.001)


def disturb(process: Process, out: Path, log: Path, moment: str, rng) -> int:
    """Send a signal at a moment of this kind -> its number, or 0 if the run came to its end."""
    if moment == "start":
        time.sleep(rng.uniform(0, 1))
    else:
        wait_for(process, lambda: "CE T" in log.read_text())  # the first report
        time.sleep(rng.uniform(0, 2))
    if moment == "writing":
        wait_for(process, lambda: any(out.glob(".*.tmp")))
        time.sleep(rng.choice((0, rng.uniform(0, 0.03))))
    if moment == "validating":
        lines = log.read_text().count("\n")
        wait_for(process, lambda: log.read_text().count("\n") > lines)
        time.sleep(rng.uniform(0, 0.1))
    number = rng.choice(SIGNALS)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    code = process.exitcode
    if code == 0:
        return 0
    if code not in (-number, 128 + number):
        sys.exit(f"{out}: ended with {code} after signal {number}:\n{log.read_text()}")
    return number


# --- What is left of it ---------------------------------------------------------------------------


def unreadable(out: Path) -> list[str]:
    """The run's files that cannot be read, with the reason."""
    found = []
    for path in out.iterdir():
        try:
            if path.name in KINDS:
                checkpoint.read(path, KINDS[path.name])
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                rows = [*csv.DictReader(open(path, newline=""))]
                assert all(None not in row and None not in row.values() for row in rows)
            elif path.suffix == ".png":
                Image.open(path).load()
        except (ValueError, OSError, AssertionError) as error:
            found.append(f"{path.name}: {error}")
    return found


def newest_step(out: Path) -> int:
    """Of the checkpoints that can be read."""
    steps = [0]
    for name in ("last.pt", "previous.pt"):
        try:
            steps.append(checkpoint.read(out / name, "ctclm-training")["step"])
        except checkpoint.CheckpointError:
            pass
    return max(steps)


def names(out: Path) -> set[str]:
    """The files that a run keeps; last.pt and previous.pt are one of which the other is a copy."""
    kept = {path.name for path in out.iterdir()} if out.exists() else set()
    return {name for name in kept if not name.endswith(".tmp")} - {"last.pt"}


def result(out: Path) -> dict:
    """What a finished run must have in common with an undisturbed one: tensors as bytes."""
    state = checkpoint.read(out / "last.pt", "ctclm-training")
    timing = {"images_per_s", "data_wait"}
    tensors = {"optimizer": state["optimizer"]["state"], "model": state["model"]}
    tensors["best"] = checkpoint.read(out / "best.pt", "ctclm-transformer")["model"]
    return {
        "log": [{k: v for k, v in row.items() if k not in timing} for row in state["log"]],
        "scores": json.loads((out / "metrics.json").read_text())["validation"],
        **{name: as_bytes(value) for name, value in tensors.items()},
    }


def as_bytes(value):
    if isinstance(value, dict):
        return {key: as_bytes(v) for key, v in value.items()}
    return value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else value


# --- The soak -------------------------------------------------------------------------------------


def soak(folder: Path, kills: int, rng: random.Random, counts: Counter) -> None:
    """Runs, each killed until it comes to its end, until there were so many kills."""
    root, log = folder / "data", folder / "output.txt"
    write_data(root)
    start(folder / "undisturbed", root, log).join()
    wanted = result(folder / "undisturbed")
    with Progress("kills") as progress:
        while counts["kills"] < kills:
            out = folder / f"run{counts['finished']}"
            before, step = names(out), newest_step(out) if out.exists() else 0
            moment = rng.choice(MOMENTS)
            number = disturb(start(out, root, log), out, log, moment, rng)
            if "Traceback" in log.read_text():
                sys.exit(log.read_text())
            if number:
                counts["kills"] += 1
                counts[f"{signal.Signals(number).name}, {moment}"] += 1
                counts["half-written files"] += len([*out.glob(".*.tmp")]) if out.exists() else 0
                progress(counts["kills"] / kills)
            else:
                counts["finished"] += 1
                ours = result(out)
                different = [name for name in wanted if ours[name] != wanted[name]]
                counts["different"] += bool(different)
                print(f"run {counts['finished']} finished", *different, flush=True)
            if out.exists():
                bad = unreadable(out)
                gone = before - names(out)
                back = newest_step(out) < step
                counts["unreadable"] += len(bad)
                counts["lost"] += len(gone) + back
                for text in [*bad, *gone]:
                    print(f"run {counts['finished']}, {moment}: {text}", flush=True)


def main() -> int:
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports what the runs would import each
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    options = parser.parse_args()
    begin, counts = time.perf_counter(), Counter()
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        soak(Path(folder), options.kills, random.Random(options.seed), counts)
    for name in sorted(counts.keys() - {"unreadable", "lost", "different"}):
        print(f"{name:24} {counts[name]}")
    for name in ("unreadable", "lost", "different"):
        print(f"{name:24} {counts[name]}")
    print(f"{time.perf_counter() - begin:.0f} s")
    return int(any(counts[name] for name in ("unreadable", "lost", "different")))


if __name__ == "__main__":
    sys.exit(main())
