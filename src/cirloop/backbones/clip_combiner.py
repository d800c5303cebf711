"""CLIP with a combiner of image and text (CLIP4Cir: Baldrati et al., ACM TOMM 2023, arXiv
2308.11485), by open_clip.

Gallery image = CLIP's image feature; query = the combiner's vector of the reference's feature and
the text's; both of unit norm. With CLIP frozen, `encode_images` gives the image features, kept on
disk: the feature (1, D), and before `attention_fusion` the patches' tokens after it (1 + T, D).
With `train_clip` it gives the resized pixels (H W, 3) in bytes, and the tower runs inside `module`.
CLIP stays in eval mode also while it is trained, as CLIP4Cir trains it: the batch norms of its
ResNets keep their statistics, and an embedding never depends on the batch it is in.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transform import image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import nn
from torchvision.transforms import Compose, Normalize

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.adapter import Adapted
from cirloop.backbones.base import Grid, Item, Tuning, VisionInput, each_once
from cirloop.backbones.clip_source import Source, find_source
from cirloop.backbones.combiners import Encoded, combiner
from cirloop.backbones.target_pad import target_pad
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.backbones.config import ClipCombinerSettings

logger = logging.getLogger(__name__)


class Embedder(nn.Module):
    """The trained module: tensors in, unit-norm embeddings (B, D) out. Suffixes: B batch, T tokens,
    D embedding."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: Any, combiner: Any, source: Source, pixels_in: bool) -> None:
        super().__init__()
        self.clip, self.combiner, self.pixels_in = clip, combiner, pixels_in
        self.register_buffer("mean", torch.tensor(source.preprocess.mean), persistent=False)
        self.register_buffer("std", torch.tensor(source.preprocess.std), persistent=False)

    def train(self, mode: bool = True) -> Embedder:
        super().train(mode)
        self.clip.eval()
        return self

    def see(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Image features (B, 1 + T, D) of pixels (B, H, W, 3) in bytes: the global one first, T = 0
        if it is enough."""
        images = ((pixels_BHWC.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        visual, images = self.clip.visual, images.to(next(self.clip.parameters()).dtype)
        if not self.combiner.needs_tokens:
            return self.clip.encode_image(images).unsqueeze(1)  # type: ignore[no-any-return]
        if isinstance(visual, VisionTransformer):
            made = visual.forward_intermediates(
                images, indices=1, normalize_intermediates=True, output_fmt="NLC"
            )
            tokens = made["image_intermediates"][-1] @ visual.proj
        else:  # a token is what the attention pool makes of it alone (MaskCLIP, arXiv 2112.01071)
            made, pool = visual.forward_intermediates(images, indices=1), visual.attnpool
            places = (
                made["image_intermediates"][-1].flatten(2).transpose(1, 2)
                + pool.positional_embedding[1:]
            )
            tokens = pool.c_proj(pool.v_proj(places))
        return torch.cat([made["image_features"].unsqueeze(1), tokens], dim=1)

    def read(self, ids_BT: torch.Tensor) -> Encoded:
        """Text features (B, D), float32, and for a combiner that needs them the tokens', in the
        same space."""
        if not self.combiner.needs_tokens:
            return Encoded(self.clip.encode_text(ids_BT).float())
        made = self.clip.forward_intermediates(
            text=ids_BT, text_indices=1, normalize_intermediates=True, normalize=False
        )
        tokens = made["text_intermediates"][-1] @ self.clip.text_projection
        mask = torch.arange(ids_BT.shape[1], device=ids_BT.device) <= ids_BT.argmax(1, keepdim=True)
        return Encoded(made["text_features"].float(), tokens.float(), mask)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`images` alone: gallery images; `text` alone: texts; both: queries."""
        if "images" not in inputs:
            return F.normalize(self.read(inputs["text"]).pooled, dim=-1)
        images = (self.see(inputs["images"]) if self.pixels_in else inputs["images"]).float()
        seen = images[inputs["image_of"]]
        if "text" not in inputs:
            return F.normalize(seen[:, 0], dim=-1)
        return F.normalize(
            self.combiner(Encoded(seen[:, 0], seen), self.read(inputs["text"])), dim=-1
        )


class ClipCombiner(Adapted):
    """The CLIP4Cir family as an embedder. Trained weights are `combiner...`, and with `train_clip`
    also `clip...`."""

    default_tune = "full"

    def __init__(self, settings: ClipCombinerSettings, adapter: Path | None = None) -> None:
        self.settings, seed = settings, settings.random_seed
        self.source = find_source(settings.clip, settings.path)
        self.base_digest, self.base_path = (
            self.source.digest(seed),
            f"{settings.clip} {settings.path}",
        )
        clip = self.source.build(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            combining = combiner(
                settings.combiner,
                self.source.model["embed_dim"],
                settings.combiner_width,
                settings.dropout,
            )
        if combining.needs_tokens:
            _check_tokens(clip, settings.clip)
        self.module = Embedder(
            clip, combining.requires_grad_(False), self.source, settings.train_clip
        ).eval()
        self.module.to("cuda" if torch.cuda.is_available() else "cpu")
        self.core = self.module
        self.parts = ("combiner",) * (settings.combiner != "sum") + ("clip",) * settings.train_clip
        self.resize = _bytes_transform(self.source)
        self.tokenizer, self._cut_told = _tokenizer(self.source), False
        if adapter is not None:
            self.load_adapter(adapter)
        self.module.clip.to(
            getattr(torch, settings.dtype)
        )  # after the adapter, whose weights are float32

    @property
    def device(self) -> torch.device:
        return self.module.mean.device

    @property
    def fingerprint(self) -> str:
        decisive = self.settings.model_dump(mode="json", exclude={"path", "clip"})
        return fingerprint([self.base_digest, self.adapter_digest, decisive])

    @cached_property
    def vision_key(self) -> str:
        pixels = [asdict(self.source.preprocess), self.settings.pad_ratio]
        if self.settings.train_clip:
            return fingerprint(["pixels", pixels])
        tower = hashlib.sha256()
        for name, weight in sorted(self.module.clip.visual.state_dict().items()):
            tower.update(
                name.encode()
                + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        kind = [
            self.source.model["vision_cfg"],
            bool(self.source.model.get("quick_gelu")),
            self.settings.dtype,
        ]
        return fingerprint([tower.hexdigest(), kind, self.module.combiner.needs_tokens, pixels])

    def vision_is_frozen(self) -> bool:
        """Pixels stay the same; features do while no weight of the image tower is trained."""
        return self.settings.train_clip or not any(
            p.requires_grad for p in self.module.clip.visual.parameters()
        )

    def prepare_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Resized pixels (B, height, width, 3) in bytes."""
        pixels = [
            np.asarray(self.resize(target_pad(image, self.settings.pad_ratio)), dtype=np.uint8)
            for image in images
        ]
        return torch.from_numpy(np.stack(pixels))

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image], prepared: torch.Tensor | None = None
    ) -> list[VisionInput]:
        assert self.vision_is_frozen(), "the image tower is trained: its output may not be kept"
        pixels_BHWC = self.prepare_images(images) if prepared is None else prepared
        if self.settings.train_clip:
            height, width = pixels_BHWC.shape[1:3]
            return [VisionInput(each.flatten(0, 1), (1, height, width)) for each in pixels_BHWC]
        seen = self.module.see(pixels_BHWC.to(self.device)).cpu()
        return [VisionInput(each.clone(), (1, 1, len(each))) for each in seen]

    def inputs(
        self, items: Sequence[Item], vision: Sequence[VisionInput]
    ) -> dict[str, torch.Tensor]:
        """Each image once, `image_of` per item its place among them: what is trained of CLIP sees
        it once a call."""
        images, image_of = each_once([Item(item.image) for item in items])
        tokens = {item.image: each.tokens for item, each in zip(items, vision, strict=True)}
        seen = torch.stack([tokens[each.image] for each in images]).to(self.device)
        made = {
            "images": seen.unflatten(1, vision[0].grid[1:]) if self.settings.train_clip else seen
        }
        made["image_of"] = torch.tensor(image_of, device=self.device)
        texts = [item.text for item in items if item.text is not None]
        assert len(texts) in (0, len(items)), "queries and gallery images in one call"
        return made | (self.text_inputs(texts) if texts else {})

    def text_inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Texts alone. What is longer than CLIP's context is cut by its tokenizer, and the first
        such text is named."""
        ids, size = self.tokenizer(list(texts)), self.tokenizer.context_length
        for row in (ids[:, -1] != 0).nonzero()[:, 0].tolist() if not self._cut_told else ():
            tokens = len(self.tokenizer.encode(texts[row])) + 2
            if tokens > size:
                logger.warning(
                    "texts of more than %d tokens are cut; the first has %d: %r",
                    size,
                    tokens,
                    texts[row],
                )
                self._cut_told = True
                break
        return {"text": ids.to(self.device)}

    def length(self, item: Item, grid: Grid) -> int:
        """All images have one size and all texts CLIP's context: there is nothing to sort by."""
        return 0 if item.text is None else int(self.tokenizer.context_length)

    def make_trainable(self, tuning: Tuning, seed: int) -> None:
        """Free the combiner, and with `train_clip` CLIP; raises UserError for a LoRA, and where
        nothing is left."""
        self.settings.check_training(tuning)
        parts = tuning.trainable_patterns or self.trained_parts or self.parts
        freed = re.compile("|".join(f"(?:{part})" for part in parts))
        names = [name for name, _ in self.core.named_parameters() if freed.match(name)]
        if not self.settings.train_clip and any(name.startswith("clip.visual.") for name in names):
            raise UserError(
                f"training.trainable_patterns {', '.join(parts)} would train CLIP's image tower,"
                " whose features are kept on disk. Set model.train_clip, or name other parts."
            )
        if self.settings.dtype != "float32" and any(name.startswith("clip.") for name in names):
            raise UserError(
                f"model.dtype {self.settings.dtype}: CLIP is trained in float32 only; set it to"
                " float32."
            )
        super().make_trainable(tuning, seed)

    def probe(self) -> torch.Tensor:
        size = self.source.preprocess.size
        height, width = (size, size) if isinstance(size, int) else size
        ramp = (
            torch.arange(height * width * 3, device=self.device).reshape(1, height, width, 3) % 251
        )
        images = (
            ramp.to(torch.uint8)
            if self.settings.train_clip
            else self.module.see(ramp.to(torch.uint8))
        )
        image_of = torch.zeros(1, dtype=torch.long, device=self.device)
        text = self.text_inputs(["is red and has long sleeves"])
        out: torch.Tensor = self.module({"images": images, "image_of": image_of, **text})
        return out


def _bytes_transform(source: Source) -> Compose:
    """open_clip's transform for inference up to its RGB image; `Embedder.see` does the rest of
    it."""
    steps = image_transform_v2(source.preprocess, is_train=False).transforms
    assert isinstance(steps[-1], Normalize) and len(steps) > 2
    return Compose(steps[:-2])


def _tokenizer(source: Source) -> Any:
    """CLIP's tokenizer, to which a text that holds its start or end sign is words like any
    other."""
    text = source.model["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(
        context_length=text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})
    )
    clean = tokenizer.clean_fn
    tokenizer.clean_fn = lambda text: re.sub(
        "<(?=(start|end)_of_text>)", "< ", clean(text), flags=re.IGNORECASE
    )
    return tokenizer


def _check_tokens(clip: Any, name: str) -> None:
    visual, projection = clip.visual, getattr(clip, "text_projection", None)
    vit = (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and not visual.final_ln_after_pool
    )
    if not (vit or isinstance(visual, ModifiedResNet)) or not isinstance(projection, nn.Parameter):
        raise UserError(
            "model.combiner `attention_fusion` needs the tokens of CLIP's own ViT or ResNet, which"
            f" {name} does not have. Choose `combiner` or `sum`, or an architecture such as RN50x4"
            " or ViT-L-14."
        )
