"""The architecture, kept by reading the sources: who may import whom, and the house's limits."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "cirloop"
FILES = sorted(SOURCE.rglob("*.py"))

BASE = {"types", "io", "validation", "artifacts", "monitoring", "config.base"}
ROOMS = {"data", "backbones", "retrieval", "negatives", "captioning", "training", "evaluation"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "types": set(),
    "reproducibility": set(),
    "io": {"types"},
    "config.base": set(),
    "validation": {"types", "io"},
    "artifacts": {"types", "io"},
    "monitoring": {"types", "io", "artifacts"},
    "data": BASE,
    "backbones": BASE,
    "retrieval": BASE | {"backbones"},
    "captioning": BASE | {"backbones", "data"},
    "training": BASE | {"backbones", "data"},
    "negatives": BASE | {"retrieval"},
    "evaluation": BASE | {"retrieval"},
    "config": BASE | ROOMS,
    "distributed": BASE | ROOMS | {"config", "reproducibility"},
    "stages": BASE | ROOMS | {"config", "distributed"},
    "loop": BASE | {"config", "stages"},
    "report": BASE | {"config", "data", "loop"},
    "cli": BASE | ROOMS | {"reproducibility", "config", "distributed", "stages", "loop", "report"},
    "tools": BASE | ROOMS | {"config", "distributed", "stages", "loop", "report", "cli"},
    "commands": {"io", "cli", "tools"},
    "api": BASE
    | ROOMS
    | {"reproducibility", "config", "distributed", "stages", "loop", "report", "cli", "tools"},
}
"""Room or top module of cirloop -> what it may import, besides itself. A new one is entered here
first."""
PARTS = {"config.base": "config.base", "config.runtime": "config.base"} | dict.fromkeys(
    ("__main__", "search", "demo", "export", "export_vectors"), "commands"
)
"""Modules that are a part of their own: what every settings class needs, and the commands `python
-m cirloop` and `python -m cirloop.NAME`."""


@dataclass(frozen=True)
class Arrow:
    """One import: `importer` of `imported` (full dotted names) on `line`; `lazy` where a function
    does it."""

    importer: str
    imported: str
    line: int
    lazy: bool

    @property
    def ends(self) -> tuple[str, str]:
        return part_of(self.importer), part_of(self.imported)


def part_of(module: str) -> str:
    """The room or top module of a dotted name: `cirloop.data.shapes.load` -> `data`."""
    names = module.split(".")[1:]
    for length in (2, 1):
        part = ".".join(names[:length])
        if part in PARTS:
            return PARTS[part]
    return names[0] if names else "__init__"


def module_name(path: Path, source: Path = SOURCE) -> str:
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def import_nodes(
    node: ast.AST, lazy: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements below `node` that run, and whether only when a function is called."""
    if isinstance(node, ast.If) and is_type_checking(node.test):
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        lazy = True
    for child in children:
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        else:
            yield from import_nodes(child, lazy)


