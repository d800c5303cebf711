"""The embedded data set: its bytes, its sizes, and what it knows to be right."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cirloop.data import Dataset, ShapesSettings
from cirloop.data.shapes.draw import PRETRAIN, TARGET, WIDE, RenderStyle, draw
from cirloop.data.shapes.language import (
    CASUAL,
    PLAIN,
    TERSE,
    Phrasing,
    phrase_changes,
    read,
    write,
)
from cirloop.data.shapes.scene import (
    COLORS,
    KINDS,
    NUM_CELLS,
    SHAPES,
    SIZES,
    Change,
    Object,
    Scene,
    SeededRandom,
    Selector,
    another_value,
    apply,
    differences,
    random_change,
    random_scene,
    results,
)
from cirloop.data.shapes.splits import FAMILY_SIZE, Scenes, build_splits, image_id, split_scenes
from cirloop.types import EvalSplit, UserError

FIRST = ("train", "val", "test")
SPLITS = (*FIRST, "train_2", "val_2", "test_2")
GOLDEN = "85ad17058bfe8479c319b17aac540236c39c7a67c8ce92487dc81fd2c25ff163"
GOLDEN_2 = "25eba67d85c31f9ebc10b80021a50f347ea537e923a096da568063529d6e5407"
"""SHA-256 over train, val and test of a variant: every image's pixels, then every query. A new one
is a new data set."""

objects = st.builds(Object, *map(st.sampled_from, (COLORS, SHAPES, SIZES)))
scenes = st.lists(st.none() | objects, min_size=NUM_CELLS, max_size=NUM_CELLS).map(tuple)
seeds = st.integers(0, 2**32)
phrasings = st.sampled_from((PLAIN, CASUAL, TERSE))


@pytest.fixture(scope="module")
def splits() -> dict[str, Scenes]:
    return build_splits() | build_splits(2)


@pytest.fixture(scope="module")
def full() -> Dataset:
    return ShapesSettings().build()


@pytest.mark.parametrize(("names", "golden"), [(FIRST, GOLDEN), (SPLITS[3:], GOLDEN_2)])
def test_bytes_are_the_same_on_any_machine(
    splits: dict[str, Scenes], names: tuple[str, ...], golden: str
) -> None:
    digest = hashlib.sha256()
    for name in names:
        split = splits[name]
        for row in range(len(split.scenes)):
            digest.update(split.pixels(row).tobytes())
        for ask in split.queries:
            digest.update(f"{ask.reference} {ask.target} {ask.text}\n".encode())
    assert digest.hexdigest() == golden


def test_sizes_are_at_least_those_promised(full: Dataset) -> None:
    assert len(full.train.triplets) >= 4000 and len(full.train.gallery.ids) >= 3000
    assert set(full.evals) == {"val", "test"}
    for make in full.evals.values():
        [split] = make()
        assert len(split.queries) >= 1000 and len(split.gallery.ids) >= 2000


def test_no_two_splits_share_a_scene(splits: dict[str, Scenes]) -> None:
    for a, b in combinations(SPLITS, 2):
        assert set(splits[a].scenes).isdisjoint(splits[b].scenes)
    assert split_scenes() == {scene for name in FIRST for scene in splits[name].scenes}


def test_families_are_related_scenes(splits: dict[str, Scenes]) -> None:
    """Of a root, three changes in every combination, and alternates: none is further than three
    from it."""
    for split in splits.values():
        assert Counter(Counter(split.families).values()) == {
            FAMILY_SIZE: len(split.scenes) // FAMILY_SIZE
        }
        for start in range(0, len(split.scenes), FAMILY_SIZE):
            root, *others = split.scenes[start : start + FAMILY_SIZE]
            assert max(len(differences(root, other)) for other in others) == 3
            assert len({root, *others[:7]}) == 8


def test_queries_ask_within_their_family_with_unique_texts(splits: dict[str, Scenes]) -> None:
    for split in splits.values():
        assert all(split.families[a.reference] == split.families[a.target] for a in split.queries)
        assert len({(a.reference, a.text) for a in split.queries}) == len(split.queries)


def positives_of(name: str) -> list[tuple[str, str, frozenset[str]]]:
    """Return (reference, target, positives) of every query."""
    part, _, number = name.partition("_")
    dataset = ShapesSettings(variant=2 if number else 1).build()
    if part == "train":
        assert dataset.train.oracle is not None
        positives = dataset.train.oracle.positives
        return [(t.query.reference, t.target, positives(t.query)) for t in dataset.train.triplets]
    [split] = dataset.evals[part]()
    right = split.relevance
    return [(q.reference, right.targets[q.id], right.positives[q.id]) for q in split.queries]


@pytest.mark.parametrize("name", SPLITS)
def test_positives_hold_the_target_and_never_the_reference(name: str) -> None:
    rows = positives_of(name)
    assert all(target in positives for _, target, positives in rows)
    assert not any(reference in positives for reference, _, positives in rows)
    several = sum(len(positives) > 1 for _, _, positives in rows) / len(rows)
    assert 0.05 < several < 0.9, f"{several:.2f} of the queries have more than one right answer"


@pytest.mark.parametrize("name", SPLITS)
def test_positives_are_exactly_what_the_text_asks_for(splits: dict[str, Scenes], name: str) -> None:
    """Against a naive pass over the whole gallery, for some queries."""
    split = splits[name]
    rows = positives_of(name)
    for i in range(0, len(split.queries), 97):
        ask = split.queries[i]
        wanted = results(split.scenes[ask.reference], read(ask.text) or ())
        naive = {image_id(name, row) for row, scene in enumerate(split.scenes) if scene in wanted}
        assert rows[i][2] == naive


@pytest.mark.parametrize("name", SPLITS)
def test_every_text_reads_back_to_changes_that_give_the_target(
    splits: dict[str, Scenes], name: str
) -> None:
    split = splits[name]
    for ask in split.queries:
        changes = read(ask.text)
        assert changes is not None, f"not read: {ask.text!r}"
        assert split.scenes[ask.target] in results(split.scenes[ask.reference], changes), ask.text


@pytest.mark.parametrize("name", SPLITS)
def test_all_kinds_of_change_and_compounds_of_two_occur(
    splits: dict[str, Scenes], name: str
) -> None:
    said = [read(ask.text) or () for ask in splits[name].queries]
    kinds = Counter(change.kind for changes in said for change in changes)
    lengths = Counter(map(len, said))
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 50
    assert set(lengths) == {1, 2} and min(lengths.values()) > len(said) // 5
    assert len({tuple(c.kind for c in changes) for changes in said if len(changes) == 2}) > 20


@pytest.mark.parametrize(("name", "phrasing"), [("train", CASUAL), ("train_2", TERSE)])
def test_every_sentence_of_a_variants_phrasing_occurs(
    splits: dict[str, Scenes], name: str, phrasing: Phrasing
) -> None:
    texts = [ask.text for ask in splits[name].queries]
    for kind, forms in phrasing.sentences.items():
        for form in forms:
            words = [part for part in form.replace("{", "}").split("}")[::2] if part.strip()]
            assert any(all(word in text for word in words) for text in texts), f"{kind}: {form!r}"


# the scenes


@given(a=scenes, b=scenes)
def test_differences_give_exactly_the_other_scene(a: Scene, b: Scene) -> None:
    changes = differences(a, b)
    assert results(a, changes) == ({b} if a != b else set())
    assert (changes == ()) == (a == b)


@given(a=scenes, b=scenes)
def test_differences_are_as_many_there_as_back(a: Scene, b: Scene) -> None:
    assert len(differences(a, b)) == len(differences(b, a))


@given(seed=seeds)
def test_change_that_can_be_done_is_the_difference_it_makes(seed: int) -> None:
    draws = SeededRandom(seed)
    scene = random_scene(draws)
    change = random_change(draws, scene)
    after = apply(scene, change)
    assert after is not None
    assert results(scene, differences(scene, after)) == {after}
    assert len(differences(scene, after)) == 1
    assert change.kind in KINDS


@given(seed=seeds)
def test_another_value_asks_for_another_scene_by_the_same_kind(seed: int) -> None:
    draws = SeededRandom(seed)
    scene = random_scene(draws)
    change = random_change(draws, scene)
    other = another_value(draws, change, scene)
    assert (other is None) == (change.kind in ("remove", "size"))
    if other is not None:
        assert other.kind == change.kind and apply(scene, other) not in (None, apply(scene, change))


RED = Object("red", "circle", "small")
BLUE = Object("blue", "square", "large")
TWO: Scene = (RED, BLUE, *[None] * 7)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (Change("color", Selector(shape="circle"), color="teal"), 1),
        (Change("color", Selector(shape="circle")), 6),
        (Change("shape", Selector(color="blue")), 4),
        (Change("size", Selector(color="blue"), size="small"), 1),
        (Change("size", Selector(color="blue"), size="large"), 0),  # it is large already
        (Change("move", Selector(color="red"), cell=8), 1),
        (Change("move", Selector(color="red")), 7),
        (Change("move", Selector(color="red"), cell=1), 0),  # the other one lies there
        (Change("remove", Selector()), 2),  # either of them
        (Change("remove", Selector(color="green")), 0),
        (Change("add", None, "red", "cross", "small", 4), 1),
        (Change("add", None, "red", "cross", "small"), 7),
        (Change("add", None, "red", "cross", None, 4), 2),
        (Change("add", None, None, None, "small", 4), 35),
        (Change("add", None, "red", "cross", "small", 0), 0),
    ],
)
def test_results_are_counted_by_hand(change: Change, count: int) -> None:
    assert len(results(TWO, (change,))) == count


def test_selectors_speak_of_the_reference() -> None:
    """ "Make the red one blue and remove the blue one" removes the one that was blue before."""
    changes = (
        Change("color", Selector(color="red"), color="blue"),
        Change("remove", Selector(color="blue")),
    )
    assert results(TWO, changes) == {(RED._replace(color="blue"), *[None] * 8)}


# the language


@given(
    seed=seeds, phrasing=phrasings, loose=st.sampled_from((0, 50, 100)), how_many=st.integers(1, 3)
)
def test_text_reads_back_as_what_was_said(
    seed: int, phrasing: Phrasing, loose: int, how_many: int
) -> None:
    draws = SeededRandom(seed)
    scene = random_scene(draws)
    after: Scene | None = scene
    for _ in range(how_many):
        after = apply(after, random_change(draws, after)) if after else None
    assume(after is not None and after != scene)
    assert after is not None
    changes = differences(scene, after)
    said = phrase_changes(draws, scene, changes, loose)
    text = write(draws, said, phrasing)
    again = read(text)
    assert again == said
    assert after in results(scene, again)
    if loose == 0 and not any(
        c.kind == "add" for c in changes
    ):  # an added object's size may stay unsaid
        assert results(scene, again) == {after}


@given(a=scenes, b=scenes, seed=seeds, phrasing=phrasings)
def test_fully_specified_text_gives_exactly_the_other_scene(
    a: Scene, b: Scene, seed: int, phrasing: Phrasing
) -> None:
    assume(a != b)
    again = read(write(SeededRandom(seed), differences(a, b), phrasing))
    assert again is not None and results(a, again) == {b}


@given(seed=seeds, loose=st.sampled_from((0, 100)))
def test_names_of_objects_fit_one_object_alone(seed: int, loose: int) -> None:
    draws = SeededRandom(seed)
    scene = random_scene(draws)
    change = random_change(draws, scene)
    for said in phrase_changes(draws, scene, (change,), loose):
        if said.selector is not None:
            assert change.selector is not None
            assert said.selector.cells(scene) == [change.selector.cell]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "make it nicer",
        "make the red circle pink",
        "remove the red circle and dance",
        "the red circle",
        "and",
    ],
)
def test_text_outside_the_language_is_not_read(text: str) -> None:
    assert read(text) is None


def test_case_and_full_stop_do_not_matter() -> None:
    wanted = (Change("color", Selector("red", "circle"), color="blue"),)
    assert read("make the red circle blue") == read(" Make the red circle BLUE. ") == wanted


# the images


@given(seed=seeds, look=st.sampled_from((PRETRAIN, TARGET, WIDE)))
def test_drawing_is_decided_by_scene_look_and_seed(seed: int, look: RenderStyle) -> None:
    scene = random_scene(SeededRandom(seed))
    pixels = draw(scene, look, "s", seed)
    assert pixels.shape == (84, 84, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, draw(scene, look, "s", seed))
    assert not np.array_equal(pixels, draw(scene, look, "s", seed + 1)), (
        "nothing varies that no text mentions"
    )


@given(seed=seeds, look=st.sampled_from((PRETRAIN, TARGET, WIDE)))
def test_change_shows_where_it_is_made_and_nowhere_else(seed: int, look: RenderStyle) -> None:
    """Drawn with one seed, two scenes of equal layout differ within 6 pixels of the changed cell
    only."""
    draws = SeededRandom(seed)
    scene = random_scene(draws)
    cell = draws.choice([c for c, thing in enumerate(scene) if thing is not None])
    thing = scene[cell]
    assert thing is not None
    other = thing._replace(color=draws.choice([c for c in COLORS if c != thing.color]))
    after = (*scene[:cell], other, *scene[cell + 1 :])
    changed = (draw(scene, look, seed) != draw(after, look, seed)).any(axis=2)
    top, left = (28 * n for n in divmod(cell, 3))
    around = changed.copy()
    around[max(0, top - 6) : top + 34, max(0, left - 6) : left + 34] = False
    assert changed[top : top + 28, left : left + 28].any() and not around.any()


def test_twins_are_one_scene_in_two_images(splits: dict[str, Scenes]) -> None:
    split = splits["val"]
    rows = range(FAMILY_SIZE)
    twins = [(i, j) for i, j in combinations(rows, 2) if split.scenes[i] == split.scenes[j]]
    assert twins
    for i, j in twins:
        assert not np.array_equal(split.pixels(i), split.pixels(j))


def test_styles_of_pretraining_and_fine_tuning_differ() -> None:
    scene = random_scene(SeededRandom("style"))
    means = [[draw(scene, look, i).mean() for i in range(20)] for look in (PRETRAIN, TARGET)]
    assert min(means[0]) > max(means[1]) + 50


# what the loop gets


def test_subsets_have_exactly_the_sizes_asked_for() -> None:
    data = ShapesSettings(train_families=60, train_triplets=600, eval_families=40).build()
    assert len(data.train.triplets) == 600 and len(data.train.gallery.ids) == 60 * FAMILY_SIZE
    for make in data.evals.values():
        [split] = make()
        assert len(split.gallery.ids) == 40 * FAMILY_SIZE and len(split.queries) > 40
    check_inside(data)


def check_inside(data: Dataset) -> None:
    """Nothing is asked about an image outside its gallery."""
    ids = set(data.train.gallery.ids)
    assert {i for t in data.train.triplets for i in (t.query.reference, t.target)} <= ids
    assert data.train.oracle is not None
    assert data.train.oracle.positives(data.train.triplets[0].query) <= ids
    for split in (part for make in data.evals.values() for part in make()):
        inside = set(split.gallery.ids)
        assert {q.reference for q in split.queries} <= inside
        assert split.relevance is not None
        assert all(p <= inside for p in split.relevance.positives.values())


def test_a_subset_is_part_of_the_full_set_and_decided_by_its_seed(full: Dataset) -> None:
    small = {"train_families": 30, "train_triplets": 100, "eval_families": 10}
    one, again, other = (ShapesSettings(**small, subset_seed=s).build() for s in (0, 0, 1))
    assert one.train.triplets == again.train.triplets and one.digest == again.digest
    assert set(one.train.triplets) != set(other.train.triplets) and one.digest != other.digest
    assert set(one.train.triplets) < set(full.train.triplets)
    assert [t.query.id for t in one.train.triplets] == sorted(
        t.query.id for t in one.train.triplets
    )
    image = one.train.gallery.ids[5]
    assert one.train.images.digest(image) == full.train.images.digest(image)


def test_more_triplets_than_the_families_have_is_an_error_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"10 families have \d+.*Ask for fewer triplets"):
        ShapesSettings(train_families=10, train_triplets=4000).build()


def test_evaluation_sees_the_same_split_each_time(full: Dataset) -> None:
    def facts(split: EvalSplit) -> tuple[object, ...]:
        return split.name, split.queries, split.gallery, split.relevance

    assert facts(full.evals["val"]()[0]) == facts(full.evals["val"]()[0])
    assert full.evals["val"]()[0].name == "shapes_val"
    assert full.evals["test"]()[0].name == "shapes_test"


def test_oracle_judges_texts_and_distances(full: Dataset, splits: dict[str, Scenes]) -> None:
    oracle = full.train.oracle
    split = splits["train"]
    assert oracle is not None
    for triplet in full.train.triplets[:50]:
        reference = triplet.query.reference
        target = triplet.target
        assert oracle.text_is_true(reference, triplet.query.text, target)
        assert not oracle.text_is_true(reference, triplet.query.text, reference)
        assert not oracle.text_is_true(reference, "make it nicer", target)
        rows = [int(i.rsplit(":")[-1]) for i in (reference, target)]
        assert oracle.distance(reference, target) == len(
            differences(*(split.scenes[r] for r in rows))
        )


def test_loaded_image_is_the_drawn_one(full: Dataset, splits: dict[str, Scenes]) -> None:
    image = full.train.images.load(image_id("train", 7))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), splits["train"].pixels(7))
