"""The pages of docs/commands/, written from the code: flags from settings models, texts from
docstrings and comments.

    python scripts/command_pages.py             write them
    python scripts/command_pages.py --check     name those that are not what the code says, exit 1

A new command is one line of COMMANDS.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, CliSettingsSource
from pydantic_settings.sources.types import _CliPositionalArg

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]
from cirloop.__main__ import COMMANDS as COMMANDS_OF_CIRLOOP  # noqa: E402 - after the path

PAGES = ROOT / "docs" / "commands"
MARK = "<!-- Written by scripts/command_pages.py from the code. Change the code, then run it. -->"
PYTHON = ".venv/bin/python"


@dataclass(frozen=True, slots=True)
class Command:
    """A page: `models` are its settings as module:class, each with what it is for where there are
    several."""

    page: str
    program: str
    models: dict[str, str]
    more: str
    """The page of docs/ that says how it is used."""
    examples: tuple[str, ...] = ()
    """By default the indented lines of its docstring."""


@dataclass(frozen=True, slots=True)
class Flag:
    names: tuple[str, ...]
    kind: str
    default: str
    meaning: str
    types: tuple[str, ...] = ()
    """Of a group with types: those that have it; () = all."""


@dataclass(frozen=True, slots=True)
class Group:
    """Flags that begin alike; `types`: the values of its `type`, each with the first line of its
    docstring."""

    path: str
    about: str
    flags: tuple[Flag, ...]
    types: dict[str, str]


VECTORS = "From vectors alone, with --query-embeddings"
COMMANDS = (
    Command(
        "train_iterative",
        "train_iterative.py",
        {"": "cirloop.config.run:RunConfig"},
        "tutorial",
        (
            "./run_iterative_training.sh --fast_mode",
            "./run_iterative_training.sh --dry_run",
            "./run_iterative_training.sh --fast_mode --seed 1 --experiment_dir experiments/fast_1",
        ),
    ),
    Command(
        "eval_iterative",
        "eval_iterative.py",
        {"": "cirloop.cli.evaluate:EvalConfig"},
        "datasets",
        (
            (
                f"{PYTHON} eval_iterative.py --experiment_dir experiments/fast_1 --eval_dataset"
                " shapes_test \\\n    --iterations base,1,2 --output_file results.json"
            ),
            (
                f"{PYTHON} eval_iterative.py --rankings FILE.json --eval_dataset cirr_val"
                " --data_dir data/cirr"
            ),
        ),
    ),
    Command(
        "add_hard_negatives",
        "add_hard_negatives.py",
        {
            "For samples of images and texts": (
                "cirloop.tools.add_negatives.config:AddNegativesConfig"
            ),
            VECTORS: "cirloop.cli.mine_embeddings:EmbeddingMiningConfig",
        },
        "add_hard_negatives",
        (
            (
                f"{PYTHON} add_hard_negatives.py --image-dir photos --annotations samples.json"
                " --split train \\\n    --model-path Qwen/Qwen2-VL-2B-Instruct --dtype bfloat16"
                " --num-gpus 2 --output negatives.json"
            ),
            (
                f"{PYTHON} add_hard_negatives.py --query-embeddings Q.npy --gallery-embeddings"
                " G.npy --targets T.npy \\\n    --strategy margin --relative-margin 0.05 --output"
                " negatives.json"
            ),
        ),
    ),
    Command(
        "plan",
        "cirloop plan",
        {"": "cirloop.cli.plan:PlanConfig"},
        "costs",
        (
            (
                "cirloop plan --config cirr_qwen2_vl --data_dir data/cirr --device H100"
                " --num_devices 8"
            ),
            "cirloop plan --config shop.yaml --measure --rates rates.json",
        ),
    ),
    Command(
        "compare",
        "cirloop compare",
        {"": "cirloop.tools.compare.config:CompareConfig"},
        "comparing",
        (
            (
                "cirloop compare experiments/plain experiments/loop --html comparison.html"
                " \\\n    --output_file comparison.json"
            ),
            "cirloop compare 'slow=experiments/rate_2e-5_*' 'usual=experiments/rate_2e-4_*'",
        ),
    ),
    Command(
        "import",
        "cirloop import",
        {"": "cirloop.tools.import_table.config:ImportConfig"},
        "own-data",
        ("cirloop import triplets.csv --images photos --val 0.2 --output shop",),
    ),
    Command(
        "init",
        "cirloop init",
        {"": "cirloop.tools.init_config:InitConfig"},
        "own-data",
        ("cirloop init --data_dir shop --gpu_memory 24 --output shop.yaml",),
    ),
    Command("doctor", "cirloop doctor", {}, "install", ("cirloop doctor",)),
    Command(
        "export_vectors",
        "python -m cirloop.export_vectors",
        {"": "cirloop.tools.export_embeddings:ExportConfig"},
        "scaling",
    ),
    Command(
        "search",
        "python -m cirloop.search",
        {"": "cirloop.tools.search.command:SearchConfig"},
        "search",
    ),
    Command(
        "demo", "python -m cirloop.demo", {"": "cirloop.tools.demo.command:DemoConfig"}, "search"
    ),
    Command(
        "export",
        "python -m cirloop.export",
        {"": "cirloop.tools.export.config:ExportConfig"},
        "export",
    ),
)
AFTER = {
    "train_iterative": (
        "`run_iterative_training.sh` hands all flags on. Without `--config` the settings are those"
        " of the recipe `configs/{dataset_name}_{model_backbone}.yaml`, without a data set of"
        " `configs/shapes.yaml`. Every flag but those of the first table may stand in the YAML too,"
        " nested at its dots. Flags win over the file."
    ),
    VECTORS: (
        "The settings of the `--strategy`, and of `mining` beside it, are flags too, without"
        " `--mining.strategy.` and `--mining.`: see the groups `mining` and `mining.strategy` of"
        " [train_iterative.py](train_iterative.md#mining)."
    ),
}


def module_file(name: str) -> Path:
    """The file of a program: a script of the root, what `python -m` runs, or of `cirloop NAME`."""
    if name.startswith("cirloop "):
        module_name, _ = COMMANDS_OF_CIRLOOP[name.removeprefix("cirloop ")]
        path = ROOT / "src" / Path(*module_name.split("."))
        return path.with_suffix(".py")
    if not name.startswith("python -m "):
        return ROOT / name
    module = name.removeprefix("python -m cirloop.")
    tools = ROOT / "src" / "cirloop" / "tools"
    package = tools / module / "command.py"
    return package if package.exists() else tools / "export_embeddings.py"


def docstring(path: Path) -> list[str]:
    """The paragraphs of a file's docstring, or of the comment that it begins with."""
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    else:
        lines = path.read_text("utf-8").splitlines()
        lines = [line for line in lines if not line.startswith(("#!", "# shellcheck", "#SBATCH"))]
        end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])
    return text.split("\n\n")


