"""Shadow: an optimizer of somebody else's, as the curvature of a model that it does not move.

Its own clones take the model's weights and the minibatch's gradient at every step, it steps on the
clones, and old − new over its learning rate is the direction. Its state goes on from step to step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature.base import CurvatureDefaults, check_algorithm
from curvlab.errors import CurvlabError, raise_if_out_of_memory, some_of
from curvlab.foreign_kinds import decoupled, one_line
from curvlab.foreign_state import AttributeState, load_plain_state, plain_state
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass, Transition
from curvlab.soundness import check_gradients
from curvlab.system import random_state


@dataclass(frozen=True)
class Shadowed:
    """One optimizer of a shadow, and the parameters that it takes.

    Args:
        make: parameters → the optimizer, with its options.
        names: of the parameters.
        lr: the learning rate that it is made with.
    """

    make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    names: tuple[str, ...]
    lr: float


class Shadow(CurvatureDefaults):
    """The curvature that an optimizer of somebody else's follows: a direction, and no matrix.

    The direction is (old − new) / lr of its clones. Weight decay that is decoupled,
    W ← W (1 − lr γ) − …, is no part of it (`decoupled`); decay that enters by the gradient is.

    Args:
        objective: whose parameters are cloned; they are not moved.
        optimizers: with the parameters that each takes; learning rates of later ones keep their
            ratio to that of the first.
        name: of the algorithm.
    """

    gradient_pass: Pass = "plain"

    def __init__(self, objective: Objective, optimizers: Sequence[Shadowed], name: str) -> None:
        self.objective, self.name, self.damping = objective, name, 0.0
        self.parts = tuple(optimizers)
        self.rate: float | None = None
        parameters = objective.parameters
        self.clones = {
            key: nn.Parameter(parameters[key].detach().clone())
            for part in self.parts
            for key in part.names
        }
        self.optimizers = [
            part.make([self.clones[key] for key in part.names]) for part in self.parts
        ]
        self._own_rates = [[float(g["lr"]) for g in o.param_groups] for o in self.optimizers]
        # last written: an optimizer may move its own from there, as beside a scheduler that rests
        self._rates = copy.deepcopy(self._own_rates)
        self._drawn: random_state.Chance | None = None
        self._moved = False

    # ---- what a curvature does

    @property
    def ready(self) -> bool:
        """Whether there is something to precondition with: always."""
        return True

    @property
    def inverse(self) -> Mapping[str, Any]:
        """Return {}: an optimizer shows no operator."""
        return {}

    @property
    def needs(self) -> frozenset[Pass]:
        """The pass "plain" alone."""
        return frozenset({self.gradient_pass})

    def update(self, observation: Observation) -> None:
        """Look whether the gradient is finite, so that no state takes it up; learn nothing."""
        check_gradients(self.objective, observation)

    @property
    def warm_needs(self) -> frozenset[Pass]:
        """Nothing: an optimizer has no warm start."""
        return frozenset()

    def absorb(self, observation: Observation) -> None:
        """Do nothing."""

    def refresh(self) -> None:
        """Do nothing."""

    @property
    def wants_step(self) -> bool:
        """False: it learns from its gradients alone."""
        return False

    @property
    def step_needs(self) -> frozenset[Pass]:
        """Nothing."""
        return frozenset()

    @property
    def rejects(self) -> bool:
        """False."""
        return False

    def learn(self, transition: Transition) -> bool:
        """Let every step stand."""
        return True

    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Step on the clones, and return (old − new) / lr under the keys of `grads`.

        A call is a step of the optimizer's, and its state goes on.

        Raises:
            CurvlabError: the optimizer fails on these parameters, with its own line.
        """
        given = self._by_parameter(grads)
        with torch.no_grad():
            for name, p in self.objective.parameters.items():
                clone = self.clones.get(name)
                if clone is not None:
                    clone.copy_(p)
                    # a copy: coupled decay and clipping write over it, and others read it too
                    clone.grad = given[name].to(clone.dtype, copy=True) if p.requires_grad else None
        first = self.parts[0].lr
        rate = first if self.rate is None else self.rate
        for optimizer, own, rates in zip(
            self.optimizers, self._own_rates, self._rates, strict=True
        ):
            for number, (group, lr) in enumerate(zip(optimizer.param_groups, own, strict=True)):
                wanted = rate if lr == first else lr * (rate / first)
                if wanted != rates[number]:
                    group["lr"] = rates[number] = wanted
            try:
                with self._chance():
                    optimizer.step()
            except Exception as error:
                raise_if_out_of_memory(error)
                raise CurvlabError(f"{self.name} fails in its step: {one_line(error)}") from error
        self._moved = True
        found = {name: self._direction(name, rate, kept) for name, kept in self._kept().items()}
        every = {
            b.name: b.gather(self._filled(b.params, found)) for b in self.objective.blocks
        } | found
        return {name: every[name].to(grads[name].dtype).view_as(grads[name]) for name in grads}

    def arrived(self) -> Mapping[str, Tensor] | None:
        """Return the clones, where the optimizer itself has gone; None before its first step."""
        return {n: c.detach() for n, c in self.clones.items()} if self._moved else None

    def decays(self) -> dict[str, float]:
        """Return {parameter: γ of decay that is apart}, to be taken times this one's rate."""
        first = self.parts[0].lr
        return {name: decay * own / first for name, _, own, decay in self._rates_and_decays()}

    # ---- its parts

    @contextmanager
    def _chance(self) -> Iterator[None]:
        """Let an optimizer that draws do so as a loop's own does; apart, from numbers of its own.

        Those go on from step to step, and the global generators stay as they are.
        """
        if not self.apart:
            yield
            return
        device = self.objective.device
        with random_state.kept(device):
            if self._drawn is None:
                random_state.seed(self.objective.seed)
            else:
                random_state.set_states(self._drawn, device)
            yield
            self._drawn = random_state.states(device)

    def _by_parameter(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for block in self.objective.blocks:
            if block.name in grads:
                found |= block.scatter(grads[block.name])
        return found | {name: g for name, g in grads.items() if name in self.clones}

    def _filled(self, names: Sequence[str], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = self.objective.parameters
        return {n: found[n] if n in found else torch.zeros_like(parameters[n]) for n in names}

    def _kept(self) -> dict[str, float]:
        """Return {parameter: what decay apart from the step has left of it}."""
        return {name: 1.0 - lr * decay for name, lr, _, decay in self._rates_and_decays()}

    def _rates_and_decays(self) -> Iterator[tuple[str, float, float, float]]:
        """Yield (parameter, its rate now, the rate it is made with, γ of decay that is apart)."""
        names = {id(clone): name for name, clone in self.clones.items()}
        for optimizer, rates in zip(self.optimizers, self._own_rates, strict=True):
            for group, own in zip(optimizer.param_groups, rates, strict=True):
                decay = decoupled(optimizer, group)
                for p in group["params"]:
                    yield names[id(p)], float(group["lr"]), own, decay

    def _direction(self, name: str, rate: float, kept: float) -> Tensor:
        old, new = self.objective.parameters[name].detach(), self.clones[name].detach()
        if new.shape != old.shape:
            raise CurvlabError(
                f"{self.name} turns {name} of shape {list(old.shape)} into one of"
                f" {list(new.shape)} in its step"
            )
        if not rate:
            return torch.zeros_like(old)
        wide = torch.promote_types(old.dtype, torch.float32)
        return (old.to(wide) * kept - new.to(wide)) / rate

    # ---- its state

    def state_dict(self) -> dict[str, Any]:
        """Return the name and the optimizers' own states."""
        return {
            "algorithm": self.name,
            "optimizers": [plain_state(o) for o in self.optimizers],
            "attributes": self._attributes(),
            "rates": copy.deepcopy(self._rates),
            "drawn": None if self._drawn is None else self._drawn.state_dict(),
        }

    def _attributes(self) -> list[dict[str, Any]]:
        """Return what the optimizers keep beside their states; say what no checkpoint holds."""
        every = [AttributeState(optimizer) for optimizer in self.optimizers]
        found = [one.state_dict() for one in every]
        lost = [place for one in every for place in one.lost]
        if lost:
            self.objective.say(
                f"{self.name} keeps {some_of(lost, 4)} beside its state, which is no plain data and"
                " in no checkpoint: a run that goes on from one may take other steps"
            )
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state.

        Raises:
            CurvlabError: it is of another algorithm or other parameters; nothing is taken.
        """
        check_algorithm(state, self.name)
        saved, held = state["optimizers"], [plain_state(o) for o in self.optimizers]
        before = self._attributes()
        for one, own in zip(saved, held, strict=False):
            here = [len(g["params"]) for g in own.get("param_groups", [])]
            there = [len(g["params"]) for g in one.get("param_groups", [])]
            if here != there or len(saved) != len(held):
                raise CurvlabError(
                    f"the checkpoint's {self.name} has groups of {there} parameters but this one of"
                    f" {here}: build the same model first"
                )
        try:
            self._load(saved, state.get("attributes", before))
        except Exception as error:
            self._load(held, before)
            line = one_line(error)
            raise CurvlabError(f"the checkpoint's {self.name} does not fit: {line}") from error
        # earlier versions wrote theirs at every step
        written = [[float(g["lr"]) for g in o.param_groups] for o in self.optimizers]
        self._rates = copy.deepcopy(state.get("rates", written))
        drawn = state.get("drawn")
        self._drawn = None if drawn is None else random_state.Chance.of(drawn)

    def _load(self, states: Sequence[Any], attributes: Sequence[dict[str, Any]]) -> None:
        for optimizer, one, own in zip(self.optimizers, states, attributes, strict=True):
            load_plain_state(optimizer, one)
            AttributeState(optimizer).load_state_dict(own)
