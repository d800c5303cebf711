"""True texts and verdicts from a catalogue: the scenes of `shapes`, or a file about data of one's
own."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cirloop.artifacts.rows import read_augmented
from cirloop.artifacts.store import Store, fingerprint
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import CatalogueFoundation
from cirloop.captioning.parsing import parse_answer
from cirloop.captioning.prompts import REWRITE, VERIFY, load
from cirloop.cli import runner
from cirloop.config.run import RunConfig
from cirloop.data import Dataset, ShapesSettings
from cirloop.data.catalogue import AttributeCatalogue, Items, Phrasebook
from cirloop.data.cirr import CirrSettings
from cirloop.data.jsonl import JsonlSettings
from cirloop.data.known_positives import KnownPositives
from cirloop.data.paths import DataPaths
from cirloop.stages import estimate, preflight
from cirloop.stages.context import RunContext
from cirloop.training.batches import BatchSampler
from cirloop.types import MinedNegative, TrainSplit, UserError
from tests.fake_datasets import write_cirr

BRANDS = ("Bravo", "Zest", "Sol and Luna")
FLAVOURS = ("orange", "plum", "red and yellow")
ITEMS = {
    f"{brand}/{flavour}": {"product": "juice", "brand": brand, "flavour": flavour}
    for brand, flavour in product(BRANDS, FLAVOURS)
}
PHRASES = 'brand: ["{brand} instead of {old brand}"]\nflavour: ["but {flavour}"]\n'


def test_what_the_catalogue_calls_right_is_no_negative(tmp_path: Path) -> None:
    """Neither mined nor in a batch, for human and written texts; and artifacts are others."""
    paths = DataPaths(None, tmp_path, lambda items, title: items)
    data = ShapesSettings(train_families=4, train_triplets=20)

    def opened(exclude: bool) -> Dataset:
        foundation = CatalogueFoundation(exclude_right=exclude)
        return RunConfig(data=data, foundation=foundation).open_data(paths)

    plain = opened(False)
    judged = opened(True)
    assert plain.digest == data.build(paths).digest != judged.digest
    train = judged.train
    assert train.oracle is not None
    known = KnownPositives.of(train)
    mined = []
    num_others = 0
    for triplet in train.triplets:
        right = train.oracle.positives(triplet.query)
        assert {*known.right(triplet.query)} == {train.images.digest(image) for image in right}
        assert {*KnownPositives.of(plain.train).right(triplet.query)} == {
            train.images.digest(triplet.target)
        }
        num_others += len(right) - 1
        mined += [MinedNegative(triplet.query.id, i, 1, 0.5, 2, 0.4, "top_k") for i in right]
    assert num_others
    batches = BatchSampler(train.triplets, [], mined, 16, 0.0, 1, 0, known=known)
    assert batches.num_known_positives == len(mined)


def test_right_images_are_kept_out_or_made_positives() -> None:
    relabel = CaptioningSettings(relabel={"min_probability": 0.5})  # type: ignore[arg-type]
    relabel.check(CatalogueFoundation())
    with pytest.raises(UserError, match=r"does nothing with foundation\.exclude_right"):
        relabel.check(CatalogueFoundation(exclude_right=True))


def test_texts_and_verdicts_are_those_of_the_data_set_s_oracle() -> None:
    train = ShapesSettings(train_families=4, train_triplets=20).build().train
    oracle = train.oracle
    assert oracle is not None
    images = train.gallery.ids
    requests = [CaptionRequest(images[0], image, "") for image in images]
    captioner = CatalogueFoundation().build(None, train)
    answers = captioner.generate(REWRITE, requests, [], 64, [0.0, 0.7], seed=3)
    texts = [parse_answer(both[1].text, "plain") or "" for both in answers]
    written = [i for i, text in enumerate(texts) if text != "none"]
    for i in written:
        assert oracle.text_is_true(images[0], texts[i], images[i])
    distances = [oracle.distance(images[0], image) for image in images]
    assert written == [i for i, distance in enumerate(distances) if 1 <= distance <= 3]
    assert {0, 1, 2, 3} < {*distances}
    text = texts[written[0]]
    verdicts = captioner.yes_probability(
        VERIFY, [CaptionRequest(images[0], image, text) for image in images], []
    )
    assert verdicts == [float(oracle.text_is_true(images[0], text, image)) for image in images]
    assert {*verdicts} == {0.0, 1.0}
    nonsense = CaptionRequest(images[0], images[written[0]], "nicer")
    assert captioner.yes_probability(VERIFY, [nonsense], []) == [0.0]
    nearer = CatalogueFoundation(max_changes=1).build(None, train)
    answers = nearer.generate(REWRITE, requests, [], 64, [0.0], seed=3)
    assert [text.text != "none" for (text,) in answers] == [d == 1 for d in distances]


def test_texts_of_shapes_stay_what_they_are() -> None:
    rows = []
    for variant in (1, 2):
        settings = ShapesSettings(train_families=4, train_triplets=20, variant=variant)
        train = settings.build().train
        images = train.gallery.ids[:22]
        captioner = CatalogueFoundation().build(None, train)
        pairs = [CaptionRequest(a, b, "") for a, b in product(images, images)]
        for seed in (0, 7):
            answers = captioner.generate(REWRITE, pairs, [], 64, [0.0], seed)
            texts = [answer.text for (answer,) in answers]
            questions = [
                CaptionRequest(pair.reference, images[i * 5 % 22], text)
                for i, (pair, text) in enumerate(zip(pairs, texts, strict=True))
            ]
            verdicts = captioner.yes_probability(VERIFY, questions, [])
            rows.append([texts, [verdict == 1 for verdict in verdicts]])
    # of the texts and verdicts from the scenes before catalogues were
    assert fingerprint(rows) == "102cce386b797bfef6757d9c887ad4350ce7c87a0c5a14ee17e37807695ec7e5"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Two photographs of each juice in its folder, texts about them, `items.json`."""
    data = tmp_path / "shop"
    lines = []
    for number, folder in enumerate(ITEMS):
        (data / "images" / folder).mkdir(parents=True)
        for view in (0, 1):
            color = (20 * number, 100 * view, 255 - 20 * number)
            Image.new("RGB", (28 + number, 28 + view), color).save(
                data / "images" / folder / f"{view}.png"
            )
    for (before, old), (after, new) in product(ITEMS.items(), ITEMS.items()):
        if (old["brand"] == new["brand"]) != (old["flavour"] == new["flavour"]):
            text = f"in {new['flavour']}"
            if old["brand"] != new["brand"]:
                text = f"the same {old['product']} by {new['brand']}"
            lines.append({"reference": f"{before}/0.png", "text": text, "target": f"{after}/1.png"})
    for split in ("train", "val"):
        text = "\n".join(json.dumps(line) for line in lines[: 36 if split == "train" else 9])
        (data / f"{split}.jsonl").write_text(text)
    (data / "items.json").write_text(json.dumps(ITEMS))
    (data / "phrases.yaml").write_text(PHRASES)
    return data


