"""Artifacts are made once, verified when read, and whole at any moment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.artifacts.atomic import format_json, write_json, write_text
from cirloop.artifacts.store import MANIFEST, Store, file_digests, fingerprint
from cirloop.types import UserError


def a_file(text: str = "made") -> Callable[[Path], None]:
    return lambda path: write_text(path, text)


def a_directory(path: Path) -> None:
    write_text(path / "weights", "w" * 100)
    write_text(path / "deep" / "log.json", "{}")


def never(path: Path) -> None:
    raise AssertionError("the builder was called for a finished artifact")


def make(store: Store, name: str = "a.json", text: str = "made", iteration: int | None = 0) -> None:
    store.get_or_build(name, {"k": 1}, ["input"], a_file(text), iteration)


def contents(directory: Path) -> dict[str, str]:
    """Everything below a directory but work in progress."""
    return {k: v for k, v in file_digests(directory).items() if not k.startswith(".work/")}


def test_artifact_is_built_once_and_then_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.get_or_build("a.json", {"k": 1}, ["input"], a_file(), 0)
    again = store.get_or_build("a.json", {"k": 1}, ["input"], never, 0)
    later = Store(tmp_path).get_or_build("a.json", {"k": 1}, ["input"], never, 0)
    assert first.made_now and not again.made_now and not later.made_now
    assert first.digest == again.digest == later.digest
    assert later.path.read_text() == "made"


def test_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def digest(directory: str, text: str) -> str:
        return Store(tmp_path / directory).get_or_build("a.json", {}, [], a_file(text)).digest

    assert digest("x", "one") == digest("y", "one") != digest("z", "two")


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [({"k": 2}, ["input"]), ({"k": 1}, ["other"]), ({"k": 1}, []), ({"k": 1, "j": 0}, ["input"])],
)
def test_other_settings_or_inputs_are_refused_with_the_way_out(
    tmp_path: Path, settings: Any, inputs: list[str]
) -> None:
    store = Store(tmp_path)
    make(store, iteration=3)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="--resume_from_iteration 3"):
        store.get_or_build("a.json", settings, inputs, never, 3)
    assert contents(tmp_path) == before


def test_order_of_settings_does_not_matter_but_order_of_inputs_does(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.get_or_build("a", {"x": 1, "y": 2}, ["1", "2"], a_file())
    store.get_or_build("a", {"y": 2, "x": 1}, ["1", "2"], never)
    with pytest.raises(UserError):
        store.get_or_build("a", {"x": 1, "y": 2}, ["2", "1"], never)


def alter(path: Path) -> None:
    path.write_text(path.read_text().replace("w", "v", 1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def add_beside(path: Path) -> None:
    path.with_name("extra").write_text("")


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        ("model", alter, "model/weights (altered)"),
        ("model", truncate, "model/weights (altered)"),
        ("model", Path.unlink, "model/weights (missing)"),
        ("model", add_beside, "model/extra (not part of it)"),
        ("a.json", truncate, "a.json (altered)"),
        ("a.json", Path.unlink, "a.json (missing)"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], named: str
) -> None:
    build = a_directory if name == "model" else a_file()
    Store(tmp_path).get_or_build(name, {}, [], build, 2)
    damage(tmp_path / name / "weights" if name == "model" else tmp_path / name)
    for look in (lambda s: s.load(name), lambda s: s.get_or_build(name, {}, [], never, 2)):
        with pytest.raises(UserError) as error:
            look(Store(tmp_path))
        assert str(tmp_path / named) in str(error.value)
        assert "--resume_from_iteration 2" in str(error.value)
        assert "deep/log.json" not in str(error.value)


def test_every_damaged_file_is_named_at_once(tmp_path: Path) -> None:
    Store(tmp_path).get_or_build("model", {}, [], a_directory, 0)
    alter(tmp_path / "model" / "weights")
    (tmp_path / "model" / "deep" / "log.json").unlink()
    with pytest.raises(UserError, match=r"(?s)deep/log.json \(missing\).*weights \(altered\)"):
        Store(tmp_path).load("model")


def test_unknown_artifact_is_an_error_that_lists_those_there_are(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UserError, match="it has: none"):
        store.load("b")
    make(store, "a.json")
    with pytest.raises(UserError, match=r"it has: a\.json"):
        store.load("b")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_build_leaves_no_artifact_and_a_later_make_succeeds(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def fail(path: Path) -> None:
        a_directory(path)
        raise error

    with pytest.raises(error):
        Store(tmp_path).get_or_build("model", {}, [], fail)
    assert contents(tmp_path) == {} and Store(tmp_path).names == []
    only = a_file("x")
    made = Store(tmp_path).get_or_build("model", {}, [], lambda path: only(path / "only"))
    assert list(file_digests(made.path)) == ["only"], "files of the failed build were taken over"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_leftover_without_a_manifest_entry_is_remade(tmp_path: Path, kind: str) -> None:
    """A run killed between the rename and the manifest entry."""
    if kind == "file":
        (tmp_path / "a").write_text("half")
    else:
        a_directory(tmp_path / "a")
    made = Store(tmp_path).get_or_build("a", {}, [], a_file("whole"))
    assert made.made_now and made.path.read_text() == "whole"
    assert Store(tmp_path).load("a").digest == made.digest


def test_manifest_entry_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def killed(store: Store) -> None:
        seen.append((tmp_path / "a.json").exists())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            make(Store(tmp_path))
    assert seen == [True]
    assert Store(tmp_path).names == []


def test_workspace_survives_a_failed_build_and_goes_when_done(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(path: Path) -> None:
        write_text(store.scratch_dir("a") / "step_1", "state")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.get_or_build("a", {}, [], fail)
    assert (Store(tmp_path).scratch_dir("a") / "step_1").read_text() == "state"
    store.get_or_build("a", {}, [], a_file())
    assert not store.scratch_dir("a").exists()


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """A run directory with a base evaluation, iterations 0 to 2, and a file that is no artifact."""
    store = Store(tmp_path)
    make(store, "base", iteration=None)
    for t in range(3):
        make(store, f"m_{t}", text=f"model {t}", iteration=t)
    (tmp_path / "results.json").write_text("old")
    return tmp_path


def test_set_aside_moves_the_iteration_and_later_ones(five: Path) -> None:
    store = Store(five)
    goal = store.archive_from(1, also=["results.json", "not there"])
    assert goal == five / "replaced_1"
    moved = {"m_1": "model 1", "m_2": "model 2", "results.json": "old"}
    assert {p.name: p.read_text() for p in goal.iterdir()} == moved
    assert Store(five).names == ["base", "m_0"]
    assert not (five / "m_1").exists() and not (five / "results.json").exists()
    assert "moving" not in json.loads((five / MANIFEST).read_text())


def test_set_aside_never_writes_over_what_was_set_aside_before(five: Path) -> None:
    for turn in (1, 2):
        store = Store(five)
        assert store.archive_from(2) == five / f"replaced_{turn}"
        make(store, "m_2", text=f"remade {turn}", iteration=2)
    texts = [(five / name).read_text() for name in ("replaced_1/m_2", "replaced_2/m_2", "m_2")]
    assert texts == ["model 2", "remade 1", "remade 2"]


def test_set_aside_of_nothing_changes_nothing(five: Path) -> None:
    before = contents(five)
    assert Store(five).archive_from(3, also=["results.json"]) is None
    assert contents(five) == before


def test_set_aside_from_0_takes_what_belongs_to_no_iteration_too(five: Path) -> None:
    """So that a damaged base evaluation is remade by the way out its error names."""
    alter_base = five / "base"
    alter_base.write_text("damaged")
    with pytest.raises(UserError, match="--resume_from_iteration 0"):
        Store(five).load("base")
    store = Store(five)
    store.archive_from(0)
    assert store.names == []
    make(store, "base", iteration=None)
    assert store.load("base").path.read_text() == "made"


@pytest.mark.parametrize("moved_before_the_kill", [0, 1, 3])
def test_interrupted_set_aside_is_finished_by_the_next_store(
    five: Path, monkeypatch: pytest.MonkeyPatch, moved_before_the_kill: int
) -> None:
    left = moved_before_the_kill
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        nonlocal left
        if "replaced_" in str(target):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        return replace(self, target)

    store = Store(five)
    with monkeypatch.context() as patch:
        if moved_before_the_kill == 3:  # all moved, the manifest not yet written again
            patch.setattr("cirloop.artifacts.store.sync_directory", lambda path: None)
            writes = iter([Store._write_manifest])

            def write_once(store: Store) -> None:
                write = next(writes, None)
                if write is None:
                    raise KeyboardInterrupt
                write(store)

            patch.setattr(Store, "_write_manifest", write_once)
        else:
            patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.archive_from(1, also=["results.json"])
    # else the kill came too early or too late
    assert "moving" in json.loads((five / MANIFEST).read_text())
    store = Store(five)
    assert store.names == ["base", "m_0"]
    assert sorted(p.name for p in (five / "replaced_1").iterdir()) == ["m_1", "m_2", "results.json"]
    assert "moving" not in json.loads((five / MANIFEST).read_text())
    make(store, "m_1", text="again", iteration=1)
    assert (five / "replaced_1" / "m_1").read_text() == "model 1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"schema": 1}',
        '{"schema": 1, "artifacts": {}}',
        '{"schema": 2, "artifacts": {}}',
        '{"schema": 2, "artifacts": {}, "digest": "0"}',
    ],
)
def test_damaged_manifest_is_a_clear_error_and_stays_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Store(tmp_path)
    assert contents(tmp_path) == file_digests(tmp_path)
    assert (tmp_path / MANIFEST).read_text() == text


def test_manifest_that_is_not_text_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\xff\x00\x80")
    with pytest.raises(UserError, match="damaged"):
        Store(tmp_path)


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=JSON | st.dictionaries(st.text(), st.lists(JSON, max_size=4), max_size=4))
def test_dump_reads_back_as_what_was_written(value: Any) -> None:
    assert json.loads(format_json(value)) == value
    assert format_json(value).encode().decode() == format_json(value)


def test_dump_writes_one_row_per_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"schema": 1, "rows": [{"a": 1}, {"a": 2}]})
    written = (tmp_path / "x.json").read_text()
    assert written == '{\n "schema": 1,\n "rows": [\n  {"a": 1},\n  {"a": 2}\n ]\n}\n'


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, [math.nan], {"a": math.nan}, {"a": [math.inf]}]
)
def test_dump_refuses_numbers_json_does_not_have(value: Any) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        format_json(value)


def test_write_text_replaces_whole_files_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for text in ("a long first text", "short"):
        write_text(tmp_path / "deep" / "x", text)
    assert {p.name: p.read_text() for p in (tmp_path / "deep").iterdir()} == {"x": "short"}


def test_fingerprint_tells_values_apart_and_ignores_key_order() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
