"""The arithmetic of docs/scaling.md: values by hand, and the document holds what the script
prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.mine_a_million import exponent
from benchmarks.scaling_table import Measured, amount, duration, rows_of

ROOT = Path(__file__).resolve().parents[2]


def test_bytes_and_times_by_hand() -> None:
    given = Measured(
        dimensions=1000,
        m=100,
        image=0.036,
        query=0.5,
        caption=2.0,
        features=1e6,
        top_k=100.0,
        band=10.0,
        band_exponent=1.5,
        queries=40_000,
        captions=1,
        hours=10,
    )
    rows = dict(rows_of(given))
    assert rows["vectors, float32"] == ["4 GB", "40 GB", "4 TB"]
    assert rows["vectors, float16"] == ["2 GB", "20 GB", "2 TB"]
    assert (
        rows["IVF-PQ in memory, 100 bytes a vector"][0] == "124 MB"
    )  # 108 M, and 4,000 centres of 4,000 bytes
    assert rows["IVF-Flat in memory"][0] == "4.02 GB"
    assert rows["IVF training sample, 64 a list"][0] == "1.02 GB"
    assert rows["scores of one query"] == ["4 MB", "40 MB", "4 GB"]
    assert rows["kept vision features"] == ["1 TB", "10 TB", "1 PB"]
    assert rows["embed the gallery, one process"][0] == "10 h"
    assert rows["processes for 10 h"] == ["1", "10", "1,000"]
    assert rows["embed 40,000 queries"][0] == "5.56 h"
    assert rows["mine 40,000 queries by top_k"][:2] == ["3.33 min", "33.3 min"]
    assert rows["mine 40,000 queries by band"][0] == "20 s"
    assert rows["mine 40,000 queries by band"][1] == "10.5 min"  # 20 s times 10^1.5
    assert rows["write 40,000 captions"][0] == "22.2 h"


def test_what_was_not_measured_is_left_out() -> None:
    assert {name.split(",")[0].split(" in ")[0] for name, _ in rows_of(Measured())} == {
        "vectors", "IVF-Flat", "IVF-PQ", "IVF training sample", "scores of one query",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999 B"), (1000, "1 kB"), (1.5e15, "1.5 PB"), (999.6e3, "1 MB")]
)
def test_amounts(number: float, text: str) -> None:
    assert amount(number) == text


def test_durations() -> None:
    assert [duration(s) for s in (5, 119, 120, 7200, 172800)] == [
        "5 s",
        "119 s",
        "2 min",
        "2 h",
        "2 days",
    ]


def test_the_document_holds_the_tables_of_bytes() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    for more in (["--dimensions", "1536"], ["--dimensions", "256", "--m", "32"]):
        command = [sys.executable, "benchmarks/scaling_table.py", *more]
        made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert made in text


def test_the_exponent_of_a_power_law() -> None:
    sizes = [10_000, 30_000, 100_000, 300_000]
    slope, error = exponent(sizes, [2e-4 * size**1.2 for size in sizes])
    assert slope == pytest.approx(1.2) and error == pytest.approx(0, abs=1e-9)
    noisy = (2e-4 * np.array(sizes) ** 1.2 * [1.1, 0.9, 1.1, 0.9]).tolist()
    slope, error = exponent(sizes, noisy)
    fitted, covariance = np.polyfit(np.log(sizes), np.log(noisy), 1, cov=True)
    assert slope == pytest.approx(fitted[0]) and error == pytest.approx(covariance[0, 0] ** 0.5)