def train_of(shop: Path, catalogue: AttributeCatalogue | None = None) -> TrainSplit:
    paths = DataPaths(shop, shop.parent / "cache", lambda items, _: items)
    return replace(JsonlSettings().build(paths).train, catalogue=catalogue)


def on_shop(
    small: Any, shop: Path, name: str = "run", runtime: Any = None, **foundation: Any
) -> RunConfig:
    config: RunConfig = small(
        shop.parent / name,
        data=JsonlSettings(),
        data_dir=shop,
        foundation={"type": "catalogue", "file": shop / "items.json", **foundation},
        retrieval="simulated",
        runtime=runtime or {},
        captioning={"max_round_trip_rank": 0, "min_verify_probability": 0.5},
        mining={"strategy": {"type": "random", "negatives_per_query": 4}},
    )
    return config


def test_a_captioner_reads_the_file_and_speaks_as_people_do(shop: Path) -> None:
    train = train_of(shop)
    captioner = CatalogueFoundation(file=shop / "items.json").build(None, train)
    ids = train.gallery.ids
    images = {name: next(i for i in ids if i.startswith(name)) for name in ITEMS}
    reference = images["Bravo/orange"]
    names = ("Zest/orange", "Bravo/red and yellow", "Zest/red and yellow", "Bravo/orange")
    requests = [CaptionRequest(reference, images[name], "") for name in names]
    answers = captioner.generate(REWRITE, requests, [], 64, [0.0, 0.7], seed=0)
    texts = [[answer.text for answer in row] for row in answers]
    brand, flavour = "the same juice by Zest", "in red and yellow"
    assert texts[0] == [brand] * 2 and texts[1] == [flavour] * 2 and texts[3] == ["none"] * 2
    assert {*texts[2]} <= {f"{flavour} and {brand}", f"{brand} and {flavour}"}
    assert all(answer.ended for row in answers for answer in row)
    later = captioner.generate(REWRITE, requests, [], 64, [0.0], seed=1)
    assert [row[0] for row in later] == [row[1] for row in answers]
    asked = [CaptionRequest(reference, image, brand) for image in ids]
    said = captioner.yes_probability(VERIFY, asked, [])
    assert said == [float(image.startswith("Zest/orange/")) for image in ids]
    assert captioner.name == "catalogue"


