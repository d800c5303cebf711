"""Texts that were written for mined images: how many passed which check, and some of each kind with
both images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from cirloop.report.charts import Chart, Table, draw, stacked_bars
from cirloop.report.legend import REASONS, legend
from cirloop.report.negatives_section import Summaries
from cirloop.report.report_data import (
    Card,
    Examples,
    ReportData,
    Section,
    Thumbnails,
    evenly_spaced,
    join,
    shortened,
)
from cirloop.types import ImageId, QueryId

ARTIFACT = "augmented_samples_iter_{t}.json"
MAX_ITERATIONS = 3
"""Latest iterations whose texts are shown."""
MAX_TEXTS = 4
"""Accepted texts of an iteration, and half as many rejected for each reason."""
NO_TEXT = ("cut off", "declined", "set phrase", "unparseable")
"""Reasons for which there is nothing to be true."""


def section(data: ReportData, thumbnails: Thumbnails) -> tuple[Section, Summaries]:
    iterations = data.iterations(ARTIFACT)
    examples = list[Examples]()
    summaries: Summaries = {}
    for t, content in data.artifacts(ARTIFACT):
        summaries[t] = content["summary"]
        if t in iterations[-MAX_ITERATIONS:]:
            examples.insert(0, _examples(data, t, content, thumbnails))
    if not summaries:
        is_on = data.settings["captioning"]["enabled"]
        note = (
            "Nothing is written yet."
            if is_on
            else "This run writes no captions (captioning.enabled is off)."
        )
        return Section("captions", "Captions", [note], tables=_judge(data)), {}
    note = (
        "A foundation model wrote the text that would make a mined image, or a neighbour of an"
        " anchor, right. Accepted texts become training triplets; each rejected one is kept with"
        " the check that it failed."
    )
    chart = _chart(data, summaries)
    return (
        Section(
            "captions",
            "Captions",
            [note],
            (),
            [chart],
            [*_accepted_texts(data, summaries), *_judge(data), *_relabelled(data, summaries)],
            examples,
            legend(REASONS, (reason for row in summaries.values() for reason in row["rejected"])),
        ),
        summaries,
    )


def _chart(data: ReportData, summaries: Summaries) -> Chart:
    counts = {t: {"accepted": row["accepted"], **row["rejected"]} for t, row in summaries.items()}
    kinds = [
        "accepted",
        *sorted({kind for kind_counts in counts.values() for kind in kind_counts} - {"accepted"}),
    ]
    parts = {
        shortened(kind): [float(kind_counts.get(kind, 0)) for kind_counts in counts.values()]
        for kind in kinds
    }
    rows = [
        [str(t), *(str(kind_counts.get(kind, 0)) for kind in kinds), str(sum(kind_counts.values()))]
        for t, kind_counts in counts.items()
    ]

    def plot(axes: Axes) -> None:
        stacked_bars(axes, [str(t) for t in counts], parts)
        axes.set_xlabel("iteration")
        axes.set_ylabel("texts")

    table = Table("Texts by what became of them", ("iteration", *parts, "texts"), rows)
    return draw("captions", f"{data.mark}Texts accepted and rejected", table, plot)


def _accepted_texts(data: ReportData, summaries: Summaries) -> list[Table]:
    """Return the accepted texts, those of anchors apart, and how many are true where the data set
    knows. Nothing, where that says no more than the chart."""
    has_anchors = any("anchors" in summary for summary in summaries.values())
    columns = ["iteration", "accepted", *(["true"] if data.accounts else [])]
    if has_anchors:
        columns += ["of anchors", *(["true"] if data.accounts else [])]
    if columns[-1] == "accepted":
        return []
    rows = []
    for t, summary in summaries.items():
        account = data.accounts.get(t, {})
        row = [str(t), *_of_them_true(summary, account, "true_captions", data)]
        if has_anchors:
            anchors = summary.get("anchors", {"accepted": 0})
            row += _of_them_true(anchors, account, "true_captions_of_anchors", data)
        rows.append(row)
    return [Table("Accepted texts", columns, rows)]


def _of_them_true(
    summary: Mapping[str, Any], account: Mapping[str, Any], name: str, data: ReportData
) -> list[str]:
    """Return a cell of how many texts were accepted and, where the data set knows, one of how many
    of them are true."""
    accepted = summary["accepted"]
    if not data.accounts:
        return [str(accepted)]
    true = account.get(name)
    if true is None:
        return [str(accepted), "not known"]
    return [str(accepted), f"{true} ({100 * true / accepted:.1f}%)" if accepted else "0"]


def _judge(data: ReportData) -> list[Table]:
    """Return how well the foundation model told planted right pairs from wrong ones."""
    rows = []
    for _, content in data.artifacts("judge_iter_{t}.json"):
        summary = content["summary"]
        value = summary["auc"]
        cell = "not known" if value is None else f"{value:.3f} ± {summary['standard_error']:.3f}"
        floor = str(data.settings["captioning"]["min_judge_auc"])
        counts = (str(summary["right"]), str(summary["wrong"]))
        rows.append((shortened(summary["judge"]), *counts, cell, floor))
    columns = ("judge", "right pairs", "wrong pairs", "AUC", "floor")
    title = "How well the foundation model tells right texts from wrong ones (0.5 = by chance)"
    return [Table(title, columns, rows)] if rows else []


def _relabelled(data: ReportData, summaries: Summaries) -> list[Table]:
    """Return how many mined images became positives of the human text, and how well they were
    judged."""
    rows = []
    for t, summary in summaries.items():
        if "relabelled" not in summary:
            continue
        judgement = summary["relabelled"]
        precision = judgement["precision"]
        account = data.accounts.get(t, {})
        rows.append(
            (
                str(t),
                str(judgement["judged"]),
                str(judgement["right"]),
                str(judgement["kept"]),
                "not known" if precision is None else f"{100 * precision:.0f}%",
                str(account.get("relabelled_right", "")),
            )
        )
    columns = ("iteration", "judged", "called right", "kept", "precision on planted", "truly right")
    title = "Mined images that became positives of the human text"
    return [Table(title, columns, rows)] if rows else []


def _examples(
    data: ReportData, t: int, content: Mapping[str, Any], thumbnails: Thumbnails
) -> Examples:
    cards = []
    num_shown = data.num_examples or MAX_TEXTS
    for row in evenly_spaced(content["accepted"], num_shown):
        query = row["triplet"]["query"]
        target = row["triplet"]["target"]
        old = "" if _of_anchor(data, row) else data.train_split.text(QueryId(row["source"]))
        cards.append(
            _card(data, row, query["reference"], target, (old, query["text"]), "", thumbnails)
        )
    for reason in content["summary"]["rejected"]:
        for row in evenly_spaced(
            [row for row in content["rejected"] if row["reason"] == reason], -(-num_shown // 2)
        ):
            old = "" if _of_anchor(data, row) else row["original_text"]
            texts = (old, row["text"])
            cards.append(
                _card(data, row, row["reference"], row["image"], texts, reason, thumbnails)
            )
    return Examples(f"Iteration {t}", f"{len(cards)} texts", cards)


def _of_anchor(data: ReportData, row: Mapping[str, Any]) -> bool:
    """Return whether a text has a reference that no human wrote about."""
    return data.train is not None and QueryId(row["source"]) not in data.train_split.queries


def _card(
    data: ReportData,
    row: Mapping[str, Any],
    reference: str,
    image: str,
    texts: tuple[str, str],
    reason: str,
    thumbnails: Thumbnails,
) -> Card:
    """Return a card of a text that was rejected for `reason` (empty = accepted); `texts` are old
    and new."""
    old, new = texts
    checks = row["checks"]
    notes = []
    if "verify" in checks:
        notes.append(f"verified with {float(checks['verify']):.2f}")
    if "round_trip_rank" in checks:
        notes.append(f"found at rank {checks['round_trip_rank']}")
    oracle = data.train.oracle if data.train else None
    if oracle is not None and reason not in NO_TEXT:
        true = oracle.text_is_true(ImageId(reference), new, ImageId(image))
        notes.append("the text is true" if true else "the text is not true")
    split = data.train_split
    names = ("anchor", "neighbour") if _of_anchor(data, row) else ("reference", "mined image")
    images = [
        thumbnails.add(split, ImageId(image_id), name)
        for image_id, name in zip((reference, image), names, strict=True)
    ]
    lines = [("Old text", shortened(old))] if old else []
    lines.append(("New text", shortened(new) or "(empty)"))
    verdict = f"Rejected: {reason}" if reason else "Accepted"
    return Card(shortened(row["source"]), lines, images, (), verdict, not reason, join("; ", notes))
