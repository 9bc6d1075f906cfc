"""experiments/ablation.py: what settings share, and cells that were interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import Scene
from experiments import ablation
from experiments.settings import SETTINGS
from experiments.table import CROP, crop_places, draw_crops, read_scores
from infer import evaluate
from support import cli
from support.checkpoint import CheckpointError, read
from support.raster import DataError

ERRORS = (DataError, CheckpointError)
TRAINED = [name for name, setting in SETTINGS.items() if setting.build]


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    """Runs of their own processes would send every kernel through Triton's slow interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def threads():
    """The program takes fewer for each of several seeds."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path, write_folder):
    """small(**options) -> a Config for cells of a second on 2 + 2 images of 96 x 64 pixels."""
    root = write_folder(tmp_path / "data", size=(64, 96))

    def config(**options):
        settings = {"data": "folder", "root": root, "steps": 2, "batch": 2, "crop": 32, "seeds": 1}
        settings |= {"device": "cpu", "results": tmp_path / "results", "out": tmp_path / "runs"}
        return ablation.Config(**settings | options)

    return config


def on_command_line(config, *settings):
    """The arguments that give this configuration."""
    names = "data root steps batch crop seeds jobs device results out".split()
    arguments = [x for key in names for x in (cli.flag(key), getattr(config, key))]
    return [*arguments, "--settings", *settings]


@pytest.fixture
def measured(monkeypatch):
    """Times that nobody has to measure."""
    monkeypatch.setattr(ablation, "step_times", lambda *_: {"full": 5.0, "transformer": 2.0})


@pytest.fixture
def cell(small):
    """cell(name, **options) -> the cell of seed 3, and the training set."""

    def make(name, **options):
        config = small(**options)
        train_set, _ = ablation.load_splits(config)
        return ablation.Cell(name, ablation.options_of(config, name, 3, 2.0), train_set), train_set

    return make


class ThisProcess:
    """A pool of no processes, for tests of what is made of finished cells."""

    def __init__(self, *_, **__):
        self.imap_unordered = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


# --- What the settings share, and where they differ ----------------------------------------------


def test_every_setting_starts_with_the_same_transformer(cell):
    first, _ = cell("transformer")
    for name in TRAINED:
        transformer = cell(name)[0].model.branches.get("transformer")
        for key, x in transformer.state_dict().items() if transformer else ():
            assert torch.equal(x, first.model.transformer.state_dict()[key]), (name, key)


def test_every_setting_sees_the_same_windows(cell, monkeypatch):
    """One with more steps takes more at a time, and ends with the others."""
    seen, order = {}, []

    def note(self, images, labels):
        seen.setdefault(self.name, []).append(images.sum() + labels.sum(dtype=int))
        order.append(self.name[0])
        self.step += 1

    monkeypatch.setattr(ablation.train.Run, "train_step", note)
    made = [cell(name) for name in ("transformer", "full", "doubled")]
    windows = ablation.train.make_windows(made[0][0].config, made[0][1].scenes)
    monkeypatch.setattr(ablation.Cell, "save", lambda self: None)
    ablation.train_side_by_side([c for c, _ in made], windows)
    assert "".join(order) == "tfdd" * 2
    assert len(set(seen["doubled"])) == 4  # of two windows
    assert seen["transformer"] == seen["full"] == seen["doubled"][:2]


def test_only_steps_and_rate_differ_between_the_options_of_settings(small):
    config = small()
    full = ablation.options_of(config, "full", 0, 2.5).saved()

    def changed(name):
        saved = ablation.options_of(config, name, 0, 2.5).saved()
        return {key: value for key, value in saved.items() if value != full[key]}

    wanted = {name: {} for name in SETTINGS}
    wanted |= {"equal-time": {"steps": 5}, "doubled": {"steps": 4}}
    wanted["perturbed"] = {"lr": pytest.approx(3e-3 * 1.0001)}
    assert {name: changed(name) for name in SETTINGS} == wanted


def test_the_frozen_teacher_is_the_mean_cnn(small):
    config = small(steps=20)
    ablation.run_seed((config, 0, ["frozen"], 1.0, 1))
    train_set, _ = ablation.load_splits(config)
    cnn, frozen = (
        ablation.Cell(
            name, ablation.options_of(config, name, 0, 1.0), ablation.load_splits(config)[0]
        )
        for name in ("cnn", "frozen")
    )
    cnn.restore()
    cnn.use_mean()
    frozen.restore()
    ours, theirs = frozen.model.cnn.state_dict(), cnn.model.cnn.state_dict()
    learned = dict(cnn.model.cnn.named_parameters())
    assert all(torch.equal(ours[key], theirs[key]) for key in learned)
    assert not ablation.maps_of(config, "cnn", 0).exists()  # it was not asked for


def test_a_cell_may_go_on_elsewhere(cell):
    """Saved where a step is captured as a graph, restored where none is."""
    one, train_set = cell("transformer", steps=20)
    for group in one.optimizer.param_groups:
        group["capturable"] = True
    one.save()
    again, _ = cell("transformer", steps=20)
    again.restore()
    assert not any(group["capturable"] for group in again.optimizer.param_groups)


def test_the_mean_is_over_the_last_tenth_of_the_steps(cell):
    """Of 20 steps the last two; a batch norm's statistics too."""
    one, train_set = cell("full", steps=20)
    windows, kept = ablation.train.make_windows(one.config, train_set.scenes), []
    for step in range(20):
        one.train_step(*windows.batch(step))
        kept.append([x.clone() for x in one.weights()])
    one.use_mean()
    for found, *last_two in zip(one.weights(), *kept[-2:], strict=True):
        torch.testing.assert_close(found, sum(last_two) / 2)
    names = [k for k, x in one.model.state_dict().items() if x.is_floating_point()]
    assert any("running_var" in name for name in names) and len(names) == len(one.weights())


