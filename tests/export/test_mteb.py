"""An export in mteb's own interface for images with texts: the run's vectors, and its recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cirloop

NAME = "DrawnShapesIT2IRetrieval"


@pytest.fixture(scope="module")
def mteb() -> Any:
    """Not among the packages for developing: with polars it takes 270 MB."""
    return pytest.importorskip("mteb", reason="mteb is not installed")


def task_of(mteb: Any, part: Any) -> Any:
    """An image-and-text-to-image task over a part of `val`, as mteb's of CIRR is written."""
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Shapes(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name=NAME,
            description="Retrieve the drawn image that a text leads to from another.",
            reference=None,
            dataset={"path": "drawn/shapes", "revision": "0"},
            type="Any2AnyRetrieval",
            category="it2i",
            modalities=["image", "text"],
            eval_splits=["val"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_5",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, **_: Any) -> None:
            def rows(**columns: Any) -> Any:
                return Dataset.from_dict(columns).cast_column("image", ImageFeature())

            queries = part.queries
            answers = {q.id: {str(part.relevance.targets[q.id]): 1} for q in queries}
            corpus = rows(
                id=list(part.gallery.ids),
                image=[part.images.load(image) for image in part.gallery.ids],
            )
            asked = rows(
                id=[q.id for q in queries],
                image=[part.images.load(q.reference) for q in queries],
                text=[q.text for q in queries],
            )
            self.dataset = {
                "default": {
                    "val": {
                        "corpus": corpus,
                        "queries": asked,
                        "relevant_docs": answers,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Shapes()


@pytest.mark.full
def test_mteb_scores_an_export_as_the_run_ranks(
    mteb: Any, run: Path, exported: dict[str, Path]
) -> None:
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    part = cirloop.load_run(run).config.data.build().eval_splits("val")[0]  # type: ignore[call-arg]
    where = str(exported["sentence-transformers"])
    model = SentenceTransformerEncoderWrapper(SentenceTransformer(where, device="cpu"))
    # On the Hub mteb reads this from sentence_bert_config.json.
    model.mteb_model_meta.modalities = ["image", "text"]
    result = mteb.evaluate(model, task_of(mteb, part), cache=None, encode_kwargs={"batch_size": 8})
    (scores,) = result.task_results[0].scores["val"]
    embedder = cirloop.load_run(run).embedder(1)
    images = {image: part.images.load(image) for image in part.gallery.ids}
    gallery_GD = embedder.embed_images([*images.values()])
    queries_QD = embedder.embed_queries(
        [images[query.reference] for query in part.queries], [query.text for query in part.queries]
    )
    row_of = part.gallery.rows()
    targets = np.array([row_of[part.relevance.targets[query.id]] for query in part.queries])
    scores_QG = queries_QD @ gallery_GD.T  # mteb ranks the reference too
    ranks_Q = (scores_QG > scores_QG[np.arange(len(targets)), targets][:, None]).sum(1) + 1
    for k in (1, 5, 10):
        assert scores[f"recall_at_{k}"] == pytest.approx((ranks_Q <= k).mean(), abs=1e-4), k
    assert 0 < scores["recall_at_10"] <= 1
