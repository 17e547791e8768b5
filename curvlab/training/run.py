"""`train`: any model, any algorithm; `prepare_training`, `run_named`: by the names of the tables.

The command line runs the latter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.figure import Figure
from rich.console import Console

from curvlab import datasets
from curvlab.closure import Closure
from curvlab.derivatives import derivatives
from curvlab.errors import CurvlabError, CurvlabWarning, Diverged, fitting, lookup, real, tell
from curvlab.likelihoods.base import mean_per, scaled
from curvlab.logs.log import Log
from curvlab.objective import Objective
from curvlab.optim import Batch
from curvlab.probes import asked
from curvlab.problem import Problem
from curvlab.show import figures
from curvlab.signatures import shows
from curvlab.system import paths, random_state
from curvlab.system.escape import for_rich
from curvlab.system.progress import progress_bar
from curvlab.training import checkpoint, contents
from curvlab.training.begun import stepless
from curvlab.training.evaluation import (
    Data,
    Evaluated,
    Measure,
    chunks,
    depends_on_mode,
    evaluating,
    further_of,
    in_eval_mode,
    measure_of,
    ready_to_train,
)
from curvlab.training.folder import RunFolder, claimed_by_first
from curvlab.training.loop import Training
from curvlab.training.settings import PARTS, Budget, Settings, check_same

_IN_EVAL_MODE = (
    "the whole model is in eval mode and is trained so: dropout drops nothing, and batch norm keeps"
    " its statistics; call model.train() first if that is not meant"
)

LEAST = 256
"""Examples at a time in evaluation: those of a minibatch, or so many where that is more."""


@dataclass(frozen=True)
class TrainRun:
    """A training run that has ended.

    `stopped` says why, where the numbers left the finite range; else it is empty.
    """

    log: Log
    folder: Path | None
    stopped: str = ""

    @property
    def dataset(self) -> xr.Dataset:
        """All records of the log, with its attributes.

        Raises:
            CurvlabError: there is none.
        """
        return self.log.dataset()

    @property
    def path(self) -> Path | None:
        """The log's file, where the run was given a folder."""
        return self.log.path

    def figure(self, name: str = "training") -> Figure:
        """Draw figure `name`.

        Raises:
            CurvlabError: the figure is unknown, or the log lacks its data.
        """
        return figures.draw(self.dataset, name)


@dataclass(frozen=True, kw_only=True)
class Around:
    """The things that a training run has beside its settings and its end.

    Args:
        warm: minibatches of the warm start. None takes the first epoch of the minibatches where
            they are a data set's, and no warm start otherwise; ``()`` is none.
        error: the error of an example; None takes the likelihood's (`evaluation.measure_of`).
        checkpoint_seconds: between checkpoints within an epoch; there is one after every epoch.
        probes: of `PROBES`, each as "name" or "name:every", every so many steps, from the first on;
            or as they were `asked`.
    """

    warm: Iterable[Batch] | None = None
    error: Measure | None = None
    checkpoint_seconds: float = 60.0
    probes: str | Sequence[str] | Mapping[str, int | None] = ()


