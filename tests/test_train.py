"""train.py: the loop, what it leaves behind, stopping, resuming, and refusing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train
from ctclm import CTCLM, ModelConfig, ramp_up
from infer import load_transformer
from support import cli, diagnostics, safetensors
from support.checkpoint import CheckpointError, read
from support.raster import DataError
from support.segformer import to_published

ERRORS = (DataError, CheckpointError)


@pytest.fixture
def drawn():
    """For a test that looks at the pictures."""


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """They take most of a small run's time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(train.Run, "draw", lambda run: None)


def run(config):
    run = train.prepare(config)
    run.fit()
    run.finish()
    return run


def test_a_run_leaves_what_it_promises(small, drawn, program):
    config = small()
    arguments = ["--data", "folder", "--root", config.root, "--out", config.out]
    code, error = program(train.main, ERRORS, *arguments, "--steps", 6, "--batch", 2, "--crop", 32)
    assert code == 0, error
    assert {path.name for path in config.out.iterdir()} == {
        "cache",
        "config.json",
        "log.csv",
        "metrics.json",
        "curves.png",
        "samples.png",
        "story.png",
        "last.pt",
        "previous.pt",
        "best.pt",
    }
    assert json.loads((config.out / "config.json").read_text())["steps"] == 6
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert 0 <= metrics["validation"]["miou"] <= 1 and 0 <= metrics["cnn_validation"]["oa"] <= 1
    assert metrics["machine"]["torch"] == torch.__version__
    assert os.name != "posix" or 1e8 < metrics["peak_memory_bytes"] < 1e11
    rows = list(csv.DictReader(open(config.out / "log.csv")))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("cnn_to_transformer", "transformer_to_cnn", "align", "region", "gate"):
        assert all(np.isfinite(float(row[name])) for row in rows)
    assert all(0 <= float(row["data_wait"]) <= 1 for row in rows)
    assert 1 <= float(rows[-1]["cnn_rank_4"]) <= 64
    assert all(0 <= float(row["agreement"]) <= 1 for row in rows)
    ious = [float(rows[-1][f"transformer_val_iou_{k}"]) for k in range(3)]
    assert np.mean(ious) == pytest.approx(float(rows[-1]["transformer_val_miou"]))
    sizes = {name: Image.open(config.out / name).size for name in ("curves.png", "story.png")}
    assert sizes == {"curves.png": (1120, 960), "story.png": (1120, 960)}  # 5 and 6 panels, in twos
    # Six columns of 96 pixels, a row for each of the two validation scenes, the legend.
    width, height = Image.open(config.out / "samples.png").size
    assert width >= 6 * 96 and height > 2 * 64


def test_best_is_the_branch_and_nothing_else(small):
    run_ = run(small(steps=2))
    student = load_transformer(run_.config.out / "best.pt")
    names = read(run_.config.out / "best.pt", "ctclm-transformer")["model"].keys()
    assert names == run_.model.transformer.state_dict().keys()
    assert student.about.classes.names == ("a", "b", "c")
    assert student.about.step == run_.best["step"]
    if run_.best["step"] == run_.step:  # otherwise training went on from there
        images = torch.rand(1, 3, 64, 64) * 255
        run_.model.eval()
        assert torch.equal(student(images), run_.model(images).transformer_logits)


def test_best_is_the_best_validation(small, monkeypatch):
    """Validation scores 0.3, 0.7, 0.5: the second is kept, although training goes on."""
    values = iter([0.3, 0.1, 0.7, 0.2, 0.5, 0.9])
    monkeypatch.setattr(train, "REPORTS", 6)
    monkeypatch.setattr(
        train, "evaluate", lambda *a, **k: {"miou": next(values), "iou": [0.5, 0.5, 0.5]}
    )
    run_ = train.prepare(small(validations=3))
    assert run_.model.class_weights is None
    run_.fit()
    assert (run_.best["step"], run_.best["miou"], run_.best["cnn"]["miou"]) == (4, 0.7, 0.2)
    assert load_transformer(run_.config.out / "best.pt").about.val_miou == 0.7