@pytest.mark.gpu
@pytest.mark.usefixtures("any_algorithm")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("variant, crop", [("tiny", 128), ("b0", 256)])
def test_cells_beside_each_other_have_the_bits_of_one_alone(small, variant, crop):
    """On a GPU they run at the same time, on a stream and in a graph each. The same setting three
    times is the same three times; maps too."""
    names, ends = ["transformer", "full", "penalised", "twin"], {}
    for out, together in (
        ("a", names),
        ("b", ["perturbed", *names, "equal-time"]),
        ("c", names[:1]),
    ):
        config = small(out=small().out / out, device="cuda", steps=60, variant=variant, crop=crop)
        train_set, splits = ablation.load_splits(config)
        cells = []
        for name in together:
            options = ablation.options_of(config, name, 0, 1.0)
            options.lr = config.lr  # also of the perturbed one
            cells.append(ablation.Cell(name, options, train_set))
        windows = ablation.train.make_windows(cells[0].config, train_set.scenes)
        ablation.train_side_by_side(cells, windows)
        for cell in cells:
            assert cell.one_update.graph is not None
            cell.use_mean()
            kind = cell.name if cell.name in names else "transformer"
            found = [x.cpu() for x in cell.weights()]
            wanted = ends.setdefault(kind, found)
            differ = sum(not torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert not differ, f"{cell.name} of {out}: {differ} of {len(found)} tensors differ"


# --- Cells --------------------------------------------------------------------------------------


def test_a_table_goes_on_where_it_stopped(small, program, measured, monkeypatch):
    """Seed 0 in this process, seed 1 in one of its own."""
    config = small(jobs=2)
    settings = ["transformer", "frozen", "full", "ensemble"]
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "get_context", lambda _: SimpleNamespace(Pool=ThisProcess))
        assert program(ablation.main, ERRORS, *on_command_line(config, *settings)) == (0, "")
    found = read_scores(config.results / "scores.csv")
    names = dict.fromkeys(row["setting"] for row in found)
    assert [*names] == ["transformer", "frozen", "full", "ensemble"]
    assert (config.out / "cnn/0.pt").exists()  # the frozen one's teacher
    table = (config.results / "table.md").read_text()
    assert "| 9 | full | 1 |" in table
    assert "| 12 | full, a second Transformer for the CNN | open |" in table
    assert Image.open(config.results / "differences.png").width > 500
    assert Image.open(config.out / "crops.png").width > 100

    def forbidden(*_):
        raise AssertionError("a finished cell was run again")

    # Seed 0 is finished: only the cell of seed 1 may be run.
    monkeypatch.setattr(ablation, "step_times", forbidden)
    before = (config.out / "full/0.pt").stat().st_mtime_ns
    again = on_command_line(small(jobs=2, seeds=2), "full")
    assert program(ablation.main, ERRORS, *again) == (0, "")
    assert (config.out / "full/0.pt").stat().st_mtime_ns == before
    rows = read_scores(config.results / "scores.csv")
    assert {row["seed"] for row in rows if row["setting"] == "full"} == {0, 1}
    assert [row for row in rows if row["seed"] == 0] == found