def _sorted(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return (options of `Settings`, options of `Around`, the others: the algorithm's own)."""
    parts: tuple[dict[str, Any], ...] = ({}, {}, {})
    names = [{*Settings.names()} - {"own"}, {field.name for field in fields(Around)}]
    for name, value in options.items():
        parts[next((i for i, known in enumerate(names) if name in known), 2)][name] = value
    if parts[0].get("schedule_options", 0) is None:
        del parts[0]["schedule_options"]
    return parts  # type: ignore[return-value]  # three


@shows(*PARTS, Budget, Around)
def train(
    objective: Objective,
    batches: Iterable[Batch],
    validation: Data | None = None,
    *,
    algorithm: str = "adam",
    lr: float | None = None,
    damping: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> TrainRun:
    """Train your model along one algorithm, and log loss, error, times and norms by epoch.

    Args:
        objective: your model and likelihood; its parameters are moved. While it steps every module
            is in the mode that you set (`model.train()`; `eval()` for a frozen norm), while it is
            evaluated all are in eval mode.
        batches: minibatches (x, y) that can be gone through again: a data set's (`Dataset.batches`,
            shuffled anew in every epoch), a list, a DataLoader. One pass is an epoch.
        validation: a data set, a pair (x, y) or minibatches of it.
        algorithm: of `ALGORITHMS`.
        lr: the learning rate; its document's where None.
        damping: the document's own parameter; its document's value where None.
        epochs: the run ends with whichever of epochs, steps and `seconds` comes first; where all
            are None, after the epochs of `batches`, or one.
        steps: likewise.
        folder: gets run.h5 and checkpoint.pt, of rank 0 where there are several; None keeps the log
            in memory, without checkpoints.
        resume: go on from the folder's checkpoint, bit for bit; with the same arguments, but for a
            longer run.
        progress: show a progress bar; None shows one where standard error is a terminal.
        options: the other fields of `Settings` (momentum, schedule, update_every, …) and of
            `Around` (warm, error, probes, …), `seconds` of training after which the run ends, and
            options of the algorithm's own. `help` shows them all.

    Raises:
        CurvlabError: unknown names, values out of range, data that do not fit, a checkpoint of
            other settings. A loss that is not finite is no error: the run ends with a warning,
            `stopped` says why, and the last good weights are put back.
    """
    chosen, beside, own = _sorted(options)
    settings = Settings.of(algorithm=algorithm, lr=lr, damping=damping, own=own, **chosen)
    seconds = own.pop("seconds", None)
    around = Around(**beside)
    around = replace(around, probes=asked(around.probes, "train"))  # type: ignore[arg-type]  # not asked yet
    fitting("resume", resume, bool)
    if epochs is None and steps is None and seconds is None:
        epochs = batches.epochs if isinstance(batches, datasets.Batches) else 1
    place = (
        None
        if folder is None
        else paths.check_folder(folder, ("run.h5", checkpoint.FILE), remedy="choose another")
    )
    model, data = type(objective.model).__name__, type(batches).__name__
    about: dict[str, Any] = {"model": model}
    if isinstance(batches, datasets.Batches):
        data = f"{batches.data.name}, batches of {batches.size}, seed {batches.seed}"
        about |= {"batch_size": batches.size, "data_description": batches.data.description}
    call = {
        "function": "curvlab.train",
        "batches": data,
        "folder": folder and str(folder),
        "resume": resume,
    }
    about |= {"data": data, "call": call}
    shapes = {name: list(p.shape) for name, p in objective.parameters.items()}
    must_match = {"model": model, "data": data, "parameters": shapes, "seed": objective.seed}
    if scaled(objective.likelihood):
        must_match |= {"loss per": mean_per(objective.likelihood)}
    still = in_eval_mode(objective.model)
    must_match |= {"modules in eval mode": still} if still else {}
    if still == ["all"] and any(map(depends_on_mode, objective.model.modules())):
        warnings.warn(_IN_EVAL_MODE, CurvlabWarning, stacklevel=2)
    console = Console(stderr=True)
    with derivatives():
        budget = Budget(epochs, steps, seconds)
        training = _training(
            objective, batches, validation, settings, budget, around, about, must_match, place
        )
        if resume and place is None:
            raise CurvlabError("resume needs a folder")
        with claimed_by_first(objective.ranks, place, resume):
            if resume and place is not None and not stepless(place):
                training.load_state_dict(
                    checkpoint.load_state(place / checkpoint.FILE, objective.device)
                )
            run = _run(training, console, console.is_terminal if progress is None else progress)
    if run.stopped:
        warnings.warn(run.stopped, CurvlabWarning, stacklevel=2)
    return run


def _training(
    objective: Objective,
    batches: Iterable[Batch],
    validation: Data | None,
    settings: Settings,
    budget: Budget,
    around: Around,
    about: Mapping[str, Any],
    must_match: Mapping[str, Any],
    folder: Path | None,
) -> Training:
    """Build a run and fill in what is left open; nothing is written."""
    if isinstance(batches, Iterator):
        raise CurvlabError(
            "the minibatches can be gone through only once: give a list, a DataLoader or"
            " Dataset.batches(…)"
        )
    real(
        "the seconds between checkpoints",
        around.checkpoint_seconds,
        "above 0, and finite",
        lambda v: v > 0,
    )
    examples: Data = batches.data if isinstance(batches, datasets.Batches) else batches
    warm, error, probes = around.warm, around.error, around.probes
    assert isinstance(probes, Mapping)
    if warm is None:
        warm = batches.one_pass() if isinstance(batches, datasets.Batches) else ()
    if validation is not None and isinstance(validation, datasets.Dataset) and not len(validation):
        validation = None
    with random_state.kept(objective.device):
        first = next(chunks(examples, 2), None)
    if first is None:
        raise CurvlabError("there are no minibatches to train on")
    with evaluating(objective.model), random_state.kept(objective.device):
        # what does not fit is found before anything is written
        closure = Closure(objective, *objective.batch(first), 0, factor=1.0)
        z, _ = closure.outputs()
    likelihood, y = objective.likelihood, closure.y
    error = measure_of(likelihood, z[0].numel(), y) if error is None else error
    size = max(LEAST, batches.size if isinstance(batches, datasets.Batches) else len(closure.x))
    return Training(
        objective,
        batches,
        settings,
        budget,
        evaluated=Evaluated(examples, validation, error, size, further_of(likelihood, y)),
        warm=warm,
        about=about,
        must_match=must_match,
        place=RunFolder(folder if objective.ranks.first else None, around.checkpoint_seconds),
        probes=probes,
    )


def _run(
    training: Training,
    console: Console,
    shown: bool,
    say: Callable[[str], None] = lambda line: None,
) -> TrainRun:
    with progress_bar(console, shown) as bar:
        try:
            training.run(bar, say)
        except KeyboardInterrupt as signal:
            if training.stopped:  # in the same step, or since
                raise signal from Diverged(training.stopped)
            raise
    return TrainRun(training.log, training.place.folder, training.stopped)


@dataclass(frozen=True, kw_only=True)
class NamedTraining:
    """A training run on a problem of the tables: what the command line runs."""

    settings: Settings
    budget: Budget
    problem: Problem
    batch_size: int = 1000
    augment: bool = True
    warm: bool = True
    checkpoint_seconds: float = 60.0
    probes: Mapping[str, int | None] = field(default_factory=dict)
    verbose: bool = False

    def must_match(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the run, beside the settings."""
        problem = self.problem
        found: dict[str, Any] = {
            "model": problem.model,
            "batch_size": self.batch_size,
            "augment": self.augment,
            "warm": self.warm,
            "seed": problem.seed,
            "dtype": problem.dtype,
            "data": problem.data_name,
            "device": str(problem.place),
        }
        return found | ({"l2": problem.l2} if problem.l2 else {})


def resumed_arguments(state: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a run that goes on: its checkpoint's, or those `given` instead.

    Raises:
        CurvlabError: a checkpoint that does not hold what a run by name keeps.
    """
    contents.check(state)
    contents.check_named(state["settings"], (NamedTraining, Problem, *PARTS))
    kept = {k: v for k, v in state["settings"].items() if k != "parameters"} | dict(state["budget"])
    kept["checkpoint_seconds"] = state.get("checkpoint_seconds", NamedTraining.checkpoint_seconds)
    return kept | dict(given)


def prepare_training(
    named: NamedTraining, call: Mapping[str, Any], state: dict[str, Any] | None = None
) -> Training:
    """Check, build and load a run, and set it to the state of a checkpoint.

    Nothing is written, and nothing will be before `Training.into`.

    Args:
        named: the run, by names.
        call: the log's attribute of what was typed.
        state: of the checkpoint from which it goes on; None: it begins.

    Raises:
        CurvlabError: unknown names, values out of range, data that do not fit, a checkpoint of
            other settings.
    """
    problem = named.problem
    _ = problem.entry  # first: a module of the user's may enter algorithms and probes
    named.settings.check()
    named.budget.check()
    lookup(datasets.DATASETS, problem.data_name, "data set")
    if state is not None:  # before the probes are asked whether they fit another algorithm
        mine = named.settings.plain() | named.must_match()
        check_same({name: state["settings"].get(name) for name in mine}, mine)
    problem.check()
    train_part, test_part = problem.parts
    batches = train_part.batches(named.batch_size, seed=problem.seed, augment=named.augment)
    objective = problem.objective(network=ready_to_train(problem.network()))
    objective.ranks.check_size(named.batch_size)
    objective.tell = tell if named.verbose else None
    seen = train_part if named.augment or not train_part.augment else test_part
    about = problem.about(call, seen) | {"batch_size": named.batch_size}
    around = Around(
        warm=batches.one_pass() if named.warm else (),
        checkpoint_seconds=named.checkpoint_seconds,
        probes=named.probes,
    )
    training = _training(
        objective,
        batches,
        test_part,
        named.settings,
        named.budget,
        around,
        about,
        named.must_match(),
        None,
    )
    if state is not None:
        training.load_state_dict(state)
    return training


def run_named(training: Training, console: Console) -> TrainRun:
    """Run what was prepared, the global generators seeded for it (dropout).

    A line an epoch goes to the console.
    """

    def say(line: str) -> None:
        console.print(for_rich(line))

    objective = training.objective
    with random_state.kept(objective.device):
        random_state.seed(objective.seed)
        return _run(training, console, console.is_terminal, say)
