"""Parsers with bounds for what people and other programs wrote: text, JSON, YAML.

A parser returns the content or raises a UserError that says what is wrong, without the path: the
caller knows what the file is for. Parsers never block on FIFOs, bound YAML alias expansion, and
reject duplicate keys.
"""

from __future__ import annotations

import json
import stat
import sys
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cirloop.types import UserError

MAX_BYTES = 1 << 31
"""Of a file of annotations; parsed it takes several times as much memory."""
LFS = "a pointer of Git LFS. Fetch the file itself by: git lfs pull"
FILE_SIGNATURES = {
    b"\xff\xfe": "UTF-16. Save it as UTF-8",
    b"\xfe\xff": "UTF-16. Save it as UTF-8",
    b"PK\x03\x04": "a zip archive or an Excel workbook. Save its content as text in UTF-8",
    b"\x1f\x8b": "a gzip archive. Unpack it",
    b"PAR1": "a Parquet table. Read it by --dataset_name huggingface",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"version https://git-lfs": LFS,
}
"""How files begin that are often taken for text."""
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
MAX_SNIFFED = 1 << 14
"""Characters that tell what a text is."""
Loader = type[yaml.SafeLoader] | type[yaml.BaseLoader]
MAX_YAML_BYTES = 1 << 18
MAX_YAML_VALUES = 100_000
"""Values of a YAML file with its anchors unfolded."""


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 file, without a byte order mark. Raises UserError where that is impossible."""
    return _decode(read_bytes(path, max_bytes))


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file. Raises UserError where that is impossible."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError("is a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise UserError("is a pipe or a device, not a file")
        if status.st_size > max_bytes:
            raise UserError(f"has {status.st_size:,} bytes, more than {max_bytes:,}")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError("there is no such file") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot be read ({error})") from None  # a NUL in the path


def _decode(content: bytes) -> str:
    """Decode UTF-8, remove the byte order mark, and turn line ends into line feeds.

    Raises UserError with the format that the content has instead.
    """
    for start, kind in FILE_SIGNATURES.items():
        if content.startswith(start):
            raise UserError(f"is {kind}" if kind is LFS else f"is not UTF-8 text but {kind}")
    if b"\0" in content[:4] and len(content) > 3:
        raise UserError("is not UTF-8 text but UTF-16 or binary data. Save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        word = content[max(0, error.start - 12) : error.start + 12].decode("latin-1")
        raise UserError(
            "is not UTF-8 text; it may be Latin-1 or Windows-1252, in which this part reads"
            f" {word!r}. Save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def detect_format(content: str) -> str:
    """Return the format of a text that should be JSON lines, as far as the text shows it; else an
    empty string."""
    head = content.lstrip()[:MAX_SNIFFED]
    if head.startswith("["):
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError):
            return ""
        all_objects = (
            isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)
        )
        return f"one JSON list of {len(rows):,} objects" if all_objects else ""
    if head.startswith("{"):
        try:
            _, end = json.JSONDecoder().raw_decode(content.lstrip())
        except (ValueError, RecursionError):
            return ""
        return "JSON objects that go over several lines" if "\n" in content.lstrip()[:end] else ""
    first, _, rest = head.partition("\n")
    for sign, name in SEPARATORS.items():
        columns = [column.strip().strip('"') for column in first.split(sign)]
        if len(columns) > 1 and all(columns) and sign in rest and not first.startswith("<"):
            return f"a table of columns {', '.join(map(repr, columns))} separated by {name} (CSV)"
    return ""


def parse_json(content: str, doubled: Callable[[str], None] | None = None) -> Any:
    """Parse a JSON value.

    Each duplicate key is passed to `doubled`; without `doubled` it raises UserError.
    """

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            for key in sorted(
                key for key, count in Counter(key for key, _ in pairs).items() if count > 1
            ):
                (doubled or _duplicate_key)(key)
        return mapping

    try:
        value = json.loads(
            content, object_pairs_hook=reject_duplicates, parse_constant=_not_a_number
        )
        if "\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError("is not JSON (nested too deeply)") from None
    except UnicodeEncodeError:
        raise UserError("is not JSON (half of a surrogate pair, which is no character)") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in content else ""
        raise UserError(f"is not JSON ({error.msg}: {line}column {error.colno})") from None
    except UserError:
        raise
    except ValueError:
        raise UserError(
            f"holds a whole number of more than {sys.get_int_max_str_digits():,} digits"
        ) from None
    return value


def parse_yaml(content: str, loader: Loader = yaml.SafeLoader) -> Any:
    """Parse a YAML value of plain types; with `yaml.BaseLoader` of texts, so that yes is "yes"."""
    try:
        node = yaml.compose(content, loader)
        if node is not None:
            _count_nodes(node, {}, set())
        reader = loader(content)
        try:
            return reader.get_single_data()
        finally:
            reader.dispose()
    except RecursionError:
        raise UserError("is not YAML: nested too deeply") from None
    except UserError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
    ) as error:
        # PyYAML's constructors fail in their own ways at values such as 2024-99-99 and `!!timestamp
        # x`
        raise UserError(f"is not YAML: {str(error) or type(error).__name__}") from None


def expand_user(path: str) -> Path:
    """Return the path with `~` expanded. Raises UserError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"path {path!r}: there is no user of that name, so `~` stands for no directory."
        ) from None


def read_yaml(path: Path, loader: Loader = yaml.SafeLoader) -> Any:
    return parse_yaml(read_text(path, MAX_YAML_BYTES), loader)


def _duplicate_key(key: str) -> NoReturn:
    raise UserError(f"the key {key!r} is there more than once")


def _not_a_number(name: str) -> NoReturn:
    raise UserError(f"is not JSON ({name} is no JSON number)")


def _count_nodes(node: yaml.Node, counts: dict[int, int], within: set[int]) -> int:
    """Count the values that a node stands for, with its aliases expanded.

    Raises UserError for too many values and for duplicate keys.
    """
    if id(node) in within:
        raise UserError("is not YAML: an anchor holds itself")
    if id(node) in counts:
        return counts[id(node)]
    within.add(id(node))
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key in sorted(key for key, count in keys.items() if count > 1):
            _duplicate_key(key)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    num_values = 1 + sum(_count_nodes(part, counts, within) for part in parts)
    if num_values > MAX_YAML_VALUES:
        raise UserError(f"stands for more than {MAX_YAML_VALUES:,} values, its anchors unfolded")
    within.discard(id(node))
    counts[id(node)] = num_values
    return num_values


def packaged_names(package: str) -> list[str]:
    """List the names of the .yaml files that a package holds."""
    entries = (entry.name for entry in files(package).iterdir())
    return sorted(name.removesuffix(".yaml") for name in entries if name.endswith(".yaml"))


def read_packaged(package: str, name: str, kind: str) -> tuple[Path, Any]:
    """Read the .yaml file `name` of a package, or the user's of that path.

    Returns the path and the content. Raises UserError that calls the file a `kind`.
    """
    path = expand_user(name)
    packaged = packaged_names(package)
    if name in packaged:
        path = Path(str(files(package).joinpath(f"{name}.yaml")))
    elif path.suffix != ".yaml" or not path.is_file():
        raise UserError(
            f"{kind} {name!r} is none of {', '.join(packaged)}, and no .yaml file of that name is"
            " there."
        )
    try:
        return path, read_yaml(path)
    except UserError as error:
        raise UserError(f"{kind} {name!r} {error}") from None
