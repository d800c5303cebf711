"""Losses, recalls and costs sent to TensorBoard, Weights & Biases, MLflow or trackio, through Accelerate's trackers.

One tracker run a cirloop run: `trackers/state.json` holds, per tracker, its run's id and what was sent, noted before it
is sent, so that a resumed run sends no step twice. Results do not depend on trackers: one that cannot start stops the
run before its first stage, one that fails later is left out with a warning, and gets what it lacks when the run goes on
(`watch.py`). The packages are imported only when asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from cirloop import schemas
from cirloop.artifacts import write_sealed
from cirloop.shown import HIDDEN, safe, secrets_in
from cirloop.types import UserError

logger = logging.getLogger(__name__)
DIRECTORY, STATE = "trackers", "state.json"
PROJECT = "cirloop"
EVERY = 5.0
"""Seconds for which steps are gathered before they are sent."""
INSTALL = "pip install -e '.[trackers]'"
Row = tuple[int, Mapping[str, float]]


def problems(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What keeps a tracker from its work and can be known now: a package that is missing, nobody logged in."""
    for name in names:
        if find_spec(name) is None:
            yield f"--report_to {name}", f"the package {name} is not installed: {INSTALL}"
        elif name == "wandb" and not _logged_in():
            yield "--report_to wandb", "nobody is logged in: `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
        elif name == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ and find_spec("sqlalchemy") is None:
            yield "--report_to mlflow", ("set MLFLOW_TRACKING_URI to a server; to keep runs in a file of this machine "
                                         "it needs `pip install mlflow` beside mlflow-skinny")  # fmt: skip


