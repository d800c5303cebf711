"""Iterations of a run by name: a number, `base`, `last`, or `best` by the run's evaluations. Loads
no torch."""

from __future__ import annotations

import logging

from cirloop.artifacts.store import Store
from cirloop.evaluation.best import BASE as BASE
from cirloop.evaluation.best import Best, best_of
from cirloop.types import UserError

logger = logging.getLogger(__name__)
BEST = "best"
LAST = "last"


def done_iterations(store: Store) -> list[int]:
    """Return the iterations whose training is finished, in order."""
    return sorted(
        int(name.removeprefix("checkpoint_iter_"))
        for name in store.names
        if name.startswith("checkpoint_iter_")
    )


def evaluation_name(label: str) -> str:
    """Return the name of the artifact that evaluates `base` or an iteration."""
    return f"evaluation_{label if label == BASE else f'iter_{label}'}.json"


def find_best(store: Store) -> Best | None:
    """Return the best iteration of a run by now; None where none is evaluated."""
    labels = [BASE, *map(str, done_iterations(store))]
    names = [name for name in map(evaluation_name, labels) if name in store.names]
    return best_of([store.load(name).read() for name in names])


def best_iteration(store: Store, flag: str = "--iteration") -> Best:
    """Return the best iteration of a run by now. Raises UserError where none is evaluated."""
    best = find_best(store)
    if best is None:
        done = done_iterations(store)
        name = f"{LAST}, which is {done[-1]}" if done else BASE
        raise UserError(
            f"no iteration is evaluated yet, so none is the best. Give {flag} {name}; or go on with"
            " the run by --auto_resume, which evaluates it."
        )
    return best


def select_iterations(names: str | None, store: Store, flag: str = "--iterations") -> list[str]:
    """Return the labels (`base` or a number) of iterations by name, separated by commas; None = the
    base and all there are. Says which is the best where that is asked for.

    Raises UserError for unknown ones, and for `best` where nothing is evaluated.
    """
    done = [str(iteration) for iteration in done_iterations(store)]
    available = [BASE, *done]
    if names is None:
        return available
    labels = [name.strip() for name in names.split(",")]
    names_here = [*available, BEST, *([LAST] if done else [])]
    unknown = [label or "(empty)" for label in labels if label not in names_here]
    if unknown:
        raise UserError(
            f"{flag} {names}: no {', '.join(unknown)} here. There are: {', '.join(available)};"
            f" {BEST} and {LAST} are names of one of them."
        )
    if BEST in labels:
        best = best_iteration(store, flag)
        logger.info("%s: %s", store.directory, best.describe())
        labels = [str(best.iteration) if label == BEST else label for label in labels]
    labels = [done[-1] if label == LAST else label for label in labels]
    return list(dict.fromkeys(labels))


def select_iteration(name: str, store: Store, flag: str = "--iteration") -> str:
    """Return the label of one iteration by name, as `select_iterations` does."""
    label, *more = select_iterations(name, store, flag)
    if more:
        raise UserError(f"{flag} {name}: give one.")
    return label
