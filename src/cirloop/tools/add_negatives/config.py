"""Flags of add_hard_negatives.py for samples of images and texts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_settings import SettingsConfigDict

from cirloop.backbones.config import BackboneConfig, Qwen2VLSettings
from cirloop.backbones.weights import is_adapter
from cirloop.config import cli
from cirloop.io import parse
from cirloop.negatives.knn_text_samples import KnnTextParams
from cirloop.tools.add_negatives import locate
from cirloop.types import UserError
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
PROGRAM = "add_hard_negatives.py"


class AddNegativesConfig(cli.Flags):
    """Add to each sample, an image and a text, a negative that looks alike and reads otherwise.

    With --query-embeddings the tool mines from vectors alone and has other flags.
    """

    model_config = SettingsConfigDict(cli_kebab_case=True)

    image_dir: Path
    """The directory that the samples' images are in."""
    annotations: Path | None = None
    """The samples, JSON or JSON lines; docs/add_hard_negatives.md has the form. By default the
    split's file in or beside --image-dir, such as train.json or annotations/train.jsonl."""
    split: str | None = None
    """Which samples of the file: train, val_seen, val_unseen, ..."""
    output: Path | None = None
    """Where the result goes, as JSON; the report goes beside it, as NAME_report.json. By default
    beside the annotations, as NAME_with_negatives.json, which must not be there yet."""
    gpu_id: int = Field(0, ge=0)
    """The first GPU to use."""
    num_gpus: int = Field(1, ge=1)
    """Processes that embed, a GPU each; without a GPU, of one CPU thread each."""
    k_nn: int = Field(30, ge=1)
    """Visual neighbours of a sample that are looked at."""
    cosine_threshold: float = Field(0.3, ge=-1, le=1)
    """Text similarity below which a text is far enough; raised by 0.09 twice where it lets none
    through."""
    min_visual_similarity: float = Field(0.3, ge=-1, le=1)
    """Visual similarity a hard negative needs; -1: any."""
    diverse_ratio: float = Field(0.3, ge=0, le=1)
    """Share of the samples that are first given one of the visually farthest cluster; the others
    get a hard one."""
    min_answer_length: int = Field(20, ge=0)
    """Characters of a text, below which it is used as a negative only where there is no longer one;
    0 = any length."""
    fallback_phrase_reuse_limit: int = Field(3, ge=1)
    """How many samples a text may be the negative of; a short text fewer, by its length."""
    num_clusters: int | None = Field(None, ge=1)
    """Visual clusters; by default the square root of half the images, 2 to 256."""
    batch_size: int = Field(64, ge=1)
    """Images or texts embedded at once. Another one may change the last bits of the vectors."""
    num_workers: int = Field(4, ge=1)
    """Threads of a process that decode images."""
    max_samples: int | None = Field(None, ge=2)
    """Only the first samples, so many."""
    model_path: str = "tiny"
    """The embedder: a Qwen2-VL directory or hub name; `tiny` is the embedded model."""
    run_config: Path | None = None
    """A run's YAML or config.json: its `model` is the embedder, in place of --model-path, --dtype
    and --max-pixels."""
    adapter: Path | None = None
    """An adapter on it, such as a run's checkpoint_iter_1."""
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    """Largest image after resizing, in pixels; 28x28 of them make one token."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the embedder's weights."""
    text_encoder: Path | None = None
    """Directory of a sentence encoder (transformers' AutoModel, mean over tokens); by default the
    embedder on texts."""
    seed: int = Field(0, ge=0)
    """Of all draws."""

    @classmethod
    def parse(cls, argv: Sequence[str]) -> AddNegativesConfig:
        """Return the flags, as --kebab-case or --snake_case, with the paths that are looked for
        filled in where there is one.

        Raises UserError with every flag that is missing or wrong.
        """
        return cli.parse_flags(cls, argv, PROGRAM).located()

    def located(self) -> AddNegativesConfig:
        """Return the flags with the annotations beside the images, and the result beside them.
        What is not there stays None."""
        annotations = self.annotations
        output = self.output
        if annotations is None:
            files = locate.split_files(self.image_dir, self.split)
            annotations = files[0] if len(files) == 1 else None
        if output is None and annotations is not None:
            output = annotations.with_name(f"{annotations.stem}_with_negatives.json")
        located = self.model_copy(update={"annotations": annotations, "output": output})
        located.model_fields_set.intersection_update(self.model_fields_set)  # what a person gave
        return located

    @property
    def paths(self) -> tuple[Path, Path]:
        """Where the samples are and where the result goes, once `check` noted nothing."""
        assert self.annotations is not None and self.output is not None
        return self.annotations, self.output

    @property
    def params(self) -> KnnTextParams:
        """The numbers that decide."""
        names = {field.name for field in fields(KnnTextParams)}
        return KnnTextParams(**self.model_dump(include=names))

    @property
    def model(self) -> BackboneConfig:
        """The embedder's settings. Raises UserError where `run_config` has none."""
        if self.run_config is None:
            return Qwen2VLSettings(
                path=self.model_path, dtype=self.dtype, max_pixels=self.max_pixels
            )
        try:
            content = parse.read_yaml(self.run_config)
            model: BackboneConfig = TypeAdapter(BackboneConfig).validate_python(content["model"])
            if model.type == "simulated":
                raise UserError("the run has simulated retrieval, and so no model")
        except (UserError, ValidationError, KeyError, TypeError) as error:
            raise UserError(
                f"--run-config {self.run_config} has no `model` that can be used: {error}"
            ) from None
        return model

    @property
    def embeds_by_tiny(self) -> bool:
        return self.run_config is None and self.model_path == "tiny"

    @property
    def report(self) -> Path:
        output = self.paths[1]
        return output.with_name(f"{output.stem}_report.json")

    def check(self, problems: ValidationReport) -> None:
        """Note what is wrong with the paths."""
        if not self.image_dir.is_dir():
            problems.add(f"--image-dir {self.image_dir}", "there is no such directory")
        elif self.annotations is None:
            self._check_annotations(problems)
        if self.output is not None:
            self._check_output(self.output, problems)
        try:
            self.model.resolve_dir()
        except UserError as error:
            problems.merge(error, "model")
        if self.adapter is not None and not is_adapter(self.adapter):
            problem = "is no adapter directory (no adapter_config.json or parts.json)"
            problems.add(f"--adapter {self.adapter}", problem)
        if self.text_encoder is not None:
            for name in ("config.json", "tokenizer_config.json", "*.safetensors"):
                if not any(self.text_encoder.glob(name)):
                    weights = " weights" if name.startswith("*") else ""
                    problems.add(f"--text-encoder {self.text_encoder}", f"has no {name}{weights}")
        self._check_devices(problems)

    def _check_devices(self, problems: ValidationReport) -> None:
        """Note GPUs that are not there; where there is none at all, say that the CPU does it."""
        import torch

        num_gpus = torch.cuda.device_count()
        num_processes = self.num_gpus
        if num_gpus == 0:
            processes = "1 CPU process" if num_processes == 1 else f"{num_processes} CPU processes"
            logger.warning(
                "no GPU here: %s of one thread; --num-gpus N uses N cores, --gpu-id nothing",
                processes,
            )
        elif self.gpu_id + num_processes > num_gpus:
            flags = f"--gpu-id {self.gpu_id} --num-gpus {num_processes}"
            problems.add(flags, f"this machine has {num_gpus} GPUs, from 0")

    def _check_annotations(self, problems: ValidationReport) -> None:
        """Note that no file of annotations was found, or several."""
        files = locate.split_files(self.image_dir, self.split)
        if files:
            problem = f"is not given, and there are {' and '.join(map(str, files))}"
            problems.add("--annotations", problem, "Say which by --annotations.")
            return
        whose = f"of the split {self.split!r} " if self.split else ""
        places = locate.looked_at(self.image_dir, self.split)
        problems.add(
            "--annotations",
            f"is not given, and no file {whose}was found; looked at {places}",
            'Expected is a JSON list or JSON lines of samples, {"image": "a.jpg", "text": ".."} or '
            '{"image": "a.jpg", "question": "..", "answer": ".."}; give it by --annotations FILE.',
        )

    def _check_output(self, output: Path, problems: ValidationReport) -> None:
        """Note a result that cannot go where it should, or would take the place of something."""
        flag = f"--output {output}"
        if output.is_dir():
            way = f"Give a file in it: --output {output / 'negatives.json'}"
            problems.add(flag, "is a directory, not a file", way)
            return
        if "output" not in self.model_fields_set and output.exists():
            way = f"Give --output {output} to replace it, or another name."
            problems.add(flag, "is there already, and --output is not given", way)
        if self.annotations is not None:
            samples = self.annotations.resolve()
            if samples in (output.resolve(), self.report.resolve()):
                problems.add(flag, "would overwrite the annotations")
        above = next(folder for folder in output.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            problem = f"cannot be written: {above} is no directory that this user may write into"
            problems.add(flag, problem, "Give a file elsewhere by --output.")