def names_of(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    """Dotted names a statement imports; `from a import b` gives `a.b`, relative ones are
    resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parts = module.split(".")
    keep = len(parts) - node.level + is_package
    base = ".".join(parts[:keep] if node.level else []) + (
        "." if node.level and node.module else ""
    )
    return [f"{base}{node.module or ''}.{alias.name}".lstrip(".") for alias in node.names]


def arrows(source: Path = SOURCE) -> list[Arrow]:
    """Every import of a cirloop module by another, over all files of `source`."""
    found = []
    for path in sorted(source.rglob("*.py")):
        module = module_name(path, source)
        for node, lazy in import_nodes(ast.parse(path.read_text("utf-8"))):
            for name in names_of(node, module, path.stem == "__init__"):
                if name.startswith("cirloop."):
                    found.append(Arrow(module, name, node.lineno, lazy))
    return found


def wrong(found: list[Arrow]) -> list[str]:
    """The arrows the table does not allow, as `file:line` sentences."""
    out = []
    for arrow in found:
        importer, imported = arrow.ends
        if importer == imported:
            continue
        if imported not in ALLOWED.get(importer, set()):
            out.append(
                f"{arrow.importer}, line {arrow.line}: {importer} may not import {arrow.imported}"
            )
    return out


def test_imports_point_the_way_the_architecture_says() -> None:
    assert wrong(arrows()) == []


def test_every_module_is_in_the_table_and_the_table_names_no_other() -> None:
    there = {part_of(module_name(path)) for path in FILES}
    assert there == ALLOWED.keys()


def test_the_table_has_no_circle() -> None:
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError


def test_config_takes_only_settings_from_the_rooms() -> None:
    settings_modules = {f"cirloop.{room}.config" for room in ROOMS}
    settings_modules |= {
        "cirloop.captioning.foundation",
        "cirloop.data",
        "cirloop.negatives",
        "cirloop.negatives.attributes.config",
    }
    taken = [a for a in arrows() if a.importer == "cirloop.config.run" and a.ends[1] in ROOMS]
    assert taken, "the walker sees none of config's imports"
    assert [
        a for a in taken if a.lazy or a.imported.rpartition(".")[0] not in settings_modules
    ] == []


def test_types_needs_the_standard_library_only() -> None:
    tree = ast.parse((SOURCE / "types.py").read_text("utf-8"))
    imported = {
        name.split(".")[0]
        for node, _ in import_nodes(tree)
        for name in names_of(node, "cirloop.types", False)
    }
    assert imported <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("negatives/top_k.py", "from cirloop.training.batches import BatchSampler"),
        ("negatives/top_k.py", "import cirloop.config.run"),
        ("data/images.py", "from cirloop import backbones"),
        ("data/shapes/scene.py", "from ...evaluation import metrics"),
        ("data/shapes/__init__.py", "from ... import stages"),
        ("training/batches.py", "def late():\n    from cirloop.retrieval.topk import ranks"),
        (
            "backbones/base.py",
            "class A:\n    async def late(self):\n        import cirloop.captioning",
        ),
        ("monitoring/console.py", "try:\n    import cirloop.data\nexcept ImportError:\n    pass"),
        ("loop.py", "from cirloop.tools.search import engine"),
        ("negatives/miner.py", "from cirloop.config.run import RunConfig"),
        ("types.py", "if not TYPE_CHECKING:\n    import cirloop.artifacts.store"),
        ("newcomer.py", "from cirloop.types import Query"),
    ],
)
def test_walker_catches_a_planted_wrong_import(tmp_path: Path, file: str, line: str) -> None:
    planted = tmp_path / "cirloop" / file
    planted.parent.mkdir(parents=True)
    planted.write_text(f"from __future__ import annotations\n{line}\n", "utf-8")
    assert len(wrong(arrows(tmp_path / "cirloop"))) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("negatives/top_k.py", "from cirloop.types import Query"),
        ("negatives/top_k.py", "from .report import summary"),
        ("types.py", "if TYPE_CHECKING:\n    import cirloop.artifacts.store"),
        ("negatives/miner.py", "from cirloop.config.base import Settings"),
        ("search.py", "from cirloop.tools.search.command import main"),
        ("loop.py", "from cirloop import stages"),
        ("loop.py", "import json, numpy.random"),
    ],
)
def test_walker_lets_a_right_import_pass(tmp_path: Path, file: str, line: str) -> None:
    planted = tmp_path / "cirloop" / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line + "\n", "utf-8")
    assert wrong(arrows(tmp_path / "cirloop")) == []


def test_there_is_no_utils_module() -> None:
    odd = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert [p for p in SOURCE.rglob("*") if p.stem.strip("_").lower() in odd] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_file_stays_under_300_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < 300


def test_the_loop_stays_on_one_page() -> None:
    assert len((SOURCE / "loop.py").read_text("utf-8").splitlines()) <= 90


def broad_handlers(tree: ast.AST) -> list[int]:
    """Lines of `except:`, `except Exception` and `except BaseException`, alone or in a tuple."""

    def is_broad(kind: ast.expr | None) -> bool:
        return kind is None or ast.unparse(kind).split(".")[-1] in ("Exception", "BaseException")

    lines = []
    for node in ast.walk(tree):
        kinds: list[ast.expr | None] = []
        if isinstance(node, ast.ExceptHandler):
            kinds = [*node.type.elts] if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            kinds = [*node.args]
        if any(map(is_broad, kinds)):
            lines.append(node.lineno)
    return lines


PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unpicklers(tree: ast.AST) -> list[int]:
    """Lines that import a pickler, call torch.load or torch.save, or allow pickle to numpy."""
    lines = [
        node.lineno
        for node, _ in import_nodes(tree)
        if {n.split(".")[0] for n in names_of(node, "cirloop.any", False)} & PICKLERS
        or {"torch.load", "torch.save"} & set(names_of(node, "cirloop.any", False))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            lines.append(node.lineno)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            lines.append(node.value.lineno)
    return lines


def test_nothing_catches_every_exception() -> None:
    found = {module_name(p): broad_handlers(ast.parse(p.read_text("utf-8"))) for p in FILES}
    several = {module for module, lines in found.items() if lines}
    assert several <= {
        "cirloop.monitoring.events",
        "cirloop.monitoring.trackers",
    }  # a listener that fails is dropped and never ends a run
    assert all(len(found[module]) == 1 for module in several)


def test_nothing_is_pickled() -> None:
    found = {module_name(p): unpicklers(ast.parse(p.read_text("utf-8"))) for p in FILES}
    assert {module: lines for module, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "except:",
        "except Exception:",
        "except (OSError, Exception) as e:",
        "except builtins.BaseException:",
    ],
)
def test_a_planted_broad_handler_is_seen(text: str) -> None:
    assert broad_handlers(ast.parse(f"try:\n    pass\n{text}\n    pass")) == [3]
    assert (
        broad_handlers(ast.parse("try:\n    pass\nexcept (OSError, ValueError):\n    pass")) == []
    )
    assert broad_handlers(ast.parse("with contextlib.suppress(Exception):\n    pass")) == [1]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch import load",
        "torch.load(p)",
        "np.load(p, allow_pickle=True)",
        "import dill as d",
    ],
)
def test_a_planted_pickler_is_seen(text: str) -> None:
    assert unpicklers(ast.parse(text)) == [1]
    assert unpicklers(ast.parse("import json\nload_file(p)\nnp.load(p)")) == []
