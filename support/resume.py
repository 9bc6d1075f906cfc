"""Going on with a run: what a checkpoint of it holds, and with which options it may go on.

    config = resume.parse(Config, sys.argv[1:])     # --resume: config.json has the other options
    checkpoint.save_newest(resume.state_of(run), config.out)
    resume.put_back(run, checkpoint.read_newest(config.out))

A run that goes on is the same run: what it learns from, and how, cannot change. How far it goes
can, and where and how the same numbers are worked out. `run` is a train.Run.
"""

from itertools import zip_longest
from pathlib import Path

import torch

from support import checkpoint, cli

MAY_CHANGE = ("steps", "validations", "device", "accumulate", "root", "cache", "tensorboard")


def parse(config_class, arguments: list[str], description: str = ""):
    """Command line -> a config; with --resume, config.json in --out has what it does not name."""
    given = cli.given(config_class, arguments, description)
    if given.get("resume"):
        out = given.get("out", config_class.out)
        before = checkpoint.read_options(out)
        before.pop("tensorboard", None)  # asked for anew: it may be missing where the run goes on
        given = cli.from_plain(config_class, before, f"{out}: was started") | given
    return config_class(**given)


def options(config) -> dict:
    """What config.json has of a run's config: not where the run is, nor that it was resumed."""
    return {k: v for k, v in cli.as_plain(config).items() if k not in ("out", "resume")}


def what_is_run(config) -> dict:
    """The options that make a run what it is, as the checkpoints have them."""
    how = ("device", "accumulate", "cache", "tensorboard")
    return {k: v for k, v in options(config).items() if k not in how}


def state_of(run) -> dict:
    """All that a run needs to go on, in tensors and plain types."""
    return {
        "kind": "ctclm-training",
        "config": run.config.saved(),
        "ranks": run.ranks.count,
        "data": data_of(run),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "history": [torch.stack([*losses]) for losses in run.history],
        "log": run.log,
        "best": run.best,
        "seconds": run.seconds,
    }


def data_of(run) -> dict[str, list[str]]:
    """What a run learns from and is scored on, without reading a pixel."""
    data = run.val_set

    def shown(scenes):
        return [f"{s.name} of {s.label.shape[1]} x {s.label.shape[0]} pixels" for s in scenes]

    return {
        "class": [*data.classes.names],
        "bands": [data.bands],
        "stretch": [str(limits) for limits in data.stretch.limits] if data.stretch else [],
        "training scene": shown(run.windows.scenes),
        "validation scene": shown(data.scenes),
    }


def put_back(run, state: dict) -> None:
    """A new run becomes the one whose `state_of` was saved. UsageError if it is another."""
    require_same_run(state, run.config, run.ranks.count)
    require_same_data(state["data"], data_of(run), run.config.out)
    put_back_learned(run, state)
    run.log, run.best = state["log"], state["best"]
    run.history = [losses.to(run.device) for losses in state["history"]]
    run.seconds = state["seconds"]


def put_back_learned(run, state: dict) -> None:
    """The weights, the optimiser and the step, on whatever device the run is now."""
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    for group in run.optimizer.param_groups:
        group["capturable"] = run.device.type == "cuda"  # now, not where it was saved
    run.step = state["step"]


def require_same_run(state: dict, config, ranks: int) -> None:
    """UsageError unless the checkpoint's run can go on with these options and processes.

    With other --steps it can, which stdout says.
    """
    out, before, step = config.out, state["config"], state["step"]
    cli.require_same(config.saved(), before, f"{out}: was started", "resume it", MAY_CHANGE)
    is_ours = {"ranks", "data"} <= state.keys()
    cli.require(is_ours, f"{out}: was started by an older version; resume it with that version")
    cli.require(
        state["ranks"] == ranks,
        f"{out}: was started with {state['ranks']} processes, not {ranks}, and each has windows of "
        f"its own; resume it with as many",
    )
    steps, ended = config.steps, before["steps"] == step
    cli.require(  # where a run was stopped it was not scored
        steps > step or ended and steps == step,
        f"{out}: has done {step} steps, so --steps {steps} is too few; take {step + 1} or more",
    )
    if steps != before["steps"]:
        print(
            f"{out}: goes on from step {step} to {steps} instead of {before['steps']}; from here "
            f"on learning rate and ramp are those of a run of {steps}"
        )


def require_same_data(before: dict, now: dict, out: Path) -> None:
    """UsageError for the first thing in which the `data_of` two runs differ."""
    for what, values in now.items():
        for number, (old, new) in enumerate(zip_longest(before[what], values), 1):
            cli.require(
                old == new,
                f"{out}: was started with {old or 'none'} as {what} {number}, and the data have "
                f"{new or 'none'}; resume it with the same data",
            )