def test_answers_are_json_where_the_prompt_asks_for_it(shop: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine-1.yaml"
    file.write_text('answer: json\nturn: "{image}{image}{text}"\n')
    train = train_of(shop)
    captioner = CatalogueFoundation(file=shop / "items.json").build(None, train)
    images = train.gallery.ids
    requests = [CaptionRequest(images[0], image, "") for image in (images[0], images[-1])]
    (equal,), (far,) = captioner.generate(load(str(file)), requests, [], 64, [0.0], seed=0)
    assert (parse_answer(equal.text, "json"), json.loads(equal.text)) == ("none", {"text": "none"})
    assert " and " in json.loads(far.text)["text"]


def test_a_file_s_content_and_not_its_name_is_in_fingerprints(
    small: Any, shop: Path, tmp_path: Path
) -> None:
    def settings_of(**changes: Any) -> str:
        config = on_shop(small, shop, **changes)
        paths = DataPaths(shop, tmp_path / "cache", lambda items, _: items)
        run = RunContext(config, Store(tmp_path), config.data.build(paths))
        return fingerprint(run.stage_config("foundation"))

    first = settings_of()
    (shop / "copy.json").write_text((shop / "items.json").read_text())
    assert settings_of(file=shop / "copy.json") == first
    assert settings_of(max_changes=1) != first
    with_phrases = settings_of(phrases=shop / "phrases.yaml")
    (shop / "phrases.yaml").write_text(PHRASES + "product: ['{product}']\n")
    others = {with_phrases, settings_of(phrases=shop / "phrases.yaml")}
    digests = {CatalogueFoundation(file=shop / "items.json").weights_digest()}
    (shop / "items.json").write_text(json.dumps(ITEMS | {"x": {"brand": "X"}}))
    digests.add(CatalogueFoundation(file=shop / "items.json").weights_digest())
    others |= {first, settings_of()}
    assert (len(others), len(digests)) == (4, 2)


def test_a_data_set_s_own_catalogue_is_in_fingerprints_and_takes_other_words(shop: Path) -> None:
    own = AttributeCatalogue(Items(ITEMS), Phrasebook(()))
    train = train_of(shop, own)
    foundation = CatalogueFoundation()
    assert foundation.train_digests(train) == {"catalogue": own.fingerprint}
    assert foundation.open(train) == own
    with_words = CatalogueFoundation(phrases=shop / "phrases.yaml", max_changes=1)
    opened = with_words.open(train)
    assert isinstance(opened, AttributeCatalogue)
    assert opened.items == own.items and len(opened.phrasebook.phrases) == 2
    assert opened.max_changes == 1
    by_file = CatalogueFoundation(file=shop / "items.json")
    assert by_file.train_digests(train) == {}
    assert by_file.open(train) != own
    drawn = ShapesSettings(train_families=2, train_triplets=2).build().train
    with pytest.raises(UserError, match="words of its own and reads no others"):
        with_words.open(drawn)


@pytest.mark.parametrize(
    ("changes", "content", "said"),
    [
        ({"file": None}, None, "jsonl/train has no catalogue of its own.*--foundation.file FILE"),
        ({"file": "gone.json"}, None, "gone.json: there is no such file"),
        ({"phrases": "gone.yaml"}, None, "gone.yaml: there is no such file"),
        ({}, "{", "items.json: is not JSON"),
        ({}, {"x": {"brand": "X"}}, "none of the 18 images of jsonl/train, such as 'Bravo/orange"),
        ({}, {name: {"brand": "X"} for name in ITEMS}, "no phrase could be learned.*36 triplets"),
        (
            {"phrases": "phrases.yaml"},
            {name: {"color": name} for name in ITEMS},
            "no entry of the catalogue has 'brand', 'flavour'; it has color",
        ),
    ],
)
def test_what_cannot_write_is_refused_before_a_run(
    small: Any, shop: Path, changes: dict[str, Any], content: object, said: str
) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (shop / "items.json").write_text(text)
    paths = {name: value and shop / value for name, value in changes.items()}
    with pytest.raises(UserError, match=said):
        preflight.check(on_shop(small, shop, **paths))


def test_images_that_are_not_known_are_counted(
    small: Any, shop: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shop / "items.json").write_text(json.dumps({k: ITEMS[k] for k in [*ITEMS][:6]}))
    (shop / "phrases.yaml").write_text(PHRASES + "size: ['{size}']\n")
    config = on_shop(small, shop, phrases=shop / "phrases.yaml")
    with caplog.at_level(logging.WARNING):
        data = preflight.check(config)
    assert "knows 12 of the 18 images of jsonl/train" in caplog.text
    assert "no entry of the catalogue has 'size'; it has brand, flavour, product" in caplog.text
    rows = dict(estimate.plan_rows(config, data))
    assert rows["foundation model"] == "catalogue, without a model"


def test_a_catalogue_describes_no_image(small: Any, tmp_path: Path) -> None:
    config = small(
        tmp_path / "run",
        foundation={"type": "catalogue"},
        attributes={"domain": "shapes", "image_source": "vlm"},
        mining={"filters": [{"type": "verify"}]},
    )
    with pytest.raises(
        UserError, match=r"image_source vlm: .* 'catalogue' looks at no image"
    ) as it:
        preflight.check(config)
    said = str(it.value)
    assert "attributes.image_source vlm" in said and "mining.filters verify" not in said


def test_other_data_sets_have_no_catalogue(small: Any, tmp_path: Path) -> None:
    config = small(
        tmp_path / "run",
        foundation={"type": "catalogue"},
        data=CirrSettings(),
        data_dir=write_cirr(tmp_path / "data"),
    )
    with pytest.raises(UserError, match="cirr/train has no catalogue of its own"):
        preflight.check(config)


@pytest.mark.full
def test_a_run_trains_on_texts_from_the_file(small: Any, shop: Path) -> None:
    config = on_shop(small, shop)
    runner.run(config)
    samples = Store(config.directory).load("augmented_samples_iter_1.json")
    rows = read_augmented(samples)
    assert rows and {row.captioner for row in rows} == {"catalogue"}
    catalogue = CatalogueFoundation(file=shop / "items.json").open(train_of(shop))
    for row in rows:
        query = row.triplet.query
        assert catalogue.is_true(query.reference, query.text, row.triplet.target)
    reasons = samples.read()["summary"]["rejected"]
    assert "not verified" not in " ".join(reasons)


@pytest.mark.full
def test_two_processes_write_what_one_writes(small: Any, shop: Path) -> None:
    contents = []
    for num in (1, 2):
        config = on_shop(small, shop, f"run_{num}", {"num_processes": num})
        runner.run(config)
        contents.append(Store(config.directory).load("augmented_samples_iter_1.json").read())
    assert contents[0] == contents[1] and contents[0]["accepted"]
