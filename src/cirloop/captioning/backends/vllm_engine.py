"""vLLM's offline engine as the foundation model, in an environment where vLLM is installed.

Requests are `{"prompt", "multi_modal_data": {"image": [...]}}` with a seed each;
`allowed_token_ids` with `logprobs` of the remaining tokens tell yes from no; `finish_reason` is
"stop" of an answer that ended. Of the model's generation_config.json, end tokens and repetition
penalty hold, as in `base.sampling_kwargs`. Run with vLLM 0.32 (tests/captioning/test_vllm.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

from PIL import Image

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.special_tokens import special_tokens
from cirloop.captioning.backends.hf_captioner import chat_processor, shrink_to
from cirloop.captioning.base import (
    Answer,
    CaptionRequest,
    InputKind,
    render_chat,
    yes_no_token_ids,
)
from cirloop.captioning.prompts import Prompt
from cirloop.monitoring import profiling

if TYPE_CHECKING:
    from cirloop.captioning.foundation import VllmFoundation


class VllmRequest(TypedDict):
    """A request of vLLM's offline engine."""

    prompt: str
    multi_modal_data: dict[str, list[Image.Image]]


RequestOutput: TypeAlias = Any
"""vLLM's output of a request, which is not installed where types are checked."""


class Logprob(Protocol):
    """vLLM's log probability of a token."""

    @property
    def logprob(self) -> float: ...


class VllmCaptioner:
    """A captioner that shows two images in one turn of the model's chat template.

    vLLM batches and schedules by itself.
    """

    input_kind: InputKind = "images"

    def __init__(self, settings: VllmFoundation) -> None:
        directory = settings.resolve_dir()
        import vllm

        self.settings = settings
        self.name = settings.path
        self._vllm = vllm
        self.processor = chat_processor(settings.path, directory)
        self.special_tokens = special_tokens(self.processor)
        self._yes_ids, self._no_ids = yes_no_token_ids(self.processor)
        self._llm = vllm.LLM(
            model=str(directory),
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            quantization=settings.quantization,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            tensor_parallel_size=settings.tensor_parallel_size,
            enforce_eager=settings.enforce_eager,
            trust_remote_code=False,
            load_format="safetensors",
            limit_mm_per_prompt={"image": 2},
            logprobs_mode="processed_logprobs",  # of the allowed tokens alone
            seed=0,
            **({"max_num_seqs": settings.max_num_seqs} if settings.max_num_seqs else {}),
        )
        self._penalty = self._llm.get_default_sampling_params().repetition_penalty

    @property
    def fingerprint(self) -> str:
        settings = self.settings
        shown = settings.model_dump(mode="json", exclude={"path", *settings.resultless})
        return fingerprint([settings.weights_digest(), shown])

    def _vllm_requests(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[Image.Image]
    ) -> list[VllmRequest]:
        profiling.add(images_encoded=len(vision))
        images = [shrink_to(image, self.settings.max_side) for image in vision]
        assert prompt.num_images == 2 and len(images) == 2 * len(requests)
        return [
            {
                "prompt": render_chat(self.processor, self.special_tokens, prompt, request.text),
                "multi_modal_data": {"image": images[2 * i : 2 * i + 2]},
            }
            for i, request in enumerate(requests)
        ]

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        vision: Sequence[Image.Image],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """Generate an answer per request and temperature; 0 is greedy.

        Each answer has a seed of its own, from `seed`, the temperature's number and the request's
        index. vLLM promises equal texts for equal seeds on one machine with one schedule, not
        across them.
        """
        vllm_requests = self._vllm_requests(prompt, requests, vision)
        parameters = [
            self._vllm.SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=((seed + number) << 16) + i,
                repetition_penalty=self._penalty,
            )
            for i in range(len(requests))
            for number, temperature in enumerate(temperatures)
        ]
        repeated = [request for request in vllm_requests for _ in temperatures]
        results = self._llm.generate(repeated, parameters, use_tqdm=False)
        answers = [self._answer(result) for result in results]
        num = len(temperatures)
        return [answers[start : start + num] for start in range(0, len(answers), num)]

    def _answer(self, result: RequestOutput) -> Answer:
        """Return the answer of a `RequestOutput`."""
        _count_tokens(result)
        output = result.outputs[0]
        return Answer(output.text.strip(), output.finish_reason == "stop")

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[Image.Image]
    ) -> list[float]:
        """Return the probability of "yes" against "no" as the first word of each answer.

        All other tokens are forbidden.
        """
        allowed = [*self._yes_ids, *self._no_ids]
        parameters = self._vllm.SamplingParams(
            temperature=1.0, max_tokens=1, seed=0, allowed_token_ids=allowed, logprobs=len(allowed)
        )
        vllm_requests = self._vllm_requests(prompt, requests, vision)
        results = self._llm.generate(vllm_requests, parameters, use_tqdm=False)
        for result in results:
            _count_tokens(result)
        return [round(self._yes_share(result.outputs[0].logprobs[0]), 6) for result in results]

    def _yes_share(self, logprobs: Mapping[int, Logprob]) -> float:
        """Return the probability of the "yes" tokens among all allowed ones.

        `logprobs` are those of the first token, and must hold every allowed one.
        """
        allowed = (*self._yes_ids, *self._no_ids)
        probability = {token: math.exp(logprobs[token].logprob) for token in allowed}
        yes = sum(probability[token] for token in self._yes_ids)
        return yes / sum(probability.values())


def _count_tokens(result: RequestOutput) -> None:
    """Add the tokens that an answer took to the stage's."""
    profiling.add(tokens=len(result.prompt_token_ids or ()))
    profiling.add(tokens_written=len(result.outputs[0].token_ids))
