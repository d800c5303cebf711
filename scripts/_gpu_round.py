"""Parts of gpu_check.py beyond embedding and training: decoding, mining a million images, and a
round of CIRR's size from measured rates. Not a program itself."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _model import text_of, wait
from torch._dynamo.utils import counters
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cirloop.backbones.base import VisionLanguageModel
from cirloop.captioning.base import sampling_kwargs
from cirloop.captioning.decoding import decode
from cirloop.captioning.prefix_cache import KeysValues, PrefillState, cache_argument
from cirloop.config.run import RunConfig
from cirloop.data.paths import DataPaths
from cirloop.monitoring.console import table
from cirloop.negatives import MiningSettings
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.retrieval.topk import topk
from cirloop.stages import estimate, rates, timing
from cirloop.stages.lengths import lengths_of
from cirloop.stages.plan import plan
from cirloop.stages.work import Counts

if TYPE_CHECKING:
    from gpu_check import Check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEPT, SAMPLED = 10, 32
"""Images kept of each query, and queries whose best images are also found in float64."""
CIRR = {"queries": 28_225, "images": 16_939, "captions": 20_000}
CIRR_VAL = {"eval_queries": 4_181, "eval_images": 2_297, "all_images": 21_551}


class FixedLayer(DynamicLayer):
    """Keys and values (B, heads, T, D) at addresses that stay, as a CUDA graph needs them: all
    columns are read, and `mask` hides those that are not written yet."""

    def __init__(self, keys_values: KeysValues, at: torch.Tensor, columns: int) -> None:
        super().__init__()
        self.lazy_initialization(*keys_values)
        self.at, self.read = at, keys_values[0].shape[2]
        buffers = [each.new_zeros(*each.shape[:2], columns, each.shape[3]) for each in keys_values]
        for buffer, states in zip(buffers, keys_values, strict=True):
            buffer[:, :, : self.read] = states
            torch._dynamo.mark_static_address(buffer)
        self.keys, self.values = buffers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> KeysValues:
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> int:
        return self.read


class FixedDecoder:
    """Greedy decoding with a `FixedLayer` each, the step compiled or not."""

    def __init__(
        self, vlm: VisionLanguageModel, prefilled: PrefillState, new_tokens: int, mode: str = ""
    ) -> None:
        self.vlm, self.prefilled, self.new_tokens = vlm, prefilled, new_tokens
        rows, self.start = prefilled.ids_BT.shape[0], prefilled.ids_BT.shape[1] - 1
        columns = self.start + new_tokens
        self.at = torch.zeros(1, dtype=torch.long, device=prefilled.ids_BT.device)
        self.cache = DynamicCache()
        self.cache.layers = [
            FixedLayer((keys[:, :, :-1], values[:, :, :-1]), self.at, columns)
            for keys, values in prefilled.past
        ]
        shape = (rows, 1, 1, columns)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=self.at.device)
        self.kwargs = {**cache_argument(vlm.model.language_model, self.cache), "use_cache": True}
        self.step = torch.compile(self._step, mode=mode) if mode else self._step

    def _step(
        self, ids_B1: torch.Tensor, positions_3B1: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        output = self.vlm.model.language_model(
            inputs_embeds=self.vlm.get_input_embeddings()(ids_B1),
            attention_mask={"full_attention": mask},
            position_ids=positions_3B1,
            **self.kwargs,
        )
        best: torch.Tensor = self.vlm.lm_head(output.last_hidden_state[:, -1:]).argmax(-1)
        return best

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """The tokens (B, new_tokens) that each row goes on with."""
        prefilled = self.prefilled
        written = []
        self.mask.zero_()
        self.mask[:, 0, 0, : self.start] = prefilled.mask_BT[:, :-1].bool()
        ids, positions = prefilled.ids_BT[:, -1:], prefilled.positions_3BT[:, :, -1:].clone()
        for number in range(self.new_tokens):
            self.at.fill_(self.start + number)
            self.mask[:, :, :, self.start + number] = True
            ids = self.step(ids, positions, self.mask).clone()  # the graph's own is written again
            positions = positions + 1
            written.append(ids)
        return torch.cat(written, 1)


def decoding(check: Check) -> None:
    """A batch of questions, decoded as captions are, at fixed addresses, and by CUDA graphs."""
    args = check.args
    captioner, images, prompt, requests = check.captioner()
    requests = requests[: args.chunk]
    pairs = [image for request in requests for image in (request.reference, request.image)]
    with torch.no_grad():
        prefilled = captioner.prefill(prompt, requests, images.get(pairs))
    tokens, made = len(requests) * args.new_tokens, {}

    def timed(name: str, call: Any) -> dict[str, Any]:
        began = time.perf_counter()
        call()  # compiles
        wait()
        first = time.perf_counter() - began
        began = time.perf_counter()
        made[name] = call().cpu()
        wait()
        took = time.perf_counter() - began
        first_of = made["as captions are"][:, : args.new_tokens]
        equal = float((made[name] == first_of).float().mean())
        values = {"tokens_a_second": round(tokens / took, 1), "seconds": round(took, 3)}
        return {**values, "first_s": round(first, 1), "equal_tokens": round(equal, 3)}

    def ours() -> torch.Tensor:
        rows = decode(captioner.vlm, prefilled, args.new_tokens, **sampling_kwargs(0.0))
        return torch.stack(rows)

    case = partial(check.case, "decode")
    case("as captions are", partial(timed, "as captions are", ours))
    fixed = FixedDecoder(captioner.vlm, prefilled, args.new_tokens)
    case("fixed addresses", partial(timed, "fixed addresses", fixed))
    if DEVICE == "cpu":
        check.tell("decode", "CUDA graphs", {"skipped": "they are a GPU's"})
        return
    graphs = FixedDecoder(captioner.vlm, prefilled, args.new_tokens, "reduce-overhead")
    counters.clear()
    case("CUDA graphs", partial(timed, "CUDA graphs", graphs))
    skipped = counters["inductor"]["cudagraph_skips"]
    check.tell("decode", "CUDA graphs", {"left_out_of_graphs": skipped})


def mining(check: Check) -> None:
    """The best images of `--mine_queries` among `--mine_images`, with and without TF32 allowed."""
    args = check.args
    random = torch.Generator(DEVICE).manual_seed(0)

    def unit(num: int) -> np.ndarray[Any, Any]:
        out = np.empty((num, args.mine_width), np.float32)
        for start in range(0, num, 1 << 16):
            rows = torch.randn(
                min(1 << 16, num - start), args.mine_width, device=DEVICE, generator=random
            )
            out[start : start + len(rows)] = torch.nn.functional.normalize(rows).cpu().numpy()
        return out

    gallery, queries = unit(args.mine_images), unit(args.mine_queries)
    targets = np.random.default_rng(0).integers(0, args.mine_images, args.mine_queries)
    settings = MiningSettings(
        strategy={"type": "top_k", "negatives_per_query": KEPT}, only_failed_queries=False
    )
    inputs = MiningInputs(queries, gallery, targets)

    def search() -> None:
        done = sum(1 for _ in mine(settings, inputs, MiningContext(0), DEVICE))
        assert done == args.mine_queries

    name = f"{args.mine_queries:,} queries x {args.mine_images:,} images"
    check.case("mine", name, partial(check.metered, search, args.mine_queries, "queries"))
    sample = queries[:SAMPLED]
    best, _ = topk(sample, gallery, KEPT, DEVICE)
    check.tell("mine", "float32", {"wrong": wrong(sample, gallery, best)})
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        allowed, _ = topk(sample, gallery, KEPT, DEVICE)
        device_gallery = torch.from_numpy(gallery).to(DEVICE)
        scores = torch.from_numpy(sample).to(DEVICE) @ device_gallery.T
        plain = scores.topk(KEPT).indices.cpu().numpy()
        kept = torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    values = {
        "wrong": wrong(sample, gallery, allowed),
        "as_float32": bool((allowed == best).all()),
        "setting_kept": kept,
        "wrong_of_a_plain_product": wrong(sample, gallery, plain),
    }
    check.tell("mine", "TF32 allowed from outside", values)
    if values["wrong"] or not values["as_float32"] or not kept:
        raise AssertionError("a search is not exact where the process allows TF32")


def wrong(
    queries: np.ndarray[Any, Any], gallery: np.ndarray[Any, Any], best: np.ndarray[Any, Any]
) -> int:
    """Images among the best that are worse, in float64, than those that were left out by more than
    float32 rounds."""
    queries_64 = torch.from_numpy(queries).to(DEVICE).double()
    parts = [
        queries_64 @ torch.from_numpy(gallery[start : start + (1 << 16)]).to(DEVICE).double().T
        for start in range(0, len(gallery), 1 << 16)
    ]
    scores = torch.cat(parts, 1)
    last = scores.topk(best.shape[1]).values[:, -1:]
    kept = scores.gather(1, torch.from_numpy(best).to(DEVICE))
    rounding = gallery.shape[1] ** 0.5 * 2.0**-23
    return int((kept < last - rounding).sum())


def cirr_round(check: Check) -> None:
    """The rates of this device by the run's own stages, and a round of CIRR's size from them."""
    never_ends(check.model)
    config, data = run_of(check)
    timing.BUDGET_S = check.args.measure_seconds
    lengths = lengths_of(config, data)
    measured = estimate.measure_here(config, data)
    of_device = replace(
        rates.rates_of(config, lengths, measured),
        model=f"Qwen2-VL-{check.args.size} of random weights",
        answer_tokens=0.0,  # a random model does not say when it is done
    )
    for piece, rate in of_device.pieces.items():
        values = {
            "GFLOP/s": round(rate.flops_per_s / 1e9, 2),
            "of_limit": round(rate.flops_per_s / check.limit, 4),
            "ms_a_call": round(1e3 * rate.s_per_call, 2),
        }
        check.tell("round", f"rate of {piece}", values)
    check.tell("round", "loading a model", {"seconds": round(of_device.load_s, 2)})
    if check.args.extend_rates is not None:
        rates.extend(check.args.extend_rates, of_device)
        check.tell("round", "rates", {"written": str(check.args.extend_rates)})
    failed = CIRR["captions"] / CIRR["queries"]
    counts = Counts(CIRR["queries"], CIRR["images"], **CIRR_VAL, failed=failed)
    planned = plan(config, counts, lengths, rates.costs_of(of_device, config, lengths))
    for stage, of_round, in_all in planned.rows():
        check.tell("round", f"CIRR, {stage}", {"min_a_round": of_round, "min_in_all": in_all})
    title = "A round of CIRR's size by these rates, minutes"
    table(title, ("stage", "a round", "in all"), planned.rows())


def never_ends(model: Path) -> None:
    """Give a random model an end that it does not write: it would stop anywhere, and what a text of
    full length costs is measured."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    file = model / "generation_config.json"
    content = json.loads(file.read_text("utf-8")) if file.exists() else {}
    content["eos_token_id"] = config["text_config"]["vocab_size"] - 1
    file.write_text(json.dumps(content), "utf-8")


