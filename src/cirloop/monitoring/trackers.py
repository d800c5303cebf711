"""Losses, recalls and costs sent to TensorBoard, Weights & Biases, MLflow or trackio, through
Accelerate's trackers.

Each tracker has one run for a run directory, whose id is kept in `trackers/runs.json`; steps that
are done again after a kill are sent again. A tracker that cannot start stops the run before its
first stage; one that fails later is left out (`monitoring/events.py`). The packages are imported
only when asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_checked
from cirloop.io.redact import HIDDEN, sanitize, secrets_in
from cirloop.monitoring import events
from cirloop.types import UserError

logger = logging.getLogger(__name__)
DIRECTORY = "trackers"
RUNS = "runs.json"
PROJECT = "cirloop"
INSTALL = "pip install -e '.[trackers]'"


def missing_packages(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield a problem for each tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            yield f"--report_to {name}", f"the package {name} is not installed: {INSTALL}"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a configuration to dotted names, lists as JSON, without secrets."""
    flattened: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flattened |= flatten(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, bool | int | float | str):
            flattened[prefix + name] = sanitize(value) if isinstance(value, str) else value
        else:
            flattened[prefix + name] = json.dumps(value)
    return flattened | {name: HIDDEN for name in secrets_in(settings) if name in flattened}


@contextlib.contextmanager
def tracking(directory: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Iterator[None]:
    """Send the numbers of the run in `directory` to the trackers `names` while the context is open.

    Raises UserError where a tracker cannot start.
    """
    path = directory / DIRECTORY / RUNS
    runs = schema.read(path, "trackers")["runs"] if path.exists() else {}
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(names):
            path.parent.mkdir(exist_ok=True)
            listener = _Listener(name, directory, runs.get(name), settings)
            runs[name] = listener.run
            write_checked(path, "trackers", {"runs": runs})
            stack.enter_context(events.subscribe(listener, f"--report_to {name}"))
        yield


class _Listener:
    """One of Accelerate's trackers, which hears `numbers`."""

    def __init__(
        self, name: str, directory: Path, run: str | None, settings: Mapping[str, Any]
    ) -> None:
        """`run` is the id of the tracker's run that goes on; None = a new one, which gets the
        `settings`."""
        self._name = name
        self._new = run is None
        self.run = run or uuid.uuid4().hex[:16]
        # It would wait long for a server that is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            # Trackio's; the closing tables are all that belongs there.
            with contextlib.redirect_stdout(io.StringIO()):
                self._tracker = _tracker(name, directory, self.run, self._new)
                self._tracker.start()
                if self._new:
                    self._tracker.store_init_configuration(flatten(settings))
        except Exception as error:  # whatever its service or its disk raises
            raise UserError(
                f"--report_to {name} cannot start: {error}\nNothing was trained. Leave it out, or"
                " see that it can be reached and written to, and give --auto_resume."
            ) from error
        if name == "mlflow":  # it names its runs itself
            self.run = self._tracker.tracker.info.run_id
        where = getattr(self._tracker.tracker, "url", None) or f"{PROJECT}/{self.run}"
        logger.info("%s: %s run %s", name, "a new" if self._new else "going on with", where)

    def __call__(self, kind: str, payload: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            if kind == "numbers" and (self._new or not payload["found"]):
                values = {
                    re.sub(
                        r"[^\w\-. :/]", "_", name.replace("@", "_at_")
                    ): value  # what MLflow takes
                    for name, value in payload["values"].items()
                }
                self._tracker.log(values, step=payload["step"])
            elif kind == "head" and payload["head"] is None:
                self._tracker.finish()


def _tracker(name: str, directory: Path, run: str, new: bool) -> Any:
    """Return Accelerate's tracker of that name, not started."""
    import torch
    from accelerate import PartialState, tracking

    launched = "RANK" in os.environ and not torch.cuda.is_available()
    # Trackers ask it which process they are in.
    PartialState(**({"cpu": True, "backend": "gloo"} if launched else {}))
    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", directory / DIRECTORY)
    if name == "mlflow":
        return tracking.MLflowTracker(PROJECT, run_id=None if new else run, run_name=directory.name)
    if name == "trackio":
        return tracking.TrackioTracker(
            PROJECT, name=f"{directory.name}-{run[:8]}", resume="allow", embed=False
        )
    # The terminal is the run's.
    quiet = import_module("wandb").Settings(console="off", silent=True, save_code=False)
    place = {} if "WANDB_DIR" in os.environ else {"dir": directory / DIRECTORY}
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return tracking.WandBTracker(
        project, id=run, name=directory.name, resume="allow", settings=quiet, **place
    )