def summary(path: Path) -> str:
    """What a file says of itself first: a docstring's paragraph, or the sentence that a comment
    begins with."""
    first = docstring(path)[0]
    if path.suffix != ".py":
        return first.splitlines()[0].partition(". ")[0].rstrip(".") + "."
    return re.sub(r" (All f|F)lags: .*--help$", "", " ".join(first.split()))


def kinds_of(annotation: Any) -> list[type[BaseModel]]:
    """The settings models a field may hold, not those in lists."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [kind for each in get_args(annotation) for kind in kinds_of(each)]
    return (
        [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    )


def type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (tuple, list):
        inner = type_name(args[0])
        return "JSON list" if inner == "JSON" else f"list of {inner}"
    if origin is dict or kinds_of(annotation):
        return "JSON"
    if args:  # a union
        return " or ".join(dict.fromkeys(type_name(a) for a in args if a is not NoneType))
    return {"Path": "path", "str": "text", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


def bounds(field: FieldInfo) -> str:
    """Numbers that a value may have; of a list, those of its members are not said."""
    found: list[Any] = list(field.metadata)
    if get_origin(field.annotation) in (Union, UnionType):
        found += [m for arg in get_args(field.annotation) for m in getattr(arg, "__metadata__", ())]
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    return "".join(
        f" {sign} {getattr(m, name)}"
        for m in found
        for of, (sign, name) in signs.items()
        if type(m) is of
    )


def default_of(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "needed"
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(f"`{each}`" for each in value)
    return f"`{value}`"


def _several(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def flag(model: type[BaseSettings], path: str, field: FieldInfo, types: tuple[str, ...]) -> Flag:
    told = model.model_config
    short = (told.get("cli_shortcuts") or {}).get(path, ())
    alias_of_field = field.validation_alias  # takes the place of the name
    aliases = (
        alias_of_field.choices
        if isinstance(alias_of_field, AliasChoices)
        else [alias_of_field or path.rpartition(".")[2]]
    )
    paths = [f"{path.rpartition('.')[0]}.{alias}".lstrip(".") for alias in aliases]
    if any(kind is _CliPositionalArg for kind in field.metadata):
        about = " ".join((field.description or "").split())
        return Flag((path.upper(),), type_name(field.annotation), default_of(field), about, types)
    names = [f"-{name}" if len(name) == 1 else f"--{name}" for name in (*paths, *_several(short))]
    if told.get("cli_kebab_case"):
        names = [name.replace("_", "-") for name in names]
    kind = type_name(field.annotation) + bounds(field)
    if kind == "true or false" and told.get("cli_implicit_flags"):
        names, kind = [*names, *(f"--no-{name[2:]}" for name in names)], "switch"
    return Flag(
        tuple(names), kind, default_of(field), " ".join((field.description or "").split()), types
    )


def parsed(model: type[BaseSettings]) -> set[str]:
    """The flags that the command's own parser takes."""
    from cirloop.config import cli

    parser = cli.Parser("cirloop")
    CliSettingsSource(model, root_parser=parser)
    return {name for action in parser._actions for name in action.option_strings}


