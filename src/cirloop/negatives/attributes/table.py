"""Attributes of a gallery's images by column, so that a query is compared with all images at once.

Array suffixes: G gallery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from cirloop.negatives.attributes.values import compare_values

Counts = npt.NDArray[np.int16]
Verdicts = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Per image the number of attributes that agree with what a query wants and that differ; the
    rest is unknown.

    `requested` are those its text asks for, `other` the target's other ones.
    """

    requested_agree_G: Counts
    requested_differ_G: Counts
    other_agree_G: Counts
    other_differ_G: Counts


class Table(Sequence[Mapping[str, str]]):
    """The attributes of every gallery row: a sequence of mappings that keeps a column per attribute
    as well."""

    def __init__(self, rows: Sequence[Mapping[str, str]]) -> None:
        self.rows = rows
        self.values: dict[str, dict[str, int]] = {}
        self._codes: dict[str, npt.NDArray[np.int32]] = {}
        self._known: dict[tuple[str, str | None, str | None], Verdicts] = {}
        for row, attributes in enumerate(rows):
            for name, value in attributes.items():
                if name not in self._codes:
                    self.values[name] = {}
                    self._codes[name] = np.full(len(rows), -1, np.int32)
                codes = self.values[name]
                self._codes[name][row] = codes.setdefault(value, len(codes))

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, str]]) -> Table:
        """Return the rows as a table; a table is returned as it is."""
        return rows if isinstance(rows, cls) else cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Mapping[str, str]: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Mapping[str, str]]: ...
    def __getitem__(self, row: int | slice) -> Mapping[str, str] | Sequence[Mapping[str, str]]:
        return self.rows[row]

    def compare(self, name: str, requested: str | None, target: str | None) -> Verdicts:
        """Return per image 1, -1 or 0: agrees, differs, unknown (see `values.compare_values`)."""
        key = (name, requested, target)
        if key not in self._known:
            verdicts = [compare_values(requested, target, value) for value in self.values[name]]
            self._known[key] = np.array([*verdicts, 0], np.int8)  # code -1, unknown, takes the last
        return self._known[key][self._codes[name]]

    def agreement(self, requested: Mapping[str, str], target: int) -> Agreement:
        """Count how every image agrees with what a text asks for and with the other attributes of
        the target at row `target`."""
        of_target = self.rows[target]
        counts = np.zeros((4, len(self)), np.int16)
        for name in {**of_target, **requested}:
            if name in self._codes:
                verdict_G = self.compare(name, requested.get(name), of_target.get(name))
                at = 0 if name in requested else 2
                counts[at] += verdict_G > 0
                counts[at + 1] += verdict_G < 0
        return Agreement(*counts)

    def categories(self, name: str) -> list[str]:
        """Return each image's value of the attribute `name`, empty where it is unknown."""
        return [attributes.get(name, "") for attributes in self.rows]