def test_a_cell_that_was_stopped_ends_in_the_same_weights(small, monkeypatch):
    whole, config = small(steps=20, out=small().out / "whole"), small(steps=20)
    task = (0, ["full", "frozen"], 1.0, 1)
    ablation.run_seed((whole, *task))
    told = ablation.train.Run.train_step

    def stop_at_19(self, *batch):
        told(self, *batch)
        if self.step == 19 and self.name == "full":
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(ablation.StoppedError):
        patch.setattr(ablation.train.Run, "train_step", stop_at_19)
        ablation.run_seed((config, *task))
    assert read(config.out / "full/0.pt", "ctclm-cell")["step"] == 19
    ablation.run_seed((config, *task))
    for name in ("full", "frozen"):
        ours, theirs = (read(c.out / f"{name}/0.pt", "ctclm-cell") for c in (config, whole))
        assert all(torch.equal(ours["model"][key], x) for key, x in theirs["model"].items())
        assert all(map(torch.equal, ours["mean"], theirs["mean"]))
        ours, theirs = (np.load(ablation.maps_of(c, name, 0)) for c in (config, whole))
        assert [*ours] == [*theirs] and all(np.array_equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")
@pytest.mark.parametrize("to_a_seed", [False, True])
def test_an_interrupted_table_saves_its_cells(small, measured, to_a_seed):
    """Told to stop, the program or one of its seeds: nothing is left running, and all saved."""
    config = small(steps=100_000, seeds=4, jobs=2)
    ablation.prepare(config, None)  # here, where nothing is measured
    arguments = on_command_line(config, "transformer", "full")
    process = subprocess.Popen([sys.executable, "-m", "experiments.ablation", *map(str, arguments)])
    run, children = process.pid, f"/proc/{process.pid}/task/{process.pid}/children"
    if not os.path.exists(children):
        process.kill()
        pytest.skip("the system does not list a process's children")
    limit, seeds = time.monotonic() + 120, []
    while len(seeds) < 2:  # that have a handler and so have begun to train
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.2)
        seeds = [child for child in map(int, open(children).read().split()) if catches(child)]
    time.sleep(1)  # some steps
    os.kill(max(seeds) if to_a_seed else run, signal.SIGTERM)
    assert process.wait(60) == 128 + (signal.SIGINT if to_a_seed else signal.SIGTERM)
    for name in ("transformer", "full"):
        for seed in (0, 1):
            assert read(config.out / name / f"{seed}.pt", "ctclm-cell")["step"] > 0