def groups(
    model: type[BaseSettings],
    kinds: list[type[BaseModel]],
    path: str = "",
    about: str = "",
    types: tuple[str, ...] = (),
) -> Iterator[Group]:
    """The flags of settings that are one of `kinds`, and then the groups among them."""
    tags = {
        kind: str(kind.model_fields["type"].default)
        for kind in kinds
        if "type" in kind.model_fields
    }
    flags: dict[tuple[str, str, str, str], tuple[Flag, list[str]]] = {}
    nested: dict[str, tuple[FieldInfo, list[str]]] = {}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            where, tag = f"{path}.{name}".lstrip("."), tags.get(kind, "")
            if kinds_of(field.annotation):
                nested.setdefault(where, (field, []))[1].append(tag)
            elif name != "type" or not path:
                made = flag(model, where, field, ())
                flags.setdefault((where, made.kind, made.default, made.meaning), (made, []))[
                    1
                ].append(tag)
    if path and len(tags) > 1:
        short = (model.model_config.get("cli_shortcuts") or {}).get(f"{path}.type", ())
        names = (f"--{path}.type", *(f"--{n}" for n in _several(short)))
        yield Group(
            path,
            about,
            (Flag(names, "see above", "", "Which of them."), *_merged(flags, len(kinds))),
            {tags[kind]: _first_line(kind) for kind in kinds},
        )
    elif flags:
        yield Group(path, about, _merged(flags, len(kinds)), {})
    for where, (field, of) in nested.items():
        for_types = (
            f" For {', '.join(f'`{tag}`' for tag in of)}." if tags and len(of) < len(kinds) else ""
        )
        yield from groups(
            model, kinds_of(field.annotation), where, (field.description or "") + for_types
        )


def _merged(flags: dict[Any, tuple[Flag, list[str]]], num: int) -> tuple[Flag, ...]:
    """A row for each meaning of a flag, those of one flag together."""
    order = list(dict.fromkeys(made.names for made, _ in flags.values()))
    return tuple(
        Flag(made.names, made.kind, made.default, made.meaning, tuple(of) if len(of) < num else ())
        for made, of in sorted(flags.values(), key=lambda row: order.index(row[0].names))
    )


