"""What a data set, a model directory or a setting may try: no code runs, no file outside is read,
nothing leaks."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cirloop.artifacts.atomic import write_json
from cirloop.backbones import Qwen2VLSettings
from cirloop.backbones.config import ClipCombinerSettings
from cirloop.backbones.tensor_cache import TensorCache
from cirloop.backbones.weights import resolve_adapter
from cirloop.captioning.backends.hf_captioner import chat_processor
from cirloop.captioning.foundation import GenericFoundation
from cirloop.cli import entry
from cirloop.cli.mine_embeddings import main as mine_vectors
from cirloop.config.run import load
from cirloop.data.config import CirrSettings, FashionIQSettings, HuggingFaceSettings, JsonlSettings
from cirloop.data.images import BadImage, FileImages, decode, escapes_root
from cirloop.data.paths import DataPaths
from cirloop.io import redact
from cirloop.monitoring.console import start_logging, table
from cirloop.tools.add_negatives.samples import read as read_samples
from cirloop.training.checkpoints import StepCheckpoints
from cirloop.training.config import TrainingSettings
from cirloop.types import ImageId, UserError
from cirloop.validation import ValidationReport
from tests.backbones.tiny_models import write_towers
from tests.commands import ROOT, logging_kept
from tests.fake_datasets import write_cirr, write_fashioniq

SOURCE = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "np.load_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.chmod",
    "tempfile.mkstemp",
    "tempfile.NamedTemporaryFile",
}
TINY = ROOT / "src" / "cirloop" / "tiny"


def forbidden(tree: ast.AST) -> list[str]:
    """What a source may not do, each with its line."""
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names = [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
            out += [f"{node.lineno}: import {name}" for name in names]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            out += [f"{node.lineno}: {name}"] if name in FORBIDDEN_CALLS else []
            for word in node.keywords:
                value = ast.unparse(word.value)
                off = word.arg in ("trust_remote_code", "shell") and value == "False"
                if word.arg in ("allow_pickle", "trust_remote_code", "shell") and not off:
                    out.append(f"{node.lineno}: {word.arg}={value}")
            if name.startswith("Auto") and name.endswith(".from_pretrained"):
                given = {word.arg for word in node.keywords}
                if "trust_remote_code" not in given:
                    out.append(f"{node.lineno}: {name} may ask for remote code")
    return out


EXCEPTIONS = {
    "src/cirloop/tools/export/roundtrip.py": ["exec", "compile"],
    "scripts/convert_towers.py": ["torch.load"],
}
"""The first runs the code of a model card, which our own templates make; what is put in is written
as literals (`repr`). The second reads one published pickle, as tensors alone, after its digest."""


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    found = forbidden(ast.parse(path.read_text("utf-8")))
    assert [each.split(": ")[1] for each in found] == EXCEPTIONS.get(
        str(path.relative_to(ROOT)), []
    )


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import joblib as j",
        "torch.load(path)",
        "yaml.load(text)",
        "eval(x)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(d)",
        "subprocess.run(x, shell=True)",
        "exec(code)",
    ],
)
def test_the_search_finds_what_is_planted(line: str) -> None:
    assert forbidden(ast.parse(f"def f():\n    {line}\n"))


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def test_the_bomb_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


def test_a_pickled_adapter_is_not_read(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "adapter").mkdir()
    lora = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps({"a": Bomb(mark)}))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        Qwen2VLSettings(dtype="float32").build(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        resolve_adapter(str(tmp_path / "adapter"))
    assert not mark.exists()


def test_an_adapter_that_names_code_is_not_followed(tmp_path: Path) -> None:
    lora = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    evil = {"megatron_config": {}, "megatron_core": "evil"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora | evil))
    with pytest.raises(UserError, match="names a module for PEFT to import"):
        Qwen2VLSettings(dtype="float32").build(tmp_path)


LORA = '{"peft_type": "LORA", "target_modules": ["q_proj"], '
BAD_LORA = (
    "",
    "{",
    "[]",
    "null",
    "\0",
    '{"peft_type": 3}',
    '{"peft_type": "LORA", "r": "x"}',
    LORA + '"r": "x"}',
    LORA + '"r": -1}',
    LORA + '"lora_dropout": []}',
    '{"peft_type": "LORA", "target_modules": "("}',
    '{"peft_type": "LORA", "target_modules": ["nothing"]}',
)


@pytest.mark.parametrize("content", BAD_LORA)
def test_a_malformed_adapter_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        Qwen2VLSettings(dtype="float32").build(tmp_path)


def test_a_pickled_model_is_not_read(tmp_path: Path, mark: Path) -> None:
    """Neither where it is all there is, nor beside a safetensors file that is none of the
    model's."""
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb(mark)}))
    with pytest.raises(UserError, match=r"pickled \.bin weights are not read"):
        Qwen2VLSettings(path=str(model)).build()
    TensorCache(tmp_path, "x").write({"a": torch.zeros(1)})
    shutil.copy(next((tmp_path / "x").iterdir()), model / "other.safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        Qwen2VLSettings(path=str(model)).build()
    assert not mark.exists()


def test_a_pickled_clip_is_not_read(tmp_path: Path, mark: Path) -> None:
    for name in ("clip.pt", "clip.bin", "clip.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(UserError, match=name):
            ClipCombinerSettings(clip="RN50", path=str(tmp_path / name)).build()
    assert not mark.exists()


def vectors(tmp_path: Path, gallery: Path) -> list[str]:
    np.save(tmp_path / "queries.npy", np.ones((2, 3), np.float32))
    np.save(tmp_path / "targets.npy", np.array([0, 1]))
    flags = ["--query-embeddings", tmp_path / "queries.npy", "--gallery-embeddings", gallery]
    flags += ["--targets", tmp_path / "targets.npy", "--output", tmp_path / "out.json"]
    return [str(word) for word in flags]


def test_pickled_vectors_and_archives_are_not_read(tmp_path: Path, mark: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([Bomb(mark), 1], dtype=object))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb(mark)))
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, a=np.ones((2, 3), np.float32))
    for name in ("objects.npy", "pickle.npy", "archive.npy"):
        with pytest.raises(UserError, match=name):
            mine_vectors(vectors(tmp_path, tmp_path / name))
    assert not mark.exists() and not (tmp_path / "out.json").exists()


