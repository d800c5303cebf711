"""The vLLM engine against a stand-in that speaks vLLM's documented offline interface. vLLM itself
is not run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cirloop.captioning.base import CaptionRequest, end_token_ids
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import GenericFoundation, VllmFoundation
from cirloop.types import UserError
from tests.backbones.tiny_models import WRITERS
from tests.captioning.photographs import photographs


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of vLLM's that are used here, with vLLM's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    allowed_token_ids: list[int] | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput] = field(default_factory=list)


class LLM:
    """Takes requests one by one through transformers, checking them as vLLM's documentation
    describes them."""

    def __init__(
        self, model: str, *, dtype: str, max_model_len: int, gpu_memory_utilization: float,
        limit_mm_per_prompt: dict[str, int], logprobs_mode: str = "raw_logprobs", seed: int = 0,
        trust_remote_code: bool = False, load_format: str = "auto",
    ) -> None:  # fmt: skip
        # no pickled weights, and no code of the model's
        assert not trust_remote_code and load_format == "safetensors"
        assert 0 < gpu_memory_utilization <= 1 and max_model_len > 0 and seed is not None
        self.limit, self.mode = limit_mm_per_prompt, logprobs_mode
        self.processor = AutoProcessor.from_pretrained(model)
        kind = getattr(torch, dtype)
        self.vlm = AutoModelForImageTextToText.from_pretrained(model, dtype=kind).eval()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json requests for."""
        penalty = self.vlm.generation_config.repetition_penalty
        return SamplingParams(repetition_penalty=penalty or 1.0)

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: Any, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        one_for_all = not isinstance(sampling_params, list)
        many = [sampling_params] * len(prompts) if one_for_all else sampling_params
        assert len(many) == len(prompts)
        return [self._one(request, how) for request, how in zip(prompts, many, strict=True)]

    @torch.no_grad()
    def _one(self, request: dict[str, Any], how: SamplingParams) -> RequestOutput:
        assert request.keys() == {"prompt", "multi_modal_data"}
        assert request["multi_modal_data"].keys() == {"image"}
        images = request["multi_modal_data"]["image"]
        assert len(images) <= self.limit["image"]
        assert all(isinstance(i, Image.Image) for i in images)
        inputs = self.processor(text=[request["prompt"]], images=[images], return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        torch.manual_seed(how.seed or 0)
        sampled = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
        out = self.vlm.generate(
            **inputs,
            max_new_tokens=how.max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
            repetition_penalty=how.repetition_penalty,
            do_sample=bool(how.temperature),
            **(sampled if how.temperature else {}),
        )
        ids = out.sequences[0, start:].tolist()
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        why = "stop" if {*ids} & {*end_token_ids(self.vlm, "stand-in")} else "length"
        return RequestOutput([CompletionOutput(text, ids, self._logprobs(out.logits, how), why)])

    def _logprobs(self, logits: Any, how: SamplingParams) -> list[dict[int, Logprob]] | None:
        if how.logprobs is None:
            return None
        rows = []
        for (row,) in logits:
            if self.mode == "processed_logprobs" and how.allowed_token_ids is not None:
                kept = torch.full_like(row, -torch.inf)
                kept[how.allowed_token_ids] = row[how.allowed_token_ids]
                row = kept
            best = row.log_softmax(-1).topk(how.logprobs)
            pairs = zip(best.values, best.indices, strict=True)
            rows.append({int(i): Logprob(float(value)) for value, i in pairs})
        return rows


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    module.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_answers_are_those_of_the_same_model_by_transformers(
    stand_in: None, tmp_path: Path
) -> None:
    """Prompts, images, seeds and log probabilities arrive as the interface has them: the answers
    are equal."""
    path = str(WRITERS["llava_onevision"](tmp_path / "model"))
    foundation = VllmFoundation(path=path, dtype="float32", max_side=120)
    images, ids = photographs(3, tmp_path)
    requests = [
        CaptionRequest(ids[0], ids[1], "make it red"),
        CaptionRequest(ids[1], ids[2], "<image> with<|im_end|> a longer hem"),
    ]
    prompts = CaptioningSettings().prompts(foundation)
    both = (foundation, GenericFoundation(path=path, dtype="float32", max_side=120))
    vllm, generic = (
        BatchedCaptioner(each.build(), images, tmp_path, 4, lambda b, _: b) for each in both
    )

    def told(eyes: BatchedCaptioner, seed: int) -> Any:
        return eyes.generate(prompts.rewrite, requests, 6, [0.0, 1.5], seed, "test")

    first = told(vllm, 3)
    assert [greedy for greedy, _ in first] == [greedy for greedy, _ in told(generic, 3)]
    assert told(vllm, 3) == first != told(vllm, 4)
    yes = [eyes.yes_probability(prompts.verify, requests, "test") for eyes in (vllm, generic)]
    ours, theirs = yes
    assert ours == pytest.approx(theirs, abs=1e-5) and all(0 <= p <= 1 for p in ours)


def test_without_vllm_the_way_out_is_said() -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(UserError, match=r"vLLM is not installed here.*environment of its own"):
        VllmFoundation(path="tiny").resolve_dir()