def _first_line(kind: type[BaseModel]) -> str:
    text = (kind.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


def cell(text: str) -> str:
    return text.replace("|", "\\|") or " "


def table(group: Group, known: set[str]) -> list[str]:
    """Rows of a group; `known` are the names that may be flags, others are for YAML. What is given
    without a flag is in capitals."""
    of = bool(group.types)
    head = ["flag", "type", "default", "meaning", *(["of"] if of else [])]
    out = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for each in group.flags:
        there = [name for name in each.names if name in known or name.isupper()]
        names = ", ".join(f"`{name}`" for name in there) or f"`{each.names[0][2:]}` (YAML only)"
        types = [", ".join(f"`{t}`" for t in each.types) or "all"] if of else []
        out.append(
            "| "
            + " | ".join(cell(c) for c in (names, each.kind, each.default, each.meaning, *types))
            + " |"
        )
    return out


def page(command: Command) -> str:
    file = module_file(command.program)
    _, *rest = docstring(file)
    examples = command.examples or tuple(
        f"{PYTHON} {line.strip().removeprefix('python ')}"
        for block in rest
        for line in block.splitlines()
        if line.startswith("    ") and "python" in line
    )
    more = f"How it is used: [{command.more}.md](../{command.more}.md)."
    out = [f"# {command.program}", "", MARK, "", summary(file), "", more, ""]
    out += ["```sh", *examples, "```", ""]
    out += [AFTER[command.page], ""] if command.page in AFTER else []
    for title, name in command.models.items():
        module, _, kind = name.partition(":")
        model = getattr(importlib.import_module(module), kind)
        flags = parsed(model)
        out += [f"## {title or 'Flags'}", ""]
        out += [AFTER[title], ""] if title in AFTER else []
        for group in groups(model, [model]):
            if group.path:
                out += [
                    f"### {group.path}",
                    "",
                    *([group.about.strip(), ""] if group.about.strip() else []),
                ]
            out += [
                *(f"- `{tag}`: {first}" for tag, first in group.types.items()),
                *([""] if group.types else []),
            ]
            out += [*table(group, flags), ""]
    return "\n".join(out)


def listed(title: str, about: str, directory: str, patterns: tuple[str, ...]) -> str:
    """A page of files with the first paragraph that each says of itself."""
    files = sorted(path for pattern in patterns for path in (ROOT / directory).glob(pattern))
    rows = [
        f"| [{path.name}](../../{path.relative_to(ROOT)}) | {cell(summary(path))} |"
        for path in files
    ]
    return "\n".join(
        [f"# {title}", "", MARK, "", about, "", "| file | |", "| --- | --- |", *rows, ""]
    )


def pages() -> dict[str, str]:
    """The text of each page, by its name."""
    out = {f"{command.page}.md": page(command) for command in COMMANDS}
    out["benchmarks.md"] = listed(
        "Benchmarks",
        "Each is run by `python benchmarks/NAME.py` and has `--help`. What was measured with them"
        " is in [performance.md](../performance.md), [scaling.md](../scaling.md) and [the"
        " log](../../experiments/LOG.md).",
        "benchmarks",
        ("*.py",),
    )
    out["scripts.md"] = listed(
        "Scripts",
        "What the other commands are started with, and what keeps the project. `make` names its"
        " targets.",
        ".",
        ("*.sh", "scripts/*.sh", "scripts/*.py", "scripts/*.sbatch"),
    )
    rows = [
        f"| [{c.program}]({c.page}.md) | {cell(summary(module_file(c.program)))} |"
        for c in COMMANDS
    ]
    rows += ["| [benchmarks](benchmarks.md) | Measuring, a program each. |"]
    rows += ["| [scripts](scripts.md) | Set-up, checks, Slurm. |"]
    out["README.md"] = "\n".join(["# Commands", "", MARK, "", "| | |", "| --- | --- |", *rows, ""])
    return out


def main() -> int:
    made = pages()
    there = {path.name for path in PAGES.glob("*.md")}
    if "--check" in sys.argv[1:]:
        stale = [
            name
            for name, text in made.items()
            if name not in there or (PAGES / name).read_text("utf-8") != text
        ]
        for name in sorted({*stale, *(there - {*made})}):
            print(
                f"docs/commands/{name}: not what the code says; run python scripts/command_pages.py"
            )
        return int(bool(stale or there - {*made}))
    PAGES.mkdir(parents=True, exist_ok=True)
    for name in there - {*made}:
        (PAGES / name).unlink()
    for name, text in made.items():
        (PAGES / name).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