@pytest.mark.parametrize("asked, found", [(1, 1), (4, 4), (6, 6), (7, 6), (20, 15), (99, 30)])
def test_it_validates_no_more_often_than_asked(small, monkeypatch, asked, found):
    """With some of the 30 reports, and after the last step."""
    run_, steps = train.prepare(small(steps=60, validations=asked)), []

    def count(images, labels):
        run_.step += 1

    monkeypatch.setattr(run_, "train_step", count)
    monkeypatch.setattr(run_, "report", lambda since: None)
    monkeypatch.setattr(run_, "save", lambda: None)
    monkeypatch.setattr(run_, "validate", lambda: steps.append(run_.step))
    monkeypatch.setattr(train.diagnostics, "line", lambda *_: "")
    monkeypatch.setattr(train.diagnostics, "live_line", lambda *_: "")
    run_.fit()
    assert len(steps) == found and steps[-1] == 60


def test_the_log_has_the_rate_and_the_ramp_of_its_last_step(small):
    """Not those of the step to come, which after the last one would be a rate of 0."""
    run_ = train.prepare(small(steps=40))
    run_.fit()
    for row in run_.log:
        assert row["lr"] == run_.learning_rate(row["step"] - 1) > 0
        assert row["ramp"] == ramp_up(row["step"] - 1, 40)


def test_a_run_is_resumed_where_it_is_now(small):
    """AdamW of a GPU's run can be captured, a CPU's cannot: the file does not decide."""
    config = small(steps=1)
    run(config)
    state = read(config.out / "last.pt", "ctclm-training")
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True
    train.checkpoint.save(state, config.out / "last.pt")
    groups = train.prepare(small(steps=1, resume=True)).optimizer.param_groups
    assert [group["capturable"] for group in groups] == [False, False]


def test_a_resumed_run_remembers_its_best(small):
    """Or its next validation, however bad, would replace best.pt."""
    first = run(small(steps=1))
    assert first.best["step"] == 1
    assert train.prepare(small(steps=1, resume=True)).best == first.best


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_program_saves_first(small, number):
    config = small()
    arguments = ["--data", "folder", "--root", str(config.root), "--out", str(config.out)]
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments, "--steps", "100000", "--batch", "2"]
        + ["--crop", "32", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    while not (line := process.stdout.readline()).startswith("on "):  # where it trains
        assert process.poll() is None, process.stderr.read()
    assert " CPU, " in line
    time.sleep(0.5)  # into the first steps
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "CE  " in out and diagnostics.COMPILING not in out  # a CPU compiles nothing
    step = read(config.out / "last.pt", "ctclm-training")["step"]
    assert step > 0 and f"saved at step {step}" in out and "Traceback" not in error


def test_a_gradient_that_is_not_finite_stops_the_run(small, program, monkeypatch):
    """Weights are left alone, and the message names the branch and the step."""
    config = small()
    objective = train.CTCLM.objective
    calls = []

    def spoiled(self, *arguments):
        losses = objective(self, *arguments)
        calls.append({k: v.clone() for k, v in self.state_dict().items()})
        factor = float("nan") if len(calls) == 3 else 1.0
        return losses._replace(total=losses.total * factor)

    monkeypatch.setattr(train.CTCLM, "objective", spoiled)
    run_ = train.prepare(config)
    sentence = "gradient of the transformer is .* at step 2 .*--lr"
    with pytest.raises(train.DivergedError, match=sentence):
        run_.fit()
    parameters = dict(run_.model.named_parameters())
    assert all(torch.equal(calls[2][name], p) for name, p in parameters.items())


def test_learning_rate(small):
    """Warm-up over a twentieth of 100 steps: 1/5, 2/5, ... of the highest; then down to 0."""
    run_ = train.prepare(small(steps=100, lr=1e-3))
    rates = []
    for run_.step in range(100):
        rates.append(run_.learning_rate(run_.step))
    assert rates[0] == pytest.approx(2e-4) and rates[4] == rates[5] == 1e-3
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 1e-6


@pytest.mark.parametrize("step", [0, 5, 20, 99])
def test_a_step_uses_the_learning_rate_and_the_ramp_of_its_number(small, step):
    """The total is what the terms add up to under this step's ramp, and the optimiser's rate is
    this step's."""
    run_ = train.prepare(small(steps=100))
    run_.step = step
    rate = run_.learning_rate(run_.step)
    loss = run_.train_step(*run_.windows.batch(0))
    c, ramp = run_.model.config, ramp_up(step, 100)
    collaboration = c.align_weight * loss.align + c.region_weight * loss.region
    collaboration += c.transfer_weight * (loss.cnn_to_transformer + loss.transformer_to_cnn)
    wanted = loss.transformer_ce + loss.cnn_ce + ramp * collaboration
    torch.testing.assert_close(loss.total, wanted + c.decorrelation_weight * loss.decorrelation)
    assert collaboration > 0.1  # so that another ramp would show
    assert {group["lr"] for group in run_.optimizer.param_groups} == {rate}


def test_gradients_are_clipped_for_each_part_by_itself(small):
    """To a norm of 1: of a branch whose gradient is large, and without touching the others."""
    run_ = train.prepare(small())
    parts = run_.model.branches | {"projectors": run_.model.projectors}
    sizes = {"transformer": 50.0, "cnn": 0.5, "projectors": 3.0}
    for name, part in parts.items():
        parameters = list(part.parameters())
        total = sum(p.numel() for p in parameters)
        for p in parameters:
            p.grad = torch.full_like(p, sizes[name] / total**0.5)
    run_.clip_gradients()
    for name, part in parts.items():
        norm = torch.stack([p.grad.norm() for p in part.parameters()]).norm().item()
        assert norm == pytest.approx(min(sizes[name], 1.0), rel=1e-4), name


def test_a_step_clips_before_it_updates(small, monkeypatch):
    run_ = train.prepare(small())
    order = []
    for owner, name in ((run_, "clip_gradients"), (run_.optimizer, "step")):
        wrapped = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, name=name, wrapped=wrapped: [order.append(name), wrapped(*a)][1]
        )
    run_.train_step(*run_.windows.batch(0))
    assert order == ["clip_gradients", "step"]