def _logged_in() -> bool:
    wandb, requests = import_module("wandb"), import_module("requests")
    settings = wandb.setup().settings
    known = settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return bool(settings.mode != "online" or known or requests.utils.get_netrc_auth(settings.base_url))


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by dotted name, lists as JSON, without secrets."""
    found: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for inner, each in value.items():
                walk(each, f"{name}.{inner}".lstrip("."))
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            found[name] = safe(value) if isinstance(value, str) else value if plain else json.dumps(value)

    walk(settings, "")
    return found | {name: HIDDEN for name in secrets_in(settings) if name in found}


class Trackers:
    """The trackers of one run directory, as a context in which they take rows.

    Raises UserError where one cannot start.
    """

    def __init__(self, directory: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._directory, self._settings = directory / DIRECTORY, settings
        self._run = directory.name
        self._wanted, self._active = tuple(dict.fromkeys(names)), dict[str, Any]()
        self._rows: list[Row] = []
        self._sent = time.monotonic()
        self._state: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are at work."""
        return tuple(self._active)

    def __enter__(self) -> Trackers:
        if self._wanted:
            _prepare()
            path = self._directory / STATE
            self._directory.mkdir(exist_ok=True)
            self._state = schemas.read(path, "trackers")["trackers"] if path.exists() else {}
            for name in self._wanted:
                self._start(name)
            self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.flush()
        for name in self.names:
            self._try(name, lambda tracker: tracker.finish())

    def _start(self, name: str) -> None:
        new = name not in self._state
        known = self._state.setdefault(name, {"id": uuid.uuid4().hex[:16], "step": 0, "stages": []})
        try:
            with _quiet():
                tracker = MAKE[name](self._run, known["id"], self._directory, new)
                tracker.start()
                if new:
                    tracker.store_init_configuration(flat(self._settings))
        except _errors(name) as error:
            raise UserError(
                f"--report_to {name} cannot start: {error}\nNothing was trained. Leave it out, or see that it can be "
                "reached and written to, and give --auto_resume."
            ) from None
        if name == "mlflow":  # it names its runs itself
            known["id"] = tracker.tracker.info.run_id
        if name == "wandb":  # else it takes no row of a step it has passed
            tracker.tracker.define_metric("*", step_metric="global_step")
        self._active[name] = tracker
        logger.info("%s: %s run %s", name, "a new" if new else "going on with", _place(name, tracker, known["id"]))

    def log_steps(self, rows: Iterable[Row]) -> None:
        """Rows of training steps; what a tracker has of them already is passed over. Sent every few seconds."""
        if self._active:
            self._rows += rows
            if time.monotonic() - self._sent > EVERY:
                self.flush()

    def log_stage(self, name: str, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a finished stage, once."""
        self.flush()
        lacking = [tracker for tracker in self.names if name not in self._state[tracker]["stages"]]
        for tracker in lacking:
            self._state[tracker]["stages"].append(name)
        if lacking:
            self._write()
        for tracker in lacking:
            self._log(tracker, [(step, numbers)])

    def flush(self) -> None:
        """Send the steps gathered so far."""
        rows, self._rows = self._rows, []
        self._sent = time.monotonic()
        fresh: dict[str, list[Row]] = {name: [] for name in self.names}
        for name, lacking in fresh.items():
            for row in rows:  # some come twice: as they are made, and with their stage's log
                if row[0] > self._state[name]["step"]:
                    self._state[name]["step"] = row[0]
                    lacking.append(row)
        if any(fresh.values()):
            self._write()
        for name, lacking in fresh.items():
            self._log(name, lacking)

    def _log(self, name: str, rows: Sequence[Row]) -> None:
        def send(tracker: Any) -> None:
            for step, numbers in rows:
                values = {_safe_name(each): value for each, value in numbers.items()}
                if name == "wandb":
                    tracker.log(values | {"global_step": step})
                else:
                    tracker.log(values, step=step)

        if rows:
            self._try(name, send)

    def _try(self, name: str, act: Callable[[Any], None]) -> None:
        """Do it; a tracker that fails takes no part any more."""
        try:
            with _quiet():
                act(self._active[name])
        except _errors(name) as error:
            del self._active[name]
            logger.warning("--report_to %s failed, and this attempt goes on without it: %s. No result depends on it.",
                           name, error)  # fmt: skip

    def _write(self) -> None:
        write_sealed(self._directory / STATE, "trackers", {"trackers": self._state})


def _prepare() -> None:
    """Accelerate's trackers ask its state which process they are in; where a server is away, MLflow would wait long."""
    import torch
    from accelerate import PartialState

    launched = "RANK" in os.environ and not torch.cuda.is_available()
    PartialState(**({"cpu": True, "backend": "gloo"} if launched else {}))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def _tensorboard(run: str, number: str, directory: Path, new: bool) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", directory)


def _wandb(run: str, number: str, directory: Path, new: bool) -> Any:
    from accelerate.tracking import WandBTracker
    from wandb import Settings

    place = {} if "WANDB_DIR" in os.environ else {"dir": directory}
    quiet = Settings(console="off", silent=True, save_code=False)  # the terminal is the run's
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandBTracker(project, id=number, name=run, resume="allow", settings=quiet, **place)


def _mlflow(run: str, number: str, directory: Path, new: bool) -> Any:
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(PROJECT, run_id=None if new else number, run_name=run)


def _trackio(run: str, number: str, directory: Path, new: bool) -> Any:
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(PROJECT, name=f"{run}-{number[:8]}", resume="allow", embed=False)


MAKE: dict[str, Callable[[str, str, Path, bool], Any]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio,
}  # fmt: skip


def _errors(name: str) -> tuple[type[BaseException], ...]:
    """What a tracker raises where its service or its disk fails. Requests' and the hub's errors are OSErrors."""
    own = {"wandb": ("wandb.errors", "Error"), "mlflow": ("mlflow.exceptions", "MlflowException"),
           "trackio": ("httpx", "HTTPError")}  # fmt: skip
    more = [getattr(import_module(own[name][0]), own[name][1])] if name in own else []
    return (OSError, RuntimeError, ValueError, *more)


def _safe_name(name: str) -> str:
    """What MLflow takes as a name; the same for all: `recall@1` is recall_at_1."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def _place(name: str, tracker: Any, number: str) -> str:
    """Where to look at it."""
    if name == "tensorboard":
        return f"in {tracker.logging_dir}"
    if name == "wandb" and not tracker.tracker.offline:
        return str(tracker.tracker.url)
    return f"{PROJECT}/{tracker.tracker.name if name == 'trackio' else number}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """trackio prints to standard output, which is for the closing tables."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
