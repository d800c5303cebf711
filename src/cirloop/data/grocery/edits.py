"""What human texts ask for: edits of one attribute or two, and the products that fit.

An edit gives attributes new values (`colour: green`), or asks for another value without naming it
(`colour: *`); all else stays. A product fits a reference and an edit where its attributes are the
reference's with the edit. Only edits that leave the product open to a reader who does not see the
reference are used: over the references of the whole catalogue, each target product equally often,
no product may be right in more than `MAX_ALONE` of an edit's queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

from cirloop.data.catalogue import ANOTHER, Attributes, Phrase, Phrasebook, changes
from cirloop.types import ImageId, UserError

MAX_ALONE = 0.34
MAX_CHANGES = 2
Edit = tuple[tuple[str, str], ...]
"""Attributes and their new values, sorted."""
Answers = Mapping[str, frozenset[str]]
"""The products that fit, by reference product."""


@dataclass(frozen=True, slots=True)
class DrawnQuery:
    """A human query; any image of the `right` products fits it."""

    reference: ImageId
    target: ImageId
    text: str
    edit: Edit
    product: str
    """The reference's."""
    right: frozenset[str]


def kind_of(edit: Edit) -> str:
    """Name what an edit changes, such as `colour` or `another colour`."""
    return " and ".join(f"another {name}" if value == ANOTHER else name for name, value in edit)


def find_edits(products: Mapping[str, Attributes]) -> dict[Edit, Answers]:
    """Return the edits that lead from a product to another one, with the products that fit."""
    answers: dict[Edit, dict[str, set[str]]] = {}
    for reference, target in permutations(products, 2):
        new_values = changes(products[reference], products[target])
        if not 1 <= len(new_values) <= MAX_CHANGES or products[reference].keys() != (
            products[target].keys()
        ):
            continue
        edits = [tuple(sorted((name, value or "") for name, value in new_values.items()))]
        if len(new_values) == 1:
            edits.append(((next(iter(new_values)), ANOTHER),))
        for edit in edits:
            answers.setdefault(edit, {}).setdefault(reference, set()).add(target)
    return {
        edit: {reference: frozenset(targets) for reference, targets in of.items()}
        for edit, of in answers.items()
    }


def share_alone(answers: Answers) -> float:
    """Return the largest share of an edit's queries that one product is right for, where each
    target product is drawn equally often, from each of its references."""
    weights: defaultdict[str, float] = defaultdict(float)
    targets = _targets_of(answers)
    for target in targets:
        references = [reference for reference, right in answers.items() if target in right]
        for reference in references:
            for product in answers[reference]:
                weights[product] += 1 / len(references)
    return max(weights.values()) / len(targets)


def _targets_of(answers: Answers) -> frozenset[str]:
    return frozenset().union(*answers.values())


def usable_edits(
    products: Mapping[str, Attributes], shown: Sequence[str], phrasebook: Phrasebook
) -> dict[Edit, Answers]:
    """Return the edits between products of which images are `shown` that leave the product open
    (`share_alone`) and that there are words for."""
    of_shown = find_edits({name: products[name] for name in shown})
    return {
        edit: of_shown[edit]
        for edit, answers in find_edits(products).items()
        if edit in of_shown and share_alone(answers) <= MAX_ALONE and phrases_for(edit, phrasebook)
    }


def phrases_for(edit: Edit, phrasebook: Phrasebook) -> list[Phrase]:
    """Return the phrases that say exactly this edit."""
    return [phrase for phrase in phrasebook.phrases if _says(phrase, edit)]


def _says(phrase: Phrase, edit: Edit) -> bool:
    values = dict(edit)
    of_phrase = dict(phrase.changes)
    return of_phrase.keys() == values.keys() and all(
        value == values[name] or (value is None and values[name] != ANOTHER)
        for name, value in of_phrase.items()
    )


def draw_queries(
    edits: Mapping[Edit, Answers],
    images: Mapping[str, Sequence[ImageId]],
    phrasebook: Phrasebook,
    num: int,
    random: Random,
) -> list[DrawnQuery]:
    """Draw `num` queries: a kind of change, an edit of it with a product that it leads to, a
    reference product, an image of each, and a phrase, each evenly. So of a kind an edit is drawn
    the more often, the more products it leaves open. No two queries have the same reference and
    text.

    Raises UserError where so many are not found.
    """
    by_kind: dict[str, list[tuple[Edit, str]]] = defaultdict(list)
    for edit in sorted(edits):
        by_kind[kind_of(edit)] += [(edit, target) for target in sorted(_targets_of(edits[edit]))]
    if not by_kind:
        raise UserError(
            "the products of this split have no edit that leaves the product open to a reader of"
            " the text alone and that there are words for. Give products with more attributes in"
            " common (data.attributes), or more words (data.phrases)."
        )
    drawn: dict[tuple[ImageId, str], DrawnQuery] = {}
    for _ in range(50 * num):
        if len(drawn) == num:
            return [*drawn.values()]
        edit, target = random.choice(by_kind[random.choice(sorted(by_kind))])
        answers = edits[edit]
        product = random.choice(sorted(name for name in answers if target in answers[name]))
        phrase = random.choice(phrases_for(edit, phrasebook))
        text = phrase.text.format_map({name: value for name, value in edit})
        reference = random.choice(images[product])
        query = DrawnQuery(
            reference, random.choice(images[target]), text, edit, product, answers[product]
        )
        drawn.setdefault((reference, text), query)
    raise UserError(
        f"{num} queries with different references or texts were asked for, and only {len(drawn)}"
        " were found. Lower data.train_triplets or data.eval_queries, or give more words"
        " (data.phrases)."
    )
