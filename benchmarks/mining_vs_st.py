"""`margin` and `top_k` against `sentence_transformers.util.mine_hard_negatives` on the same
vectors, in turn.

Sentence-transformers gets the vectors through a stub model, by its torch path and its FAISS path.
Prints seconds of all, how many queries have the same negatives in the same order, and the ratios
with their standard errors. Needs `pip install sentence-transformers`, which the project itself does
not.

    python benchmarks/mining_vs_st.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import time
from typing import Any

import numpy as np
import torch

from cirloop.negatives import Margin, MiningSettings, TopK
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.reproducibility import prepare_process


class Stub:
    """Hands out vectors in the place of a model: texts are row numbers."""

    device = torch.device("cpu")

    def __init__(self, queries: Any, gallery: Any) -> None:
        self._queries, self._gallery = queries, gallery

    def encode_query(self, texts: list[str], **_: Any) -> Any:
        return self._queries[[int(text[1:]) for text in texts]]

    def encode_document(self, texts: list[str], **_: Any) -> Any:
        return self._gallery[[int(text) for text in texts]]

    def similarity(self, a: Any, b: Any) -> Any:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=-1)

    def get_embedding_dimension(self) -> int:
        return int(self._gallery.shape[1])


def theirs(
    queries: Any, gallery: Any, targets: Any, use_faiss: bool, **settings: Any
) -> dict[int, list[int]]:
    import faiss
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    if faiss.get_num_gpus() == 0 and hasattr(faiss, "index_cpu_to_all_gpus"):
        del (
            faiss.index_cpu_to_all_gpus
        )  # faiss-gpu without a GPU makes an index of no shards, and searching it crashes
    pairs = Dataset.from_dict(
        {"query": [f"q{i}" for i in range(len(queries))], "target": [str(t) for t in targets]}
    )
    made = mine_hard_negatives(
        pairs,
        Stub(queries, gallery),
        corpus=[str(i) for i in range(len(gallery))],
        num_negatives=3,  # type: ignore[arg-type]
        output_format="n-tuple",
        use_faiss=use_faiss,
        verbose=False,
        **settings,
    )
    names = [name for name in made.column_names if name.startswith("negative")]
    return {int(row["query"][1:]): [int(row[name]) for name in names] for row in made}


def ours(queries: Any, gallery: Any, targets: Any, strategy: Any) -> dict[int, list[int]]:
    settings = MiningSettings(strategy=strategy, only_failed_queries=False)
    found = mine(
        settings, MiningInputs(queries, gallery, targets), MiningContext(0), target_ranks=False
    )
    return {f.query_index: f.gallery_indices.tolist() for f in found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--ours-alone", action="store_true", help="run ours once per strategy and print peak memory"
    )
    args = parser.parse_args()
    random = np.random.default_rng(0)
    gallery = random.standard_normal((args.images, args.dimensions), np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    targets = random.permutation(args.images)[: args.queries]
    queries = gallery[targets] + 0.05 * random.standard_normal(
        (args.queries, args.dimensions), np.float32
    )
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    runs: dict[str, tuple[Any, dict[str, Any]]] = {
        "top_k": (TopK(negatives_per_query=3, extra_ranks="all"), {}),
        "margin": (
            Margin(negatives_per_query=3, relative_margin=0.05, range_max=31),
            {"relative_margin": 0.05, "range_max": 31},
        ),
    }
    if args.ours_alone:
        for strategy, _ in runs.values():
            ours(queries, gallery, targets, strategy)
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
        return
    for name, (strategy, settings) in runs.items():
        ratios: dict[str, list[float]] = {"torch": [], "FAISS": []}
        for _ in range(args.repeats):
            seconds = {}
            for side in ("torch", "FAISS", "ours"):
                began = time.monotonic()
                with contextlib.redirect_stderr(io.StringIO()):
                    made = (
                        ours(queries, gallery, targets, strategy)
                        if side == "ours"
                        else theirs(queries, gallery, targets, side == "FAISS", **settings)
                    )
                seconds[side] = time.monotonic() - began
                if side == "torch":
                    reference = made
            same = sum(made[i] == row for i, row in reference.items())
            times = ", ".join(f"{side} {s:.2f} s" for side, s in seconds.items())
            print(
                f"{name}: {times}; same negatives for {same} of {len(reference)} queries",
                flush=True,
            )
            for side in ratios:
                ratios[side].append(seconds[side] / seconds["ours"])
        for side, values in ratios.items():
            spread = np.std(values, ddof=1) / len(values) ** 0.5
            print(f"{name}: {side} path / ours, in time: {np.mean(values):.1f} ± {spread:.1f}")


if __name__ == "__main__":
    prepare_process()
    main()