def catches(process: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM."""
    status = open(f"/proc/{process}/status").read()
    return int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1 == 1


def test_scores_are_of_the_mean_weights_on_each_split(small):
    config = small()
    assert ablation.run_seed((config, 0, ["full"], 1.0, 1)) == 0
    train_set, splits = ablation.load_splits(config)
    rows = ablation.score_cell(config, "full", 0, 1.0, splits)
    cell = ablation.Cell("full", ablation.options_of(config, "full", 0, 1.0), train_set)
    cell.restore()
    cell.use_mean()
    found = {(r["branch"], r["split"], r["score"], r["class"]): r["value"] for r in rows}
    for branch, model in cell.model.branches.items():
        for split, dataset in splits.items():
            scores = evaluate(model.eval(), dataset)
            for name in ("miou", "boundary_f1", "oa"):
                assert found[branch, split, name, ""] == round(100 * scores[name], 3)
            for k, iou in enumerate(scores["iou"]):
                of_class = found.get((branch, split, "iou", dataset.classes.names[k]))
                assert of_class == (iou if iou is None else round(100 * iou, 3))


def test_all_scenes_together_are_counted_together():
    """By hand: one split has 3 of 4 pixels right, the other 1 of 4; together 4 of 8."""
    label = np.array([[0, 0], [1, 1]], np.uint8)
    scenes = [Scene("x", np.zeros((2, 2, 3), np.uint8), label)]
    dataset = SimpleNamespace(names=("a", "b")), scenes
    maps = {"val": [np.array([[0, 0], [1, 0]])], "test": [np.array([[1, 1], [0, 1]])]}
    rows = ablation.scores_of(maps, {"val": dataset, "test": dataset})
    assert [r["value"] for r in rows if r["score"] == "oa"] == [75, 25, 50]
    ious = {r["class"]: r["value"] for r in rows if r["score"] == "iou" and r["split"] == "all"}
    assert ious == {"a": round(100 * 2 / 6, 3), "b": round(100 * 2 / 6, 3)}


def test_other_options_need_another_table(small, measured, monkeypatch):
    config = small()
    options = ablation.prepare(config, None)
    assert json.loads((config.results / "options.json").read_text()) == options
    assert options["time_ratio"] == 2.5 and options["steps"] == 2
    with pytest.raises(cli.UsageError, match="was made with --steps 2, not 3"):
        ablation.prepare(small(steps=3), None)
    with pytest.raises(cli.UsageError, match="was made with --root data, not other"):
        ablation.prepare(small(root=config.root.parent / "other"), None)
    with monkeypatch.context() as patch:
        patch.setattr(ablation.machine, "pick_device", lambda name: torch.device("cuda"))
        with pytest.raises(cli.UsageError, match="was made with --device cpu, not cuda"):
            ablation.prepare(config, None)
    cell = ablation.Cell(
        "full", ablation.options_of(config, "full", 0, 1.0), ablation.load_splits(config)[0]
    )
    cell.save()
    cell.config.lr = 1.0
    with pytest.raises(cli.UsageError, match="0.pt: was made with --lr 0.003, not 1.0"):
        cell.restore()


def test_maps_of_another_table_are_not_scored(small, program, measured, monkeypatch):
    """Two tables that share --out, by mistake: the second's cells are not those of the first."""
    monkeypatch.setattr(ablation, "get_context", lambda _: SimpleNamespace(Pool=ThisProcess))
    config = small()
    assert program(ablation.main, ERRORS, *on_command_line(config, "transformer")) == (0, "")
    other = small(steps=3, results=config.results.parent / "other")
    code, error = program(ablation.main, ERRORS, *on_command_line(other, "transformer"))
    path = ablation.maps_of(config, "transformer", 0)
    assert code == 2 and f"{path}: was made with --steps 2, not 3; choose another --out" in error
    assert not (other.results / "scores.csv").exists()
    with np.load(path) as maps:  # as they were written before they had options
        kept = {key: x for key, x in maps.items() if key != "options"}
    np.savez_compressed(path, **kept)
    again = on_command_line(small(results=other.results.parent / "third"), "transformer")
    code, error = program(ablation.main, ERRORS, *again)
    assert code == 2 and f"{path}: was made by a version without --" in error


def test_a_test_split_without_labels_is_not_scored(small, monkeypatch):
    """As LoveDA's, and Potsdam's where its labels are not there."""
    monkeypatch.setattr(ablation, "load", lambda data, root, name, cache: name)
    config = small()
    shutil.copytree(config.root / "val", config.root / "test")
    assert ablation.load_splits(config) == ("train", {"val": "val", "test": "test"})
    shutil.rmtree(config.root / "test/masks")
    assert ablation.load_splits(config) == ("train", {"val": "val"})
    shutil.rmtree(config.root / "test")
    assert ablation.load_splits(config) == ("train", {"val": "val"})
    assert ablation.load_splits(ablation.Config()) == ("train", {"val": "val", "test": "test"})


def test_steps_are_timed_with_the_threads_that_they_will_have(small, program, monkeypatch):
    """On a CPU the ratio of times depends on them, and so the steps of (2)."""
    found = []
    monkeypatch.setattr(ablation, "get_context", lambda _: SimpleNamespace(Pool=ThisProcess))

    def times(*_):
        found.append(torch.get_num_threads())
        return {"full": 5.0, "transformer": 2.0}

    def run(task):
        found.append(task[-1])
        raise ablation.StoppedError

    monkeypatch.setattr(ablation, "step_times", times)
    monkeypatch.setattr(ablation, "run_seed", run)
    torch.set_num_threads(2)
    code, _ = program(ablation.main, ERRORS, *on_command_line(small(jobs=2), "full"))
    assert code == 128 + signal.SIGINT and found == [1, 1]


def test_times_are_of_each_setting_that_is_trained(small):
    config = small(settings=("equal-time", "frozen", "ensemble"))
    times = ablation.step_times(config, ablation.load_splits(config)[0])
    assert sorted(times) == ["frozen", "full", "transformer"] and min(times.values()) > 0


# --- Pictures and options ------------------------------------------------------------------------


def test_crop_is_where_the_boundaries_are():
    label = np.zeros((200, 300), np.uint8)
    label[120:, 220::2] = 1
    top, left = crop_places(Scene("x", np.zeros((200, 300, 3), np.uint8), label))
    assert (top.stop, left.stop) == (200, 300) and top.stop - top.start == CROP


def test_a_cnn_alone_has_its_column_of_crops(small):
    """It has no Transformer's map."""
    config = small()
    _, splits = ablation.load_splits(config)
    val = splits["val"]
    paths = {name: ablation.maps_of(config, name, 0) for name in SETTINGS}
    assert draw_crops(paths, "val", val) is None
    path = paths["cnn"]
    path.parent.mkdir(parents=True)
    np.savez(path, **{f"cnn/val/{i}": scene.label[:] for i, scene in enumerate(val.scenes)})
    alone = draw_crops(paths, "val", val)
    full = paths["full"]
    full.parent.mkdir()
    np.savez(full, **{f"transformer/val/{i}": s.label[:] for i, s in enumerate(val.scenes)})
    assert draw_crops(paths, "val", val).width > alone.width


def test_bad_options_get_one_sentence(program, tmp_path):
    code, error = program(ablation.main, ERRORS, "--settings", "fulll")
    assert code == 2 and "there is no fulll; the settings are transformer" in error
    code, error = program(ablation.main, ERRORS, "--seeds", 99)
    assert code == 2 and "--seeds must be 1 to 20; got 99" in error
    code, error = program(ablation.main, ERRORS, "--data", "folder")
    assert code == 2 and "--root" in error
    code, error = program(ablation.main, ERRORS, "--out", tmp_path, "--results", "README.md/x")
    assert code == 2 and "README.md/x: must be a folder, but there is a file" in error
    code, error = program(ablation.main, ERRORS, "--jobs", 0)
    assert code == 2 and "--jobs must be positive; got 0" in error


def test_the_handler_of_sigterm_is_what_it_was(small, program, measured, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ablation, "get_context", lambda _: SimpleNamespace(Pool=ThisProcess))
    assert program(ablation.main, ERRORS, *on_command_line(small(), "transformer")) == (0, "")
    assert signal.getsignal(signal.SIGTERM) is before
