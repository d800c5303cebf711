"""How long scoring takes at the size of CIRR's val split: 4,181 queries, 2,297 images, vectors of
1,536 numbers.

From random query and gallery vectors: places, metrics and the evaluation's JSON; then the two
submission files from the best 50. Embedding is left out. Prints seconds, mean and standard error
over the repeats.

    python benchmarks/score_cirr.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from cirloop.artifacts.atomic import write_json
from cirloop.data import cirr
from cirloop.evaluation import protocols, submission
from cirloop.retrieval.images import ranks_of_images, topk_images
from cirloop.types import Gallery, ImageId, LabeledQueries, Query, QueryId, Relevance
from cirloop.validation import ValidationReport


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=4181)
    parser.add_argument("--images", type=int, default=2297)
    parser.add_argument("--dimensions", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    ids = [ImageId(f"dev-{n:05d}-img0") for n in range(args.images)]
    chosen = [random.choice(args.images, 6, replace=False) for _ in range(args.queries)]
    queries = tuple(Query(QueryId(str(n)), ids[row[0]], "text") for n, row in enumerate(chosen))
    groups = {q.id: tuple(ids[i] for i in row[1:]) for q, row in zip(queries, chosen, strict=True)}
    relevance = Relevance({q.id: ids[row[1]] for q, row in zip(queries, chosen, strict=True)})
    part = LabeledQueries(
        "cirr_val",
        queries,
        relevance,
        Gallery("cirr/val", tuple(ids)),
        cirr.PROTOCOL,
        groups=groups,
    )
    assert part.gallery is not None
    vectors_QD, vectors_GD = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (
            random.standard_normal((n, args.dimensions), np.float32)
            for n in (args.queries, args.images)
        )
    )
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(args.repeats):
            began = time.monotonic()
            wanted = [part.relevant_images(query) for query in queries]
            rows = ranks_of_images(wanted, part.gallery, vectors_QD, vectors_GD)
            found = {query.id: row for query, row in zip(queries, rows, strict=True)}
            metrics = protocols.metrics([part], found)
            ranks = [[query.id, found[query.id][relevance.targets[query.id]]] for query in queries]
            write_json(
                Path(directory) / "out.json",
                {"metrics": {k: m.value for k, m in metrics.items()}, "ranks": ranks},
            )
            top = topk_images(part.gallery, vectors_QD, vectors_GD, submission.LISTED + 1)
            rankings = {
                q.id: row + [i for i in groups[q.id] if i not in row]
                for q, row in zip(queries, top, strict=True)
            }
            problems = ValidationReport()
            submission.write(Path(directory), submission.build(part, rankings, problems))
            assert not problems.rows
            seconds.append(time.monotonic() - began)
    spread = np.std(seconds, ddof=1) / len(seconds) ** 0.5
    print(
        f"{args.queries} queries x {args.images} images: {np.mean(seconds):.2f} ± {spread:.2f} s to"
        " score and write"
    )


if __name__ == "__main__":
    main()
