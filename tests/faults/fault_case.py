"""One case: a command meets a fault, then does what was left. What must hold after each."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults.fork_server import END
from tests.faults.harness import SCENES, Ended, Harness, age, finished_artifacts, hidden, tree
from tests.faults.write_points import Case

REFUSED = 2
"""Exit code of one clear error."""
ALL_THE_WAY = {END, "evaluation_iter_1.json", "checkpoint_iter_1"}
"""Stages whose cases go on to the end of the run; others to the end of the stage."""


def goes_to(harness: Harness, scene: str, stage: str) -> str | None:
    """The stage before which a case with a fault in `stage` ends; None is the end of all."""
    if scene != "run":
        return SCENES[scene].next
    stages = harness.stages()
    return None if stage in ALL_THE_WAY else stages[max(2, stages.index(stage) + 1)]


def meets(harness: Harness, case: Case) -> tuple[Path, Ended, str | None]:
    """The directory in which the fault of `case` has struck, how the command ended, and where its
    stage ends."""
    scene, point = case.point.scene, case.point
    stage = harness.where(scene, case.op, point.site, point.path)
    ends = goes_to(harness, scene, stage)
    start = SCENES[scene].start if scene != "run" else stage
    directory = harness.case(start)
    before = finished_artifacts(directory / "run")
    ended = harness.child(directory, scene, ends, fault=case.fault)
    assert ended.fired, f"the fault did not strike: {ended.said}"
    after = finished_artifacts(directory / "run")
    if scene != "again":
        assert before.items() <= after.items()
    return directory, ended, ends


def goes_on(harness: Harness, directory: Path, scene: str, ends: str | None) -> None:
    """The same command again, unhindered: to the files of the unbroken run, and to nothing beside
    them."""
    age(directory)
    ended = harness.child(directory, scene, ends)
    assert ended.code == SCENES[scene].code, ended.said
    assert tree(directory) == harness.expected(scene, ends)
    finished_artifacts(directory / "run")
    assert not (directory / "run" / "run.lock").exists()
    if ends is None:
        assert not (directory / "run" / ".work").exists()
        assert [*hidden(directory)] == []


def refused_clearly(said: str, directory: Path) -> None:
    """One message, with a file and the way out."""
    assert "Traceback" not in said and said.count("error: ") == 1, said
    message = said[said.index("error: ") :]
    assert str(directory) in message and "--auto_resume" in message, message
    assert re.search(r"\. (Free|Make|Raise|The disk|The file server)", message), message