def test_code_of_a_model_directory_is_not_run(tmp_path: Path, mark: Path) -> None:
    """`auto_map` names a file of the directory; our own classes load it, or it is refused."""
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: ...\n")
    names = ("Config", "Model", "ModelForImageTextToText", "Processor", "Tokenizer")
    evil = {"auto_map": {f"Auto{name}": "evil.Evil" for name in names}}
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | evil))
    try:
        made: Any = Qwen2VLSettings(path=str(model), dtype="float32").build()
        assert type(made.vlm).__module__.startswith("transformers.models.qwen2_vl")
    except UserError as error:
        assert "trust_remote_code" in str(error)
    try:
        chat_processor(str(model), GenericFoundation(path=str(model)).resolve_dir())
    except UserError as error:
        assert str(model) in str(error)
    assert not mark.exists()


def test_code_of_a_text_towers_directory_is_not_run(tmp_path: Path, mark: Path) -> None:
    towers = write_towers(tmp_path / "towers")
    (towers / "text" / "evil.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nclass Evil: ...\n"
    )
    evil = {"auto_map": {f"Auto{name}": "evil.Evil" for name in ("Config", "Model", "Tokenizer")}}
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((towers / "text" / file).read_text())
        (towers / "text" / file).write_text(json.dumps(content | evil))
    try:
        built: Any = ClipCombinerSettings(path=str(towers)).build()
        assert type(built.module.clip.text.transformer).__module__.startswith("transformers.models")
    except UserError as error:
        assert "trust_remote_code" in str(error)
    assert not mark.exists()