def run_of(check: Check) -> tuple[RunConfig, Any]:
    """A run of the check's model on its images: one round, a caption for each mined image, an epoch
    of CIRR."""
    args = check.args
    directory = check.directory / "data"
    images = check.pictures(max(args.tokens))
    names = [path.name for path in sorted(images.iterdir())]
    pairs = zip(names, names[1:] + names[:1], strict=True)
    lines = [
        json.dumps({"reference": one, "target": other, "text": text_of(number)})
        for number, (one, other) in enumerate(pairs)
    ]
    directory.mkdir()
    for split in ("train", "val"):
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    side = 28 * 28
    vlm = {"type": "qwen2_vl", "path": str(check.model), "dtype": args.dtype}
    vlm["max_pixels"] = side * max(args.tokens)
    steps = -(-CIRR["queries"] // args.batch)
    config = RunConfig(
        experiment_dir=check.directory / "run",
        data_dir=directory,
        num_iterations=1,
        model=vlm,
        foundation=vlm,
        data={"type": "jsonl", "images": str(images)},
        mining={"strategy": {"type": "top_k", "negatives_per_query": 1}},
        captioning={
            "num_candidates": 1,
            "batch_size": args.chunk,
            "max_new_tokens": args.new_tokens,
        },
        training={
            "iteration_0_steps": 0,
            "steps_per_iteration": steps,
            "batch_size": args.batch,
            "grad_cache_chunk_size": args.chunk,
        },
        runtime={"num_workers": args.workers, "cache_dir": check.directory / "run cache"},
    )
    return config, config.open_data(DataPaths(directory, config.cache, lambda items, _: items))
