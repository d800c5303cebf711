"""Which rows are for evaluation: whole references, so that no query of val has one of train."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cirloop.types import ImageId, UserError

Fields = dict[str, object]


@dataclass(frozen=True, slots=True)
class Triple:
    """A row whose images are known: the fields of its line, and `group`, the image that stands for
    its reference and for all of the same bytes."""

    where: str
    group: ImageId
    fields: Fields = field(hash=False)


def split(rows: Sequence[Triple], share: float, seed: int) -> tuple[list[Triple], list[Triple]]:
    """Return the rows for training and those for evaluation, in their order.

    References are taken for evaluation in the order of a digest of their name and `seed`, until
    their rows are the `share` of all, or nearest to it. Raises UserError where either would be
    empty.
    """
    rows_of: dict[ImageId, int] = defaultdict(int)
    for row in rows:
        rows_of[row.group] += 1
    wanted = share * len(rows)
    chosen: set[ImageId] = set()
    num = 0
    for group in sorted(rows_of, key=lambda image: _digest(image, seed)):
        nearer = abs(num + rows_of[group] - wanted) <= abs(num - wanted)
        if (nearer or not chosen) and len(chosen) < len(rows_of) - 1:
            chosen.add(group)
            num += rows_of[group]
    if not chosen:
        raise UserError(
            f"--val {share}: {len(rows):,} rows have {len(rows_of)} reference, and a split by"
            " reference needs two. Give the rows for evaluation in a file of their own: --val FILE"
        )
    train = [row for row in rows if row.group not in chosen]
    return train, [row for row in rows if row.group in chosen]


def _digest(image: ImageId, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {image}".encode()).digest()