def test_a_step_forgets_the_gradients_of_the_last(small, monkeypatch):
    """Twice the same step without moving: the same gradients. Clipping would hide a sum of two."""
    run_ = train.prepare(small(lr=1e-30))
    monkeypatch.setattr(run_, "clip_gradients", lambda: torch.ones(3))
    gradients = []
    for run_.step in (0, 0):
        run_.train_step(*run_.windows.batch(0))
        gradients.append([p.grad.clone() for p in run_.model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first)


def test_validation_is_in_evaluation_mode_and_training_is_not(small, monkeypatch):
    """The Transformer's head has batch statistics, so this changes its maps."""
    run_, seen = train.prepare(small()), []
    monkeypatch.setattr(train, "evaluate", lambda branch, *_, **__: seen.append(branch.training))
    run_.evaluate(run_.val_set)
    assert seen == [False, False]
    assert all(module.training for module in run_.model.modules())


def test_the_seed_reaches_weights_and_windows(small, tmp_path):
    one, two = (train.prepare(small(seed=s, out=tmp_path / str(s))) for s in (1, 2))
    for name in ("transformer", "cnn"):
        a, b = (next(run_.model.branches[name].parameters()) for run_ in (one, two))
        assert not torch.equal(a, b)
    assert not np.array_equal(one.windows.batch(0)[0], two.windows.batch(0)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_is_of_forward_pass_and_objective(small, monkeypatch, compiled):
    """What is compiled computes the step's losses; the update around it stays as it is."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda function: given.append(function) or function)
    run_ = train.prepare(small(compile=compiled))
    assert given == [run_.loss] * compiled and run_.config.saved()["compile"] == compiled
    assert run_.train_step(*run_.windows.batch(0)).total.isfinite()


def test_weight_decay_is_for_matrices_only(small):
    run_ = train.prepare(small())
    decayed, free = run_.optimizer.param_groups
    assert decayed["weight_decay"] > 0 == free["weight_decay"]
    sizes = {id(p): name for name, p in run_.model.named_parameters()}
    assert not [n for p in free["params"] if (n := sizes[id(p)]).endswith("query.weight")]
    for name in ("norm1.weight", "query.bias", "g1", "head.norm.weight"):
        assert [n for p in free["params"] if (n := sizes[id(p)]).endswith(name)]
        assert not [n for p in decayed["params"] if (n := sizes[id(p)]).endswith(name)]


def test_costs_of_what_is_trained_and_deployed(small):
    run_ = train.prepare(small())
    cost = run_.cost
    parts = {name: list(part.parameters()) for name, part in run_.model.branches.items()}
    parts["projectors"] = list(run_.model.projectors.parameters())
    sizes = {name: sum(p.numel() for p in parameters) for name, parameters in parts.items()}
    assert cost["deployed"]["parameters"] == sizes["transformer"]
    assert cost["trained"]["parameters"] == sum(sizes.values())
    assert cost["trained"]["multiply_adds"] > 1.5 * cost["deployed"]["multiply_adds"]


# --- Data ---------------------------------------------------------------------------------------


def test_channels_follow_the_data(small, tmp_path, write_isprs):
    """Red, green, blue and infrared, from the files to best.pt."""
    root = write_isprs(tmp_path / "potsdam", kinds=("RGB", "RGBIR"))
    run_ = run(small(data="potsdam", root=root, bands="rgbir", steps=2, rare_class_fraction=0.5))
    student = load_transformer(run_.config.out / "best.pt")
    assert student.about.bands == "rgbir" and run_.windows.rare_class_fraction == 0.5
    assert student(torch.zeros(1, 4, 64, 64)).shape[:2] == (1, 6)
    mean = student.normalise.mean.flatten()
    assert mean[3] == pytest.approx(mean[:3].mean().item())  # infrared: as the others on average
    plain = run(small(data="potsdam", root=root, steps=1, out=tmp_path / "plain"))
    assert load_transformer(plain.config.out / "best.pt").about.bands == "rgb"


def published(path, K=3, variant="tiny"):
    """SegFormer's weights by Hugging Face's names."""
    model = CTCLM(ModelConfig(variant=variant, num_classes=K)).transformer
    safetensors.write(to_published(model.state_dict(), "Hugging Face"), path, {"format": "pt"})
    return model.state_dict()


def test_a_run_starts_from_published_weights(small, tmp_path, capsys):
    path = tmp_path / "mit.safetensors"
    state = published(path)
    run_ = train.prepare(small(pretrained=path))
    found = run_.model.transformer.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert f"starts from {path}" in capsys.readouterr().out
    assert run_.config.saved()["pretrained"] == str(path)


def test_of_a_public_file_the_cnn_gets_a_stem_and_nothing_else(small, tmp_path):
    published(tmp_path / "mit.safetensors")
    with_weights = train.prepare(small(pretrained=tmp_path / "mit.safetensors", out=tmp_path / "a"))
    without = train.prepare(small(out=tmp_path / "b"))
    (stem, *ours), (random, *theirs) = (r.model.cnn.parameters() for r in (with_weights, without))
    assert not torch.equal(stem, random)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_a_resumed_run_goes_on_from_its_own_weights(small, tmp_path):
    path = tmp_path / "mit.safetensors"
    published(path)
    trained = run(small(steps=1, pretrained=path)).model.state_dict()
    path.unlink()
    found = train.prepare(small(steps=1, pretrained=path, resume=True)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())


def test_a_cache_is_shared_and_no_part_of_the_run(small, tmp_path):
    cache = tmp_path / "shared"
    first = run(small(steps=1, cache=cache))
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    second = run(small(steps=1, cache=cache, out=tmp_path / "other"))
    assert files == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert not (first.config.out / "cache").exists()
    assert "cache" not in first.config.saved()
    third = run(small(steps=1, out=tmp_path / "third"))
    for other in (second, third):
        assert torch.equal(first.model.cnn.stem[0].weight, other.model.cnn.stem[0].weight)


def test_a_run_that_only_has_a_cache_may_start(small):
    config = small(steps=1)
    mask = config.root / "val/masks/x.png"
    good = mask.read_bytes()
    Image.new("L", (96, 64), 9).save(mask)
    with pytest.raises(DataError, match="has the value 9"):
        train.prepare(config)
    assert (config.out / "cache").is_dir()
    mask.write_bytes(good)
    train.prepare(config)


def test_no_tile_is_in_both_sets(small, tmp_path, write_isprs):
    root = write_isprs(tmp_path / "potsdam")
    with pytest.raises(DataError, match="2_11_RGB.tif: is in the training and in the validation"):
        train.prepare(small(data="potsdam", root=root, train_tiles=("2_10", "2_11")))


# --- Refusals -----------------------------------------------------------------------------------

BAD_OPTIONS = {
    "--students transformer": "unrecognized arguments: --students",
    "--align decorrelation": "invalid choice: 'decorrelation'",
    "--encoder transformer": "invalid choice: 'transformer'",
    "--transfer both": "invalid choice: 'both'",
    "--learning-rate 1": "unrecognized arguments: --learning-rate",
    "--data moon": "invalid choice: 'moon'",
    "--steps 0": "--steps must be positive; got 0",
    "--batch -1": "--batch must be positive",
    "--accumulate 0": "--accumulate must be positive",
    "--accumulate 9": "--accumulate 9 does not divide the 8 windows of a process; take one of 1, 2",
    "--batch 4 --accumulate 3": "--accumulate 3 does not divide the 4 windows of a process",
    "--crop 100": "--crop must be a multiple of 32; got 100",
    "--batch 1 --crop 32": "--batch 1 needs --crop 64",
    "--lr nan": "--lr must be positive; got nan",
    "--seed -1": "--seed must be at least 0",
    "--data potsdam": "--data potsdam needs --root",
    "--data toy --root .": "it takes no --root",
    "--val-tiles 2_10": "--data toy has no tiles",
    "--train-tiles 2_10": "it takes no --root, no tiles",
    "--data folder --root /nowhere/at/all": "/nowhere/at/all: no such folder",
    "--pretrained none.pth": "none.pth: no such file of weights",
    "--pretrained README.md": "README.md: not a checkpoint",
    "--resume": "there is nothing to resume",
    "--out README.md/run": "README.md/run: must be a folder, but there is a file",
    "--validations 0": "--validations must be positive; got 0",
    "--rare-class-fraction 1.5": "--rare-class-fraction is a share, 0 to 1; got 1.5",
    "--rare-class-fraction often": "invalid float value: 'often'",
    "--max-unknown -1": "--max-unknown is a share, 0 to 1; got -1.0",
    "--bands grey": "invalid choice: 'grey'",
    "--bands irrg": "it takes no --root, no tiles, no bands",
    "--data potsdam --root . --cache README.md": "no top_potsdam",
    "--data vaihingen --root .": "holds no top_mosaic_09cm_areaNUMBER.tif",
    "--data loveda --root .": "holds no Urban/images_png/N.png",
    "--data folder --root .": "classes.json: no such file",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_get_one_sentence_and_exit_2(tmp_path, program, options):
    code, error = program(train.main, ERRORS, "--out", tmp_path / "run", *options.split())
    assert code == 2
    assert BAD_OPTIONS[options] in error and error.count("\n") == 1 and "Traceback" not in error


def test_weights_of_another_variant_are_refused(small, tmp_path, program):
    published(tmp_path / "b0.safetensors", variant="b0")
    options = ("--pretrained", tmp_path / "b0.safetensors", "--out", tmp_path / "run")
    code, error = program(train.main, ERRORS, *options)
    assert code == 2 and "b0.safetensors: is of variant b0; take --variant b0" in error
    assert not (tmp_path / "run").exists()


def test_without_a_gpu_cuda_is_refused_before_anything_is_read(tmp_path, program, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "load_data", None)
    code, error = program(train.main, ERRORS, "--device", "cuda", "--out", tmp_path / "run")
    assert code == 2 and "--device cuda: this machine or this PyTorch has no CUDA GPU" in error
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(small, program):
    config = small()
    config.out.mkdir()
    (config.out / "best.pt").write_text("weeks of work")
    code, error = program(train.main, ERRORS, "--out", config.out)
    assert code == 2 and "is not empty; continue it with --resume" in error
    assert (config.out / "best.pt").read_text() == "weeks of work"


def test_resuming_with_other_options_is_refused(small):
    run(small(steps=1))
    with pytest.raises(cli.UsageError, match="was started with --batch 2, not 3"):
        train.prepare(small(steps=1, batch=3, resume=True))


def test_a_run_of_another_version_is_not_resumed(small):
    """Its last.pt has other options: they were called differently, or did not exist."""
    run_ = run(small(steps=1))
    state = read(run_.config.out / "last.pt", "ctclm-training")
    del state["config"]["transfer"]
    train.checkpoint.save(state, run_.config.out / "last.pt")
    with pytest.raises(cli.UsageError, match="was started by a version without --transfer"):
        train.prepare(small(steps=1, resume=True))


def test_validation_without_labels_is_refused(small, monkeypatch):
    load = train.load

    def unlabelled(*arguments, **options):
        dataset = load(*arguments, **options)
        scenes = [scene._replace(label=None) for scene in dataset.scenes]
        return dataset._replace(scenes=scenes) if arguments[2] == "val" else dataset

    monkeypatch.setattr(train, "load", unlabelled)
    with pytest.raises(DataError, match="no pixel of the val split has a label"):
        train.prepare(small())
