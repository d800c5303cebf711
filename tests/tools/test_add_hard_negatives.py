"""add_hard_negatives.py on samples: the command, its processes, its report, and bad input."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cirloop.backbones import Qwen2VLSettings
from cirloop.data.shapes.splits import FAMILY_SIZE, build_splits
from cirloop.negatives.text_reuse import normal
from cirloop.retrieval.embed import embed_texts
from cirloop.retrieval.sentence_encoder import SentenceEncoder
from cirloop.tools.add_negatives import samples as reading
from cirloop.tools.add_negatives.config import AddNegativesConfig
from cirloop.tools.add_negatives.pipeline import _read as looked_at
from cirloop.tools.add_negatives.pipeline import add_negatives
from cirloop.tools.add_negatives.report import normalized_entropy
from cirloop.types import UserError
from cirloop.validation import ValidationReport
from tests.commands import python
from tests.test_models_loop import model_of

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
LOOSE = ["--cosine-threshold", "0.75", "--min-visual-similarity", "0.5"]
"""The tiny model's vectors lie close together."""


def command(*flags: object) -> subprocess.CompletedProcess[str]:
    return python("add_hard_negatives.py", *flags)


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def rows() -> list[dict[str, Any]]:
    """Images of three families with a query's text each; two images have two texts, two have
    none of their own."""
    out: list[dict[str, Any]] = [
        {"image": f"{ask.reference}.png", "text": ask.text, "group": ask.reference // FAMILY_SIZE}
        for ask in build_splits()["val"].queries
        if ask.reference < 3 * FAMILY_SIZE
    ]
    out += [{"image": "0.png", "answer": "a photo"}, {"image": "1.png", "text": "red"}]
    another = {"image": "2.png", "text": "another split", "split": "test"}
    copy = {"image": "copy.png", "text": "a copy of another image", "question": "?"}
    return [{"split": "train", **row} for row in [*out, another, copy]]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/` with a copy of image 3 under another name, and `samples.jsonl`."""
    directory = tmp_path_factory.mktemp("shapes")
    (directory / "images").mkdir()
    for row in range(3 * FAMILY_SIZE):
        Image.fromarray(build_splits()["val"].pixels(row)).save(directory / "images" / f"{row}.png")
    (directory / "images" / "copy.png").write_bytes((directory / "images" / "3.png").read_bytes())
    (directory / "samples.jsonl").write_text("\n".join(map(json.dumps, rows())))
    return directory


def samples_at(shapes: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Those of the training split, and the bytes of their images."""
    lines = (shapes / "samples.jsonl").read_text().splitlines()
    samples = [row for row in map(json.loads, lines) if row["split"] == "train"]
    return samples, digests_of(shapes / "images", {row["image"] for row in samples})


def flags(shapes: Path, output: Path, *more: object) -> list[str]:
    data = ["--image-dir", shapes / "images", "--annotations", shapes / "samples.jsonl"]
    options = ["--split", "train", "--output", output, "--batch-size", 8, *LOOSE]
    return [str(word) for word in (*data, *options, *more)]


def added(shapes: Path, output: Path, *more: object) -> AddNegativesConfig:
    """The tool in this process; its settings."""
    options = AddNegativesConfig.parse(flags(shapes, output, *more))
    add_negatives(options)
    return options


@pytest.fixture(scope="module")
def one(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "negatives.json"
    done = command(*flags(shapes, output))
    assert done.returncode == 0, done.stderr
    assert "no GPU here: 1 CPU process" in done.stderr or "GPU" not in done.stderr
    assert f"{output}, and the report {output.with_name('negatives_report.json')}" in done.stdout
    assert "fields that are not used: question" in done.stderr
    names = sorted(path.name for path in output.parent.iterdir())
    assert names == ["negatives.json", "negatives_report.json"]
    return output


def check(result: Any, samples: list[dict[str, Any]], digests: dict[str, bytes]) -> None:
    """What every result must hold, from the samples and the files alone."""
    assert result["schema"] == 1 and len(result["samples"]) == len(samples)
    used: Counter[str] = Counter()
    for sample, row in zip(samples, result["samples"], strict=True):
        assert row["image"] == sample["image"]
        assert row["text"] == sample.get("text", sample.get("answer"))
        negative = row["negative"]
        if negative is None:
            assert row["reason"]
            continue
        assert digests[negative["image"]] != digests[row["image"]]
        assert "group" not in row or row["group"] != negative.get("group")
        assert normal(negative["text"]) != normal(row["text"]) and negative["text"] != "a photo"
        assert negative["text_similarity"] <= negative["threshold"] + 1e-6
        assert negative["kind"] == "diverse" or negative["visual_similarity"] >= 0.5
        used[negative["text"]] += 1
    assert max(used.values()) <= 3


def digests_of(directory: Path, names: set[str]) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names}


@pytest.mark.full
def test_negatives_of_drawn_images(shapes: Path, one: Path) -> None:
    result, report = read(one), read(one.with_name("negatives_report.json"))
    samples, digests = samples_at(shapes)
    check(result, samples, digests)
    chosen = [row["negative"] for row in result["samples"] if row["negative"]]
    kinds = Counter(negative["kind"] for negative in chosen)
    assert kinds["hard"] and kinds["diverse"] and report["negatives"]["hard"] == kinds["hard"]
    assert report["samples"] == len(samples)
    assert report["success_rate"] == round(len(chosen) / len(samples), 6)
    for counts in ("thresholds", "kind_looked_for_first"):
        assert sum(report[counts].values()) == len(chosen)
    texts = [negative["text_similarity"] for negative in chosen]
    similarity = report["similarity"]
    assert similarity["text"]["all"]["median"] == pytest.approx(np.median(texts), abs=1e-4)
    hard = [negative["visual_similarity"] for negative in chosen if negative["kind"] == "hard"]
    quartile = similarity["visual"]["hard"]["75%"]
    assert quartile == pytest.approx(np.percentile(hard, 75), abs=1e-4)
    dropped = report["dropped"]
    filters = ("below_similarity_floor", "same_text", "generic_text", "text_too_near", "candidates")
    assert dropped["neighbours"] == sum(dropped[name] for name in filters)
    assert dropped["generic_text"] > 0
    assert report["phrases"]["distinct"] == len({normal(negative["text"]) for negative in chosen})
    assert report["images"] == len(digests) - 1  # the copy is the same image
    assert {"embed", "find neighbours", "cluster", "choose", "total"} <= report["seconds"].keys()
    assert report["devices"]
    assert all(each["name"] and each["memory_bytes"] > 1 << 28 for each in report["devices"])


@pytest.mark.full
def test_the_one_shard_has_the_numbers_of_the_whole(one: Path) -> None:
    report = read(one.with_name("negatives_report.json"))
    chosen = [row["negative"] for row in read(one)["samples"] if row["negative"]]
    kinds = Counter(negative["kind"] for negative in chosen)
    [shard] = report["shards"]
    assert shard["samples"] == report["samples"]
    assert shard["seconds"].keys() == {"load", "images", "texts"}
    assert (shard["hard"], shard["diverse"]) == (kinds["hard"], kinds["diverse"])
    assert shard["success_rate"] == report["success_rate"]
    for kind in ("text", "visual"):
        values = [negative[f"{kind}_similarity"] for negative in chosen]
        assert shard[f"mean_{kind}_similarity"] == pytest.approx(np.mean(values), abs=1e-5)


@pytest.mark.full
def test_two_processes_and_a_second_time_give_the_same_bytes(
    shapes: Path, one: Path, tmp_path: Path
) -> None:
    for name, more in (("two", ("--num-gpus", 2, "--num-workers", 1)), ("again", ())):
        done = command(*flags(shapes, tmp_path / f"{name}.json", *more))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{name}.json").read_bytes() == one.read_bytes()
    mine, other = read(tmp_path / "two_report.json"), read(one.with_name("negatives_report.json"))
    assert len(mine["shards"]) == 2 and all(shard["images"] > 0 for shard in mine["shards"])
    assert sum(shard["hard"] for shard in mine["shards"]) == mine["negatives"]["hard"]
    mean = sum(
        shard["mean_text_similarity"] * (shard["samples"] - shard["none"])
        for shard in mine["shards"]
    )
    num = mine["samples"] - mine["negatives"]["none"]
    assert mean / num == pytest.approx(mine["similarity"]["text"]["all"]["mean"], abs=1e-3)
    timed = {"seconds", "shards"}
    assert {k: v for k, v in mine.items() if k not in timed} == {
        k: v for k, v in other.items() if k not in timed
    }


@pytest.mark.full
def test_a_low_yield_is_answered_with_what_to_change_and_the_numbers(
    shapes: Path, tmp_path: Path
) -> None:
    more = ("--cosine-threshold", "-0.9", "--max-samples", 20)
    options = added(shapes, tmp_path / "out.json", *more)
    report = read(options.report)
    assert report["samples"] == 20 and report["success_rate"] < 0.9
    said = " ".join(report["advice"])
    assert "--cosine-threshold -0.9 + 0.18" in said
    assert str(report["similarity"]["text"]["neighbours"]["median"]) in said
    assert None in [row.get("negative", "?") for row in read(options.output)["samples"]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photographs at {PHOTOS.relative_to(ROOT.parent)} beside the repository")
    looks = re.findall(
        r"\w+", "soft rough thin thick light heavy plain printed striped checked pale dark"
    )
    found = sorted(path.relative_to(PHOTOS) for path in PHOTOS.rglob("*.jpg"))
    samples = [
        {
            "image": path.as_posix(),
            "text": (
                f"a {looks[n % 12]} {path.parent.name} of {looks[n // 12 % 12]} cloth, item {n}"
            ),
            "group": path.parent.name,
        }
        for n, path in enumerate(found)
    ]
    annotations = tmp_path_factory.mktemp("photos") / "samples.json"
    annotations.write_text(json.dumps(samples))
    return annotations


@pytest.mark.full
@pytest.mark.real_data
def test_photographs_in_one_and_two_processes(photos: Path, tmp_path: Path) -> None:
    samples = read(photos)
    assert len(samples) == 372
    given = ["--image-dir", PHOTOS, "--annotations", photos, "--max-pixels", 12 * 28 * 28, *LOOSE]
    for name, num in (("one", 1), ("two", 2)):
        done = command(*given, "--output", tmp_path / f"{name}.json", "--num-gpus", num)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    digests = digests_of(PHOTOS, {row["image"] for row in samples})
    check(read(tmp_path / "one.json"), samples, digests)
    report = read(tmp_path / "two_report.json")
    assert report["success_rate"] > 0.9 and len(report["shards"]) == 2


def tiny_sentence_encoder(directory: Path) -> Path:
    """A BERT of random weights that knows a few words and takes eight tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = ("[PAD]", "[UNK]", "a", "red", "blue", "dress", "small")
    words = {word: n for n, word in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    signs = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **signs).save_pretrained(directory)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
    sizes = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32}
    BertModel(BertConfig(**layers, **sizes)).save_pretrained(directory)
    return directory


@pytest.mark.full
def test_a_sentence_encoder_is_the_mean_over_its_tokens(shapes: Path, tmp_path: Path) -> None:
    import torch

    encoder = SentenceEncoder(tiny_sentence_encoder(tmp_path / "encoder"))
    alone = encoder.vectors(["a red dress"])
    both = encoder.vectors(["a red dress", "a small blue square hat"])
    assert np.allclose(alone[0], both[0], atol=1e-6)
    assert np.allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)
    ids = encoder._tokenizer(["a red dress"], return_tensors="pt")
    with torch.inference_mode():
        mean = encoder._model(**ids).last_hidden_state[0].mean(0).numpy()
    assert np.allclose(alone[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert encoder.cut == 0
    encoder.vectors([" ".join(["red"] * 9), "blue"])
    assert encoder.cut == 1
    more = ("--text-encoder", tmp_path / "encoder", "--max-samples", 10)
    options = added(shapes, tmp_path / "out.json", *more)
    settings = read(options.output)["settings"]
    assert settings["text_model"] == encoder.fingerprint != settings["model"]
    assert read(options.report)["texts_cut"] > 0


@pytest.mark.full
@pytest.mark.parametrize("name", ["blip2", "clip combiner"])
def test_any_embedder_of_a_run(name: str, shapes: Path, tmp_path: Path) -> None:
    """BLIP-2 with 4 vectors an image, and a CLIP; what cannot be used is one error."""
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps({"model": model_of(name, tmp_path)}))
    done = command(*flags(shapes, tmp_path / "out.json", "--run-config", settings))
    assert done.returncode == 0, done.stderr
    check(read(tmp_path / "out.json"), *samples_at(shapes))
    settings.write_text("{}")
    done = command(*flags(shapes, tmp_path / "out.json", "--run-config", settings))
    assert done.returncode == 2 and "has no `model` that can be used" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_embedder_on_texts_takes_a_text_for_words() -> None:
    backbone = Qwen2VLSettings(path="tiny", dtype="float32").build()
    red = "a red circle"
    texts = [red, f"{red} at the top left", "<|image_pad|>", "<|vision_start|> a dog"]
    found = embed_texts(backbone, texts)
    assert found.shape[0] == 4 and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.allclose(found[0], embed_texts(backbone, texts[:1])[0], atol=1e-5)
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_all_that_is_wrong_is_said_at_once(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("<html>")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    lines: list[Any] = [
        {"image": "good.png", "text": "fine"},
        {"image": "gone.png", "text": "t"},
        {"image": "bad.png", "answer": "t"},
        {"image": "empty.png", "text": "t"},
        {"text": "t"},
        {"image": "good.png"},
        {"image": "good.png", "text": " "},
        {"image": "../good.png", "text": "t"},
        {"image": "good.png", "text": "t", "group": [1]},
        7,
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{not json")
    output = tmp_path / "out.json"
    done = command(
        "--image-dir", tmp_path, "--annotations", tmp_path / "samples.jsonl", "--output", output,
        "--adapter", tmp_path, "--text-encoder", tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and not output.exists()
    for said in (
        "gone.png: is not there",
        "bad.png: is not an image",
        "empty.png: is empty",
        "line 5: has no 'image'",
        "line 6: has no 'text'",
        "line 7: 'text' is empty",
        "line 8: the path of '../good.png' leads out",
        "line 9: 'group' must be text or a whole number",
        "line 10: must be an object",
        "line 11: is not JSON",
        "no adapter_config.json or parts.json",
        "has no *.safetensors weights",
        "docs/add_hard_negatives.md",
    ):
        assert said in done.stderr, (said, done.stderr)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--k-nn", "0"], ["--image-dir: is needed", "--k-nn: "]),
        (["--k_nn", "0"], ["--image-dir: is needed", "--k-nn: "]),
        (["--k-nm", "5"], ["Did you mean --k-nn"]),
    ],
)
def test_wrong_flags(words: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        AddNegativesConfig.parse(words)
    assert all(part in str(caught.value) for part in said), str(caught.value)


AB = {"image": "a", "text": "b"}
NO_SPLIT = "holds a list under 'samples', which is no split"


@pytest.mark.parametrize(
    ("content", "split", "said"),
    [
        (
            {"train": [], "val_seen": []},
            None,
            "has splits, give one by --split; there are: 'train', 'val_seen'",
        ),
        ({"train": []}, "val_unseen", "has no split 'val_unseen'"),
        ({"train": []}, "train", "train: holds no entries"),
        ([AB | {"split": "test"}], "train", "no sample of the split 'train'; there are: 'test'"),
        ([AB], "val_seen", "has no 'split'"),
        ([AB], None, "one sample, which no other can be the negative of"),
        ({"schema": 1, "samples": []}, "train", f"an object that {NO_SPLIT}"),
        ({"samples": [AB]}, None, NO_SPLIT),
        ("text", None, "must be a list of objects, found text"),
        (["text"], None, "entry 0: must be an object"),
    ],
)
def test_wrong_annotations(content: Any, split: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps(content))
    problems = ValidationReport()
    reading.read(tmp_path / "samples.json", split, None, problems)
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    assert said in str(caught.value)


@pytest.mark.parametrize("form", ["keys", "field", "lines"])
def test_the_three_forms_of_annotations(form: str, tmp_path: Path) -> None:
    train = [
        {"image": "a.png", "text": "one  text", "group": 3, "id": "x"},
        {"image": "b.png", "answer": "two"},
    ]
    seen = {"image": "c.png", "text": "three", "split": "val_seen"}
    flat = [*({**row, "split": "train"} for row in train), seen]
    path = tmp_path / ("samples.jsonl" if form == "lines" else "samples.json")
    text = json.dumps({"train": train, "val_seen": flat[2:]} if form == "keys" else flat)
    path.write_text("\n".join(map(json.dumps, flat)) if form == "lines" else text)
    problems = ValidationReport()
    found = reading.read(path, "train", None, problems)
    assert not problems.rows
    first = {"id": "x", "group": "3", "image": "a.png", "text": "one text"}
    assert [sample.row() for sample in found] == [first, {"image": "b.png", "text": "two"}]
    assert len(reading.read(path, "train", 1, ValidationReport())) == 1


@pytest.mark.full
def test_a_failed_process_ends_the_tool_with_its_error_and_leaves_nothing(
    shapes: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}'
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"cut short")
    done = command(*flags(shapes, tmp_path / "out.json", "--num-gpus", 2, "--adapter", adapter))
    assert done.returncode == 2
    assert "cannot be read" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [adapter]


def test_a_model_that_is_not_there_is_said_before_a_process_starts(
    shapes: Path, tmp_path: Path
) -> None:
    done = command(*flags(shapes, tmp_path / "out.json", "--model-path", tmp_path / "nowhere"))
    assert done.returncode == 2 and "does not exist" in done.stderr
    assert "process 0" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_output_may_not_overwrite_the_annotations(shapes: Path) -> None:
    with pytest.raises(UserError, match="would overwrite the annotations"):
        added(shapes, shapes / "samples.jsonl")


def test_normalized_entropy() -> None:
    assert normalized_entropy([2, 2, 2]) == 1 and normalized_entropy([5]) == 0
    assert normalized_entropy([]) is None
    assert normalized_entropy([3, 1]) == pytest.approx(0.8113)


COMMANDS = (
    "train --k-nn 100 --cosine-threshold 0.2 --min-visual-similarity 0.15",
    "train --k-nn 100 --cosine-threshold 0.2 --min-visual-similarity 0.15"
    " --min-answer-length 20 --batch-size 64",
    "val_seen --k-nn 50 --cosine-threshold 0.25 --min-visual-similarity 0.20 --batch-size 32",
    "val_unseen --k-nn 50 --cosine-threshold 0.25 --min-visual-similarity 0.20 --batch-size 32",
)
"""A split, and more flags."""


def mine_photos(directory: Path) -> Path:
    """A folder of three images."""
    images = directory / "photos"
    images.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (90 * number, 0, 0)).save(images / f"{number}.png")
    return images


def samples_of(split: str | None = None) -> list[dict[str, Any]]:
    """A question and its answer about each of the three."""
    field = {} if split is None else {"split": split}
    return [
        {"image": f"{n}.png", "question": "what?", "answer": f"a thing of number {n}", **field}
        for n in range(3)
    ]


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize(
    "name", ["{split}.json", "annotations/{split}.jsonl", "photos/{split}_annotations.json"]
)
def test_the_samples_of_a_split_are_found_beside_the_images(
    words: str, name: str, tmp_path: Path
) -> None:
    images = mine_photos(tmp_path)
    split, *more = words.split()
    argv = ["--image-dir", str(images), "--split", split, "--gpu-id", "0", "--diverse-ratio", "0.0"]
    argv += more
    path = tmp_path / name.format(split=split)
    path.parent.mkdir(exist_ok=True)
    rows = samples_of()
    lines = "\n".join(map(json.dumps, rows))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    options = AddNegativesConfig.parse(argv)
    assert options.annotations == path
    assert options.output == path.with_name(f"{path.stem}_with_negatives.json")
    found, _ = looked_at(options)
    assert [sample.text for sample in found] == [row["answer"] for row in rows]
    options.output.write_text("{}")
    way_out = f"--output {re.escape(str(options.output))} to replace"
    with pytest.raises(UserError, match=f"is there already(?s:.*){way_out}"):
        looked_at(AddNegativesConfig.parse(argv))
    looked_at(AddNegativesConfig.parse([*argv, "--output", str(options.output)]))


def test_no_samples_and_several_are_one_error_that_names_the_places(tmp_path: Path) -> None:
    images = mine_photos(tmp_path)
    argv = ["--image-dir", str(images), "--split", "train"]
    with pytest.raises(UserError) as none:
        looked_at(AddNegativesConfig.parse(argv))
    parts = ("no file of the split 'train'", "annotations/train", ".jsonl", '"answer"')
    for said in (*parts, str(images), str(tmp_path)):
        assert said in str(none.value), said
    (tmp_path / "train.json").write_text(json.dumps(samples_of()))
    (images / "train_annotations.json").write_text("[]")
    with pytest.raises(UserError) as several:
        looked_at(AddNegativesConfig.parse(argv))
    for said in (f"{images}/train_annotations.json and {tmp_path}/train.json", "--annotations"):
        assert said in str(several.value)
    (images / "train_annotations.json").unlink()
    (images / "train_annotations.json").symlink_to(tmp_path / "train.json")
    looked_at(AddNegativesConfig.parse(argv))


def test_a_file_with_a_field_for_the_split_is_read_by_it(tmp_path: Path) -> None:
    images = mine_photos(tmp_path)
    samples = [*samples_of("train")[:2], *samples_of("val")]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    found, _ = looked_at(AddNegativesConfig.parse(["--image_dir", str(images), "--split", "train"]))
    assert len(found) == 2


def test_the_defaults_asked_for_and_both_spellings() -> None:
    options = AddNegativesConfig.parse(["--image_dir", "x", "--split", "train"])
    expected = {
        "k_nn": 30, "cosine_threshold": 0.3, "min_visual_similarity": 0.30, "diverse_ratio": 0.3,
        "min_answer_length": 20, "fallback_phrase_reuse_limit": 3, "batch_size": 64,
        "num_workers": 4,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in expected} == expected
    both = [
        AddNegativesConfig.parse(
            ["--image-dir", "a_b", f"--k{sign}nn=7", f"--min{sign}visual{sign}similarity", "0.1"]
        )
        for sign in "-_"
    ]
    assert both[0] == both[1] and both[0].k_nn == 7 and both[0].image_dir == Path("a_b")


ROW = '{"image": "0.png", "text": "a"}'
CSV = r"\(CSV\), not JSON"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "s.csv",
            "image,text\na.png,red\n",
            rf"a table of columns 'image', 'text' .*{CSV}(?s:.*)JSON list",
        ),
        ("s.json", "image;text\na.png;red\n", f"is a table .*by semicolons {CSV}"),
        ("s.jsonl", f"[\n{ROW}]", "is one JSON list.*name it .json"),
        ("s.json", f"{ROW}\n{ROW}", "JSON lines.*name it .jsonl"),
    ],
)
def test_another_kind_of_file_is_said(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    problems = ValidationReport()
    assert reading.read(tmp_path / name, None, None, problems) == []
    with pytest.raises(UserError, match=said):
        problems.raise_if_any()


def test_absolute_paths_below_the_images_are_taken_and_others_named(tmp_path: Path) -> None:
    images = mine_photos(tmp_path)
    (tmp_path / "link").symlink_to(images)
    folders = (images, tmp_path / "link", tmp_path, f"{images}/../photos")
    rows = [{"image": f"{folder}/0.png", "text": "t"} for folder in folders]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    problems = ValidationReport()
    found = reading.read(tmp_path / "s.json", None, None, problems, tmp_path / "link")
    assert [sample.image for sample in found] == ["0.png", "0.png"]
    assert len(problems.rows) == 2
    assert all("absolute and not below the image directory" in row.what for row in problems.rows)


@pytest.mark.parametrize("output", [".", "..", "{}", "/"])
def test_a_directory_as_output_is_said(output: str, tmp_path: Path) -> None:
    images = mine_photos(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(samples_of()))
    argv = ["--image-dir", str(images), "--split", "train", "--output", output.format(tmp_path)]
    said = r"is a directory, not a file(?s:.*)Give a file in it: --output"
    with pytest.raises(UserError, match=said):
        looked_at(AddNegativesConfig.parse(argv))


@pytest.mark.full
def test_a_command_without_annotations_and_output_and_without_a_negative(
    shapes: Path, tmp_path: Path
) -> None:
    """Nothing is found at such a threshold: the closing line and the advice say so."""
    (tmp_path / "images").symlink_to(shapes / "images")
    (tmp_path / "train.jsonl").write_bytes((shapes / "samples.jsonl").read_bytes())
    data = ("--image_dir", tmp_path / "images", "--split", "train")
    limits = ("--cosine-threshold", "-1", "--min_visual_similarity", "1", "--max-samples", 6)
    done = command(*data, *limits)
    assert done.returncode == 0, done.stderr
    assert f"0 of 6 samples have a negative: {tmp_path}/train_with_negatives.json" in done.stdout
    assert "low yield: " in done.stderr and "knows drawn shapes only" in done.stderr
    [shard] = read(tmp_path / "train_with_negatives_report.json")["shards"]
    assert shard["mean_text_similarity"] is None