OUTSIDE = (
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../../b.png",
    "a\0b.png",
    "..\\..\\b.png",
    "a\\b.png",
    "",
    ".",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_told(name: str) -> None:
    assert escapes_root(name)


@pytest.mark.parametrize(
    "name", ["a.png", "a/b.png", "./a.png", "a..b.png", "é ü.png", "a b", "...", "a:b"]
)
def test_other_names_do_not(name: str) -> None:
    assert not escapes_root(name)


def data_paths(directory: Path) -> DataPaths:
    return DataPaths(directory, directory.parent / "cache", lambda items, _: items)


def own_data(directory: Path) -> Path:
    for red, name in enumerate(("a.png", "b.png")):
        (directory / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (red, 0, 0)).save(directory / "images" / name)
    line = {"reference": "a.png", "text": "in blue", "target": "b.png"}
    (directory / "val.jsonl").write_text(json.dumps(line))
    return directory


@pytest.mark.parametrize("name", OUTSIDE)
def test_own_data_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    directory = own_data(tmp_path / "data")
    line = {"reference": name, "text": "in blue", "target": "b.png"}
    (directory / "val.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"val\.jsonl line 1"):
        JsonlSettings().build(data_paths(directory)).eval_splits("val")
    if name.strip():
        (directory / "gallery.txt").write_text(f"a.png\nb.png\n{name}\n")
        with pytest.raises(UserError, match=r"gallery\.txt"):
            JsonlSettings(gallery="gallery.txt").build(data_paths(directory)).eval_splits("val")


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name])
def test_benchmarks_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    cirr = write_cirr(tmp_path / "cirr", 2)
    path = cirr / "image_splits" / "split.rc2.val.json"
    images = json.loads(path.read_text())
    path.write_text(json.dumps(images | {"planted": name}))
    with pytest.raises(UserError, match="the path of 'planted' leads out of the image folder"):
        CirrSettings().build(data_paths(cirr)).eval_splits("val")
    fashion = write_fashioniq(tmp_path / "fashion", 1)
    path = fashion / "image_splits" / "split.dress.val.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), name]))
    with pytest.raises(UserError, match="1 image ids are no names of files"):
        FashionIQSettings(categories=("dress",)).build(data_paths(fashion)).eval_splits("val")


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name])
def test_samples_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    samples = [{"image": name, "text": "x"}, {"image": "a.png", "text": "y"}]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    problems = ValidationReport()
    read_samples(tmp_path / "samples.json", None, None, problems)
    [row] = problems.rows
    assert "leads out" in row.what or "is absolute and not below" in row.what


def test_a_table_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    import datasets

    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    image, text = datasets.Image(), datasets.Value("string")
    features = datasets.Features({"reference": image, "text": text, "target": image})
    inside = {"bytes": (tmp_path / "private.png").read_bytes(), "path": None}
    outside = {"bytes": None, "path": str(tmp_path / "private.png")}
    row = {"reference": outside, "text": "x", "target": inside}
    made = datasets.Dataset.from_list([row], features=features)
    (tmp_path / "data").mkdir()
    made.to_parquet(str(tmp_path / "data" / "validation.parquet"))
    table_ = datasets.Dataset.from_parquet(str(tmp_path / "data" / "validation.parquet"))
    stored = table_.cast_column("reference", datasets.Image(decode=False))[0]["reference"]
    if stored["bytes"] is not None:
        pytest.skip("this `datasets` puts the bytes into the table")
    with pytest.raises(UserError, match="is outside of the data directory"):
        HuggingFaceSettings().build(data_paths(tmp_path / "data")).eval_splits("val")


def test_links_are_read_wherever_they_lead(tmp_path: Path) -> None:
    """The data directory, the folder of images, a folder in it and an image, each on another
    disk."""
    real = own_data(tmp_path / "real")
    (tmp_path / "disk").mkdir()
    (real / "images").rename(tmp_path / "disk" / "images")
    (real / "images").symlink_to(tmp_path / "disk" / "images")
    (real / "images" / "b.png").rename(tmp_path / "disk" / "real.bin")
    (real / "images" / "b.png").symlink_to(tmp_path / "disk" / "real.bin")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "more" / "c.png")
    (real / "images" / "sub").symlink_to(tmp_path / "more")
    (tmp_path / "data").symlink_to(real)
    linked = JsonlSettings(allow_symlinks=True).build(data_paths(tmp_path / "data"))
    [part] = linked.eval_splits("val")
    assert part.gallery.ids == ("a.png", "b.png", "sub/c.png")
    assert part.images.load(ImageId("sub/c.png")).size == (9, 9)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_text(megabytes: int) -> bytes:
    """A PNG of 1x1 with a compressed text that unfolds to so much."""
    made = io.BytesIO()
    Image.new("RGB", (1, 1)).save(made, "PNG")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (megabytes << 20)))
    whole = made.getvalue()
    return whole[:33] + text + whole[33:]  # behind the header


