"""Every algorithm, exact matrix and probe, and `watch`, on a device that is not there (`pretend`).

No tensor of another device mixes in, the numbers are the host's, and what waits is what `waits`
lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from pretended_runs import FAULTS, Found, Prepared
from waits import COUNTED, EXACT, LAYERS, PLACES, PLAIN, PROBE, SAMPLES, STEPS, WATCH, page

from curvlab.algorithms import ALGORITHMS
from curvlab.exact import KINDS
from curvlab.probes import PROBES

HEAVY = {
    "hf",
    "ssn",
    "s4qn",
    "reduction",
    "spectrum",
    "alignment",
    "pi",
    "fisher",
    "fisher-mc",
    "ef",
}
"""What takes more than a second, and is like what is run by default."""


def some(names: Iterable[str]) -> list[ParameterSet]:
    """All names, of which the heavy ones are slow."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in HEAVY else []) for n in names]


@pytest.fixture(scope="module")
def there() -> Iterator[Prepared]:
    prepared = Prepared()
    yield prepared
    prepared.close()


def assert_listed(
    found: Found, listed: Mapping[str, Set[str]], later: Set[str] = frozenset()
) -> None:
    """What was seen to wait is the table's, place by place, for the reasons that it says.

    Args:
        found: what was seen.
        listed: the table's.
        later: places that may wait at the start too.
    """
    for phase, seen in found.items():
        places = {place for place, _ in seen}
        known = listed.get(phase, frozenset())
        allowed = known | (later if phase == "start" else frozenset())
        assert not places - allowed, (
            f"{phase}: waits, and is not listed: {sorted(places - allowed)}"
        )
        assert not known - places, (
            f"{phase}: is listed, and does not wait: {sorted(known - places)}"
        )
        for place, why in seen:
            assert why in PLACES[place][0], (place, why)


@pytest.mark.parametrize("name", some(ALGORITHMS))
def test_a_step_waits_where_the_table_says(there: Prepared, name: str) -> None:
    found = there("steps", name)
    assert dict(found.pop("closure")) == {"closure:Closure._moved": "copy to the device"}
    listed = STEPS[name]
    assert_listed(found, listed, listed["step"] | listed.get("refresh", frozenset()))


def assert_no_more(found: Found, name: str) -> None:
    """A step waits where the tables say, on other layers than linear ones, or at fewer places."""
    more = LAYERS.get(name, {})
    for phase in found.keys() & STEPS[name].keys() - {"start"}:
        listed = STEPS[name][phase] | more.get("step", frozenset()) | more.get(phase, frozenset())
        seen = {place for place, _ in found[phase]} - listed
        assert not seen, f"{phase}: waits, and is not listed: {sorted(seen)}"


@pytest.mark.parametrize("name", ["block-ggn", "kflr", "tnt-ideal"])
def test_vectors_of_exact_labels_are_counted_where_places_share_a_weight(
    there: Prepared, name: str
) -> None:
    found = there("steps", name, "tokens")
    assert_no_more(found, name)
    assert {place for place, _ in found["step"]} & COUNTED


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tokens", "conv-norm", "conv-1d", "embedding"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_step_waits_for_nothing_on_other_layers(
    there: Prepared, name: str, model: str
) -> None:
    assert_no_more(there("steps", name, model), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - set(PLAIN)))
def test_a_step_waits_where_the_table_says_on_tokens(there: Prepared, name: str) -> None:
    assert_no_more(there("steps", name, "tokens"), name)


def test_plain_steps_of_the_table_wait_for_nothing() -> None:
    assert {name: STEPS[name]["step"] for name in PLAIN if STEPS[name]["step"]} == {}
    assert STEPS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("kind", some([*KINDS, "ef-token"]))
def test_exact_matrices_wait_where_the_table_says(there: Prepared, kind: str) -> None:
    assert_listed(there("exact", kind), EXACT[kind])


def test_quantities_of_examples_wait_where_the_table_says(there: Prepared) -> None:
    assert_listed(there("samples"), SAMPLES)


@pytest.mark.parametrize("name", some(PROBES))
def test_a_probe_waits_where_the_table_says(there: Prepared, name: str) -> None:
    assert_listed(there("probe", name), PROBE[name])


def test_a_watched_loop_waits_at_samples_alone(there: Prepared) -> None:
    assert WATCH["step"] == frozenset()
    assert_listed(there("watch"), WATCH)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(there: Prepared, fault: str) -> None:
    """What waits in a step is a place that is not listed; a tensor of the host ends the step."""
    if FAULTS[fault][1]:
        with pytest.raises(AssertionError, match=FAULTS[fault][1]):
            there("steps", "sgd-m", "tanh", fault)
    else:
        found = there("steps", "sgd-m", "tanh", fault)
        with pytest.raises(AssertionError, match=r"step: waits, and is not listed: \['momentum:"):
            assert_listed({"step": found["step"]}, STEPS["sgd-m"])


def test_the_page_has_the_tables() -> None:
    text = (Path(__file__).parents[1] / "docs" / "devices.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- waits -->\n(.*)<!-- end of waits -->", text, re.DOTALL)
    assert found is not None
    assert found[1].strip() == page().strip()


def test_every_place_of_the_table_is_there() -> None:
    """A place that was renamed shows itself at once, whoever waits there."""
    package = Path(__file__).parents[1] / "curvlab"
    for place in PLACES:
        module, function = place.split(":")
        text = (package / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert re.search(rf"def {function.rpartition('.')[2]}\b", text), place
