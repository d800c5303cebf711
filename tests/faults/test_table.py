"""The table of write points is whole: what commands write is in it, and what is in it is
written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.faults.harness import SCENES, Harness
from tests.faults.write_points import POINTS, kills, refusals
from tests.faults.write_recorder import WRITERS

SOURCE = Path(__file__).parents[2] / "src" / "cirloop"
CALLS = {
    "write_text",
    "write_bytes",
    "write_json",
    "save_tensors",
    "save_file",
    "save_pretrained",
    "mkdir",
    "makedirs",
    "unlink",
    "rmdir",
    "rmtree",
    "touch",
    "utime",
    "symlink_to",
    "link",
    "TemporaryFile",
    "export_chrome_trace",
}
ELSEWHERE = {
    # files of a stage's processes; test_processes.py and tests/distributed kill those
    "distributed.jobs": ("write",),
    "distributed.launcher": ("_wait", "_run_command"),
    "distributed.process": ("_fail", "_open_worker_log"),
    "distributed.worker": ("_step_writer", "_serve_training"),
    "distributed.sharded_worker": ("_caption", "_embed"),
    "distributed.sharded_executor": ("ShardedExecutor._clear", "ShardedExecutor._run"),
    "monitoring.profiling": ("collect_workers", "_save_trace"),  # _save_trace: traces, by request
    "monitoring.trackers": ("tracking",),  # by request; tests/monitoring/test_trackers.py
    "stages.train": ("train.build",),  # of a warm-up of no steps
    "stages.judge": ("measure_judge.build",),  # where verdicts are asked for
    "loop": ("iterate",),  # of a run that a round ended which cannot help
    # the cache held to a size, and a nameless file
    "backbones.tensor_cache": ("TensorCache._make_room", "_open_shard"),
    "retrieval.vectors": ("zeros_or_memmap",),
    # outputs of commands that do their work anew
    "stages.rates": ("extend",),
    "tools.add_negatives.encode": ("_save", "encode_shard"),
    "tools.add_negatives.pipeline": ("add_negatives",),
    # an export is made aside and renamed, and what one that was killed left is removed:
    # tests/export/test_refused.py
    "tools.export.export": ("write_export", "_rename", "export"),
    "tools.export.formats": ("write_files", "write_adapter", "write_modules"),
    "tools.export.prompt_spec": ("PromptSpec.save",),
    # a directory is made aside and renamed, a YAML beside its goal: tests/tools/test_import.py
    "tools.import_table.write": ("write", "_copy"),
    "tools.init_config": ("main",),
    "tools.export_embeddings": ("_export_split", "export", "write"),
    # two files beside their goals, made anew: tests/tools/test_compare.py
    "tools.compare.command": ("main",),
    "tools.compare.page": ("write_page",),
    "cli.mine_embeddings": ("main",),
    "cli.score_rankings": ("score_rankings",),
}
"""Functions that write what the scenes do not, by module, and why."""


@pytest.mark.parametrize("scene", SCENES)
def test_every_write_is_in_the_table(scene: str, harness: Harness) -> None:
    listed = {(point.site, point.path, op) for point in POINTS for op in point.ops.split()}
    seen = {(site, path, op) for _, op, site, path in harness.recorded(scene).events}
    assert seen - listed == set()


def test_every_line_of_the_table_is_written(harness: Harness) -> None:
    listed = {
        (point.scene, point.site, point.path, op) for point in POINTS for op in point.ops.split()
    }
    seen = {
        (scene, site, path, op)
        for scene in SCENES
        for _, op, site, path in harness.recorded(scene).events
    }
    assert listed - seen == set()


def test_every_point_is_killed_and_refused() -> None:
    assert {case.point for case in kills()} == {case.point for case in refusals()} == {*POINTS}
    names = [str(case) for case in (*kills(), *refusals())]
    assert len(names) == len({*names}) >= 150


def writes(node: ast.Call) -> bool:
    """Whether a call writes, by its name: to what cannot be seen here."""
    name = ast.unparse(node.func).rpartition(".")[2]
    if name in ("replace", "rename"):  # of a path, not of a string or a dataclass
        return isinstance(node.func, ast.Attribute) and len(node.args) == 1 and not node.keywords
    if name == "remove":  # not of a list
        return isinstance(node.func, ast.Name) or ast.unparse(node.func) == "os.remove"
    if name == "open":
        modes = [
            a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        return any(set(mode) & set("wax+") and len(mode) < 4 for mode in modes)
    return name in CALLS or ast.unparse(node.func) == "np.save"


def writers(tree: ast.AST, module: str) -> set[str]:
    """The functions of a module that write, as sites."""
    found = set()

    def walk(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = isinstance(child, ast.FunctionDef | ast.ClassDef)
            if isinstance(child, ast.Call) and writes(child):
                found.add(f"{module}:{'.'.join(names)}")
            walk(child, (*names, child.name) if inner else names)  # type: ignore[attr-defined]

    walk(tree, ())
    return found


def test_every_function_that_writes_has_a_line_or_a_reason() -> None:
    """Also what the scenes above do not run."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        found |= writers(ast.parse(path.read_text("utf-8")), module)
    known = (
        {point.site for point in POINTS}
        | WRITERS
        | {f"{m}:{n}" for m, names in ELSEWHERE.items() for n in names}
    )
    assert found - known == set()
    assert {f"{m}:{n}" for m, names in ELSEWHERE.items() for n in names} - found == set()


@pytest.mark.parametrize(
    "line", ["path.write_text(t)", "a.replace(b)", "p.open('wb')", "shutil.rmtree(p)", "p.touch()"]
)
def test_a_planted_write_is_seen(line: str) -> None:
    assert writers(ast.parse(f"class A:\n    def f(self):\n        {line}"), "m") == {"m:A.f"}
    harmless = "'a'.replace('b', 'c'), replace(x, y=1), p.open(), p.read_text(), names.remove(n)"
    assert writers(ast.parse(f"def f():\n    {harmless}"), "m") == set()