def icon(side: int) -> bytes:
    """An icon that says 16x16, and holds a PNG that says it is `side` x `side`."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + chunks
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 24, len(png), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + png


PLANTED: dict[str, bytes] = {
    "text that unfolds": with_text(200),
    "an icon": icon(12_000),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
    "a pickle": pickle.dumps([1]),
    "a zip": b"PK\x03\x04" + bytes(100),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_image_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PLANTED[name])
    with pytest.raises(BadImage, match=r"a\.png"):
        FileImages({ImageId("a"): tmp_path / "a.png"}).load(ImageId("a"))


def test_a_pipe_and_a_device_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero")):
        with pytest.raises(BadImage, match="a pipe or a device"):
            decode(path)


STEERS = {
    "clears the screen": "\x1b[2J",
    "a link": "\x1b]8;;http://x\x07",
    "goes back": "abc\rdef",
    "bell": "\a",
    "C1": "\x9b31m",
    "backwards": "\u202etxet",
    "isolates": "\u2066x\u2069",
    "half a pair": "\ud800",
    "NUL": "\0",
    "line": "a\u2028b",
}
MARKUP = "[bold red]not[/] [link=file:///etc/passwd]x[/link] [/]"


@pytest.mark.parametrize("name", STEERS)
def test_what_steers_a_terminal_is_spelled_out(name: str) -> None:
    safe = redact.sanitize(f"before {STEERS[name]} after")
    assert safe.isprintable() and "\\" in safe and safe.encode()
    harmless = "tab\tand line\nare fine, so is é 中 عربي"
    assert redact.sanitize(harmless) == harmless


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_show_what_a_model_wrote_as_it_is(terminal: bool) -> None:
    out = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    table(f"title {MARKUP}\x1b[2J", ("a", MARKUP), [[MARKUP, "\x1b[2J\u202e"]], out)
    said = out.file.getvalue()  # type: ignore[attr-defined]
    assert said.count(MARKUP) == 3 and "\\x1b[2J" in said and "\x1b[2J" not in said
    assert "\u202e" not in said


def test_log_lines_and_errors_are_safe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    secret = "hf_" + "a1B2" * 8

    def main() -> None:
        logging.getLogger("cirloop").info(
            "%s %s https://me:word@host/x correct-horse \x1b[2J", MARKUP, secret
        )
        raise UserError(f"{secret} \u202e https://me:word@host/x correct-horse")

    with logging_kept(), pytest.raises(SystemExit):
        entry.main_wrapper(main)
    said = capsys.readouterr().err
    assert MARKUP in said and "\\x1b[2J" in said and "\\u202e" in said
    assert said.count(redact.HIDDEN) == 6
    for hidden in (secret, "me:word", "correct-horse", "\x1b[2J", "\u202e"):
        assert hidden not in said


def test_tracebacks_in_logs_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_kept():
        start_logging()
        try:
            raise RuntimeError("token hf_" + "x" * 30)
        except RuntimeError:
            logging.getLogger("cirloop").exception("failed")
    assert "hf_x" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--model_path", "https://me:word@host/model", "model.path"),
        ("--data_dir", "/data/hf_" + "a" * 30, "data_dir"),
        ("--foundation_model_path", "hf_" + "b" * 34, "foundation.path"),
    ],
)
def test_a_secret_is_no_setting(flag: str, value: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    with pytest.raises(UserError) as error:
        load(["--config", str(tmp_path / "c.yaml"), flag, value], tmp_path / "c.yaml")
    assert str(error.value).startswith(named) and value not in str(error.value)
    assert "HF_TOKEN" in str(error.value)


def test_secrets_are_found_by_name_too() -> None:
    tokens = {"hub_token": "x", "password": "", "tokens": 3}
    settings = {"a": tokens, "b": [{"API_KEY": "y"}], "c": "https://x/y@z"}
    assert list(redact.secrets_in(settings)) == ["a.hub_token", "b.0.API_KEY"]


def test_files_have_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        TensorCache(tmp_path, "tower").write({"a@1x2x2": torch.zeros(3)})
        StepCheckpoints(tmp_path / "steps", "k").write(1, {"a": torch.zeros(3)}, [])
        write_json(tmp_path / "deep" / "a.json", {})
        backbone: Any = Qwen2VLSettings(dtype="float32").build()
        backbone.make_trainable(TrainingSettings(), 0)
        backbone.save_adapter(tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {str(path): oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert len(modes) >= 9
    assert {name: mode for name, mode in modes.items() if mode not in ("0o640", "0o750")} == {}
