"""vLLM's offline engine as the foundation model, in an environment where vLLM is installed.

Written against the documented interface (docs.vllm.ai: "Multimodal Inputs", offline; `LLM`,
`SamplingParams`): requests `{"prompt", "multi_modal_data": {"image": [...]}}`, a seed per request,
`allowed_token_ids` with `logprobs` of what is left, `finish_reason` "stop" of an answer that came
to its end. Of the model's generation_config.json its end signs and its repetition penalty hold, as
in `base.sampling`. Tested with a stand-in that speaks this interface; vLLM itself has not been run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from cirloop.artifacts.store import fingerprint
from cirloop.captioning.backends.hf_captioner import chat_processor, within
from cirloop.captioning.base import Answer, Ask, Sees, chat_text, signs, yes_and_no
from cirloop.captioning.prompts import Prompt
from cirloop.monitoring import profiling

if TYPE_CHECKING:
    from cirloop.captioning.config import VllmFoundation


class VllmCaptioner:
    """Two pictures in one turn of the model's chat template; vLLM batches and schedules by
    itself."""

    sees: Sees = "pictures"

    def __init__(self, settings: VllmFoundation) -> None:
        directory = settings.find()
        import vllm

        self.settings, self.name, self._vllm = settings, settings.path, vllm
        self.processor = chat_processor(settings.path, directory)
        self.signs = signs(self.processor)
        self._yes, self._no = yes_and_no(self.processor.tokenizer)
        self._llm = vllm.LLM(
            model=str(directory),
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            trust_remote_code=False,
            load_format="safetensors",
            limit_mm_per_prompt={"image": 2},
            logprobs_mode="processed_logprobs",  # of the allowed tokens alone, for `yes`
            seed=0,
        )
        self._penalty = self._llm.get_default_sampling_params().repetition_penalty

    @property
    def fingerprint(self) -> str:
        decisive = self.settings.model_dump(mode="json", exclude={"path", "gpu_memory_utilization"})
        return fingerprint([self.settings.weights(), decisive])

    def _requests(
        self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[Image.Image]
    ) -> list[dict[str, Any]]:
        profiling.add(images_encoded=len(vision))
        pictures = [within(picture, self.settings.max_side) for picture in vision]
        assert prompt.num_images == 2 and len(pictures) == 2 * len(asks)
        return [
            {
                "prompt": chat_text(self.processor, self.signs, prompt, ask.text),
                "multi_modal_data": {"image": pictures[2 * i : 2 * i + 2]},
            }
            for i, ask in enumerate(asks)
        ]

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        vision: Sequence[Image.Image],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """An answer per temperature and question; 0 is greedy. Each has a seed of its own, of
        `seed`, its turn and its place. vLLM promises equal texts for equal seeds on one machine
        with one schedule, not across them."""
        requests, turns = self._requests(prompt, asks, vision), []
        for turn, temperature in enumerate(temperatures):
            how = [
                self._vllm.SamplingParams(
                    temperature=temperature,
                    max_tokens=max_new_tokens,
                    seed=((seed + turn) << 16) + i,
                    repetition_penalty=self._penalty,
                )
                for i in range(len(asks))
            ]
            outputs = [
                output.outputs[0] for output in self._llm.generate(requests, how, use_tqdm=False)
            ]
            turns.append(
                [Answer(output.text.strip(), output.finish_reason == "stop") for output in outputs]
            )
        return [list(answers) for answers in zip(*turns, strict=True)]

    def yes(
        self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[Image.Image]
    ) -> list[float]:
        """Probability of "yes" against "no" as the first word of the answer: all other tokens are
        forbidden, and what is left is theirs."""
        allowed = [*self._yes, *self._no]
        how = self._vllm.SamplingParams(
            temperature=1.0, max_tokens=1, seed=0, allowed_token_ids=allowed, logprobs=len(allowed)
        )
        outputs = self._llm.generate(self._requests(prompt, asks, vision), how, use_tqdm=False)
        return [round(self._sum(output.outputs[0].logprobs[0]), 6) for output in outputs]

    def _sum(self, found: dict[int, Any]) -> float:
        """Of the tokens `yes`, from the log probabilities of the first place, which must hold every
        allowed one."""
        share = {token: math.exp(found[token].logprob) for token in (*self._yes, *self._no)}
        return sum(share[token] for token in self._yes) / sum(share.values())
