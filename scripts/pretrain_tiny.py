"""Make `tiny`, the embedded base model, from nothing: real Qwen2-VL classes, pre-trained on
`shapes`' pretrain split.

Five stages. See: the vision tower alone learns, per cell, colour, shape, size and place (a linear
head, thrown away), as the towers of large models come pre-trained. Align: the language model learns
to say what single pictures show. Compare: it learns to say, cell by cell, where two pictures
differ; a second head, thrown away too, asks its middle layers what each cell held before and what
became of it. Rewrite: it learns to word the change. Then, the tower frozen, all of this with two
more tasks in every step, losses summed: retrieve (composed query -> target among all members of the
families, pretrain style and plain phrasing only; a third head, thrown away too, reads each cell
back from the embedding) and verify (is this text the change? yes/no). All but retrieve see pictures
over the whole range of looks and both phrasings, as a foundation model has seen pictures and texts
of many kinds; the retrieval embedding has not, which leaves fine-tuning something to learn. A fifth
of the pairs to reword show the same or have little in common, and the answer is "none". No scene of
train, val or test is drawn.

    python scripts/pretrain_tiny.py --bf16 --output src/cirloop/tiny
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from cirloop.captioning.prompts import REWRITE, VERIFY
from cirloop.data.shapes.draw import PRETRAIN, WIDE, draw
from cirloop.data.shapes.language import (
    CASUAL,
    CASUAL_WORDS,
    PLAIN,
    PLAIN_WORDS,
    Words,
    phrase_changes,
    read,
    write,
)
from cirloop.data.shapes.scene import (
    COLORS,
    NUM_CELLS,
    SHAPES,
    SIZES,
    Change,
    Object,
    Scene,
    SeededRandom,
    another_value,
    differences,
    put,
    random_object,
    random_scene,
    results,
)
from cirloop.data.shapes.splits import LOOSE_PERCENT, build_splits, family, split_scenes
from cirloop.reproducibility import prepare_process

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QUERY = IMAGE + "\nGiven an image, find a similar everyday image with the described changes: {text}"
DOCUMENT = IMAGE + "\nRepresent the given image."
SPECIAL = [
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
    ),
    *("<|image_pad|>", "<|video_pad|>"),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    + IMAGE
    + "{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def float_attention(module, query, key, value, attention_mask, **kwargs):
    """SDPA in float32: its bfloat16 backward is slow on CPU, while bfloat16 matrix products are
    fast."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )


AttentionInterface.register("float_sdpa", float_attention)
AttentionMaskInterface.register("float_sdpa", sdpa_mask)
PAD, IM_END = "<|endoftext|>", "<|im_end|>"


def name_of(words: Words, thing: Object) -> str:
    return f"{words.sizes[thing.size == 'large']} {thing.color} {thing.shape}"


def describe(words: Words, scene: Scene) -> str:
    parts = [
        f"{words.cells[cell]}: {name_of(words, thing)}"
        for cell, thing in enumerate(scene)
        if thing is not None
    ]
    return ". ".join(parts)


def chat(content: list[dict[str, str]] | str) -> str:
    body = (
        content
        if isinstance(content, str)
        else "".join(IMAGE if c["type"] == "image" else c["text"] for c in content)
    )
    return f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"


class Samples:
    """An endless, seeded stream of pre-training samples."""

    def __init__(self, seed: int) -> None:
        self.draws = SeededRandom("pretrain", seed)
        self.taken = split_scenes()
        self.num = 0

    def _picture(self, scene: Scene, look) -> np.ndarray:
        self.num += 1
        return draw(scene, look, "pretrain", self.num)

    def _pair(self, members, max_changes: int):
        while True:
            a, b = self.draws.choice(members), self.draws.choice(members)
            changes = differences(a, b)
            if 1 <= len(changes) <= max_changes:
                return a, b, tuple(self.draws.shuffled(changes))

    @staticmethod
    def _by_cell(changes):
        return tuple(
            sorted(changes, key=lambda c: c.cell if c.selector is None else c.selector.cell)
        )

    def retrieve(self, families: int, per_family: int):
        """Queries (text, reference pixels, place of the target, results), and candidates (scene,
        pixels): all members of the families."""
        queries, candidates = [], []
        for _ in range(families):
            members = family(self.draws, self.taken)
            start = len(candidates)
            candidates += [(scene, self._picture(scene, PRETRAIN)) for scene in members]
            for _ in range(per_family):
                a, b, changes = self._pair(members, 2)
                said = phrase_changes(self.draws, a, changes, LOOSE_PERCENT)
                text = QUERY.format(text=write(self.draws, said, PLAIN))
                queries.append(
                    (text, self._picture(a, PRETRAIN), start + members.index(b), results(a, said))
                )
        return queries, candidates

    def crowd(self) -> Scene:
        """A scene of four to eight objects; no other split has so many."""
        scene: Scene = (None,) * NUM_CELLS
        for cell in self.draws.shuffled(tuple(range(NUM_CELLS)))[: self.draws.between(4, 8)]:
            scene = put(scene, cell, random_object(self.draws))
        return scene if scene not in self.taken else self.crowd()

    def _beyond_words(self, members) -> tuple[Scene, Scene]:
        """A pair of the same scene, or of two with more than three changes between them."""
        a = self.draws.choice(members)
        if self.draws.chance(40):
            return a, a
        while True:
            b = self.draws.choice(family(self.draws, self.taken))
            if len(differences(a, b)) > 3:
                return a, b

    def _nearly(self, scene: Scene, changes: tuple[Change, ...]) -> tuple[Change, ...]:
        """The changes with one of them to another value or place, where it has one."""
        at = self.draws.below(len(changes))
        wrong = another_value(self.draws, changes[at], scene)
        if changes[at].kind == "add" and self.draws.chance(60):
            cells = [c for c in range(NUM_CELLS) if scene[c] is None and c != changes[at].cell]
            wrong = replace(changes[at], cell=self.draws.choice(cells)) if cells else None
        return (*changes[:at], wrong or changes[at], *changes[at + 1 :])

    def rewrites(self, num: int):
        """(prompt, text of the change or "none", [before, after], scenes)"""
        out = []
        while len(out) < num:
            members = family(self.draws, self.taken)
            for _ in range(min(3, num - len(out))):
                if self.draws.chance(20):
                    a, b = self._beyond_words(members)
                    example = write(
                        self.draws,
                        phrase_changes(self.draws, a, self._other(members, a), LOOSE_PERCENT),
                        CASUAL,
                    )
                    pictures = [self._picture(a, WIDE), self._picture(b, WIDE)]
                    out.append(
                        (chat(REWRITE.messages(example)[0]["content"]), "none", pictures, (a, b))
                    )
                    continue
                phrasing = self.draws.choice(
                    (PLAIN, CASUAL, CASUAL)
                )  # the answer speaks as the example does
                a, b, changes = self._pair(members, self.draws.choice((1, 3)))
                example = write(
                    self.draws,
                    phrase_changes(self.draws, a, self._other(members, a), LOOSE_PERCENT),
                    phrasing,
                )
                text = write(
                    self.draws, phrase_changes(self.draws, a, self._by_cell(changes), 0), phrasing
                )
                pictures = [self._picture(a, WIDE), self._picture(b, WIDE)]
                out.append((chat(REWRITE.messages(example)[0]["content"]), text, pictures, (a, b)))
        return out

    def verifications(self, num: int):
        """(prompt, yes or no, [before, after], scenes)"""
        out = []
        while len(out) < num:
            members = family(self.draws, self.taken)
            for _ in range(min(3, num - len(out))):
                a, b, changes = self._pair(members, 3)
                claimed, roll = changes, self.draws.below(100)
                if roll < 15:
                    a, b = self._beyond_words(members)
                    apart = self.draws.shuffled(differences(a, b))
                    claimed = tuple(apart[: self.draws.between(1, 3)]) or self._other(members, a)
                elif roll < 30:
                    claimed = self._other(members, a)  # another member's change
                elif roll < 42 and len(changes) > 1:
                    claimed = changes[:-1]
                elif roll < 60:
                    claimed = self._nearly(a, changes)
                said = phrase_changes(self.draws, a, claimed, 10)
                text = write(self.draws, said, self.draws.choice((PLAIN, CASUAL)))
                pictures = [self._picture(a, WIDE), self._picture(b, WIDE)]
                answer = "yes" if b in results(a, said) else "no"
                out.append((chat(VERIFY.messages(text)[0]["content"]), answer, pictures, (a, b)))
        return out

    def single(self, num: int):
        """(prompt, answer, [picture]): what one picture shows, or what is at one of its places."""
        out = []
        while len(out) < num:
            scene = random_scene(self.draws)
            if self.draws.chance(35):
                scene = put(
                    (None,) * NUM_CELLS, self.draws.below(NUM_CELLS), random_object(self.draws)
                )
            if scene in self.taken:
                continue
            words = self.draws.choice((PLAIN_WORDS, CASUAL_WORDS))
            picture = [self._picture(scene, WIDE)]
            if self.draws.chance(50):
                out.append(
                    (
                        chat(IMAGE + "Describe the picture."),
                        describe(words, scene),
                        picture,
                        (scene,),
                    )
                )
                continue
            full = [cell for cell, thing in enumerate(scene) if thing is not None]
            cell = self.draws.choice(full) if self.draws.chance(70) else self.draws.below(NUM_CELLS)
            thing = scene[cell]
            answer = name_of(words, thing) if thing else "nothing"
            out.append(
                (
                    chat(IMAGE + f"What is {words.at} the {words.cells[cell]}?"),
                    answer,
                    picture,
                    (scene,),
                )
            )
        return out

    def compare(self, num: int):
        """(prompt, answer, [before, after]): cell by cell what differs, or what is at a place of
        one of the two."""
        out = []
        while len(out) < num:
            members = family(self.draws, self.taken)
            for _ in range(min(4, num - len(out))):
                a, b, _ = self._pair(members, 3)
                words = self.draws.choice((PLAIN_WORDS, CASUAL_WORDS))
                pictures = [self._picture(a, WIDE), self._picture(b, WIDE)]

                def said(thing: Object | None, words: Words = words) -> str:
                    return name_of(words, thing) if thing else "nothing"

                both = [
                    (words.cells[i], said(x), said(y))
                    for i, (x, y) in enumerate(zip(a, b, strict=True))
                    if x != y
                ]
                question = "What differs?"
                answer = ". ".join(f"{cell}: {x} to {y}" for cell, x, y in both)
                if self.draws.chance(30):
                    which, cell = self.draws.below(2), self.draws.below(NUM_CELLS)
                    question = f"What is {words.at} the {words.cells[cell]} in picture {which + 1}?"
                    answer = said((a, b)[which][cell])
                out.append(
                    (
                        chat(f"Picture 1: {IMAGE}Picture 2: {IMAGE}{question}"),
                        answer,
                        pictures,
                        (a, b),
                    )
                )
        return out

    def _other(self, members, a):
        while True:
            changes = differences(a, self.draws.choice(members))
            if 1 <= len(changes) <= 3:
                return tuple(self.draws.shuffled(changes))


def make_tokenizer(vocab: int) -> Qwen2Tokenizer:
    samples = Samples(seed=7)
    lines = []
    for _ in range(150):
        lines += [q for q, *_ in samples.retrieve(1, 2)[0]]
        for prompt, answer, *_ in (
            samples.rewrites(3) + samples.verifications(3) + samples.single(3) + samples.compare(3)
        ):
            lines += [prompt, answer]
    for words in (PLAIN_WORDS, CASUAL_WORDS):
        lines += [*words.cells, *words.sizes] * 50
    for token in SPECIAL:
        lines = [line.replace(token, " ") for line in lines]
    bpe = Tokenizer(models.BPE())
    pattern = (  # Qwen2's
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab - len(SPECIAL),
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token=None,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=SPECIAL,
        model_max_length=1024,
    )
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    vocab = -(-len(tokenizer) // 64) * 64
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5.0,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": ids[PAD],
            "eos_token_id": ids[IM_END],
            "pad_token_id": ids[PAD],
        },
        vision_config={
            "depth": 3,
            "embed_dim": 128,
            "num_heads": 4,
            "hidden_size": 256,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.update(
        bos_token_id=ids[PAD], eos_token_id=[ids[IM_END], ids[PAD]], pad_token_id=ids[PAD]
    )
    return model


class Batches:
    """Texts and pictures to tensors. All pictures are 84x84, so a picture is always 36 patches and
    9 tokens."""

    def __init__(self, tokenizer, model) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=84 * 84)
        self.mean = torch.tensor(self.processor.image_mean).view(3, 1, 1) * 255
        self.std = torch.tensor(self.processor.image_std).view(3, 1, 1) * 255

    def patches(self, pictures: list[np.ndarray]) -> torch.Tensor:
        """The image processor's `pixel_values` for 84x84 pictures, (N*36, 1176); asserted equal to
        it at start."""
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
        x = (x - self.mean) / self.std
        x = x.unsqueeze(1).expand(-1, 2, -1, -1, -1)  # two equal frames
        x = x.reshape(-1, 1, 2, 3, 3, 2, 14, 3, 2, 14)  # n, t, frame, channel, hb, hm, p, wb, wm, p
        x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
        return x.reshape(-1, 1176)

    def tokens(self, texts: list[str]):
        texts = [t.replace("<|image_pad|>", "<|image_pad|>" * 9) for t in texts]
        batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def positions(self, ids: torch.Tensor, images_per_row: list[int]) -> torch.Tensor:
        """M-RoPE positions (3, B, T) for right-padded rows of 9-token pictures, vectorised."""
        image = ids == self.model.config.image_token_id
        start = image & ~F.pad(image, (1, 0))[:, :-1]
        number = start.cumsum(1)
        step = torch.where(image, torch.zeros_like(ids), torch.ones_like(ids))
        # a picture advances the text position by 3 (its larger side), on its first token for those
        # after it
        base = step.cumsum(1) + 3 * number - 1
        within = (image.long().cumsum(1) - 1) % 9
        origin = torch.where(image, base - 3 + 1, base)
        t = torch.where(image, origin, base)
        h = torch.where(image, origin + within // 3, base)
        w = torch.where(image, origin + within % 3, base)
        return torch.stack([t, h, w])

    def vision(self, pictures: list[np.ndarray]) -> torch.Tensor:
        """The vision tower over equal-sized pictures at once (N*9, D); the same weights and
        arithmetic, batched."""
        tower, n = self.model.model.visual, len(pictures)
        x = F.linear(self.patches(pictures), tower.patch_embed.proj.weight.flatten(1))
        cos, sin = self._rotary(tower)
        for block in tower.blocks:
            attn = block.attn
            q, k, v = attn.qkv(block.norm1(x)).reshape(n * 36, 3, attn.num_heads, -1).unbind(1)
            q, k = apply_rotary_pos_emb_vision(q, k, cos.repeat(n, 1), sin.repeat(n, 1))
            q, k, v = (y.reshape(n, 36, attn.num_heads, -1).transpose(1, 2) for y in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * 36, -1)
            x = x + attn.proj(y)
            x = x + block.mlp(block.norm2(x))
        return tower.merger(x)

    def _rotary(self, tower):
        if not hasattr(self, "_cos_sin"):
            from transformers.models.qwen2_vl.modeling_qwen2_vl import get_vision_position_ids

            grid = torch.tensor([[1, 6, 6]])
            with torch.no_grad():
                self._cos_sin = tower.rotary_pos_emb(
                    torch.zeros(1), get_vision_position_ids(grid, 2)
                )
        return self._cos_sin

    def hidden(
        self, texts: list[str], pictures: list[np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Last hidden states (B, T, D), ids and mask."""
        ids, mask = self.tokens(texts)
        embeds = self.model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(
            (ids == self.model.config.image_token_id).unsqueeze(-1), self.vision(pictures)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            out = self.model.model.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=self.positions(ids, []),
                use_cache=False,
            )
        return out.last_hidden_state.float(), ids, mask

    bf16 = False

    def watch(self) -> None:
        """From now on `middle` holds what the language model's second and third layers gave last,
        (B, T, D) each."""
        self.middle: list[torch.Tensor] = [torch.empty(0)] * 2
        for i in range(2):

            def keep(_module, _args, output, i: int = i) -> None:
                self.middle[i] = output[0] if isinstance(output, tuple) else output

            self.model.model.language_model.layers[i + 1].register_forward_hook(keep)

    def last(self, texts, pictures) -> torch.Tensor:
        """Last token's hidden states (B, D)."""
        hidden, _, mask = self.hidden(texts, pictures)
        return hidden[torch.arange(len(texts)), mask.sum(1) - 1]

    def embed(self, texts, pictures) -> torch.Tensor:
        return F.normalize(self.last(texts, pictures), dim=-1)


def assert_same_as_library(batches: Batches) -> None:
    """The vectorised paths above give what the library's own calls give."""
    samples = Samples(seed=99)
    rows = samples.rewrites(2) + samples.single(2)
    texts = [row[0] + row[1] for row in rows]
    pictures = [x for row in rows for x in row[2]]
    batches.model.eval()
    with torch.no_grad():
        ours, ids, mask = batches.hidden(texts, pictures)
        got = batches.processor(
            images=[torch.from_numpy(p).permute(2, 0, 1) for p in pictures], return_tensors="pt"
        )
        assert torch.allclose(got["pixel_values"], batches.patches(pictures), atol=1e-5), (
            "patches differ"
        )
        out = batches.model.model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=got["pixel_values"],
            image_grid_thw=got["image_grid_thw"],
            mm_token_type_ids=(ids == batches.model.config.image_token_id).int(),
            use_cache=False,
        )
    keep = mask.bool()
    gap = (out.last_hidden_state - ours)[keep].abs().max().item()
    assert gap < 1e-3, f"hidden states differ by {gap}"


def answer_loss(batches: Batches, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss per answer token of (prompt, answer, pictures, scenes), and the token ids."""
    texts = [prompt + answer + IM_END for prompt, answer, *_ in rows]
    hidden, ids, mask = batches.hidden(texts, [x for row in rows for x in row[2]])
    prompts, _ = batches.tokens([row[0] for row in rows])
    starts = (prompts != batches.model.config.text_config.pad_token_id).sum(1)
    place = torch.arange(ids.shape[1] - 1)[None]
    answer = (place >= starts[:, None] - 1) & mask[:, 1:].bool()
    return F.cross_entropy(batches.model.lm_head(hidden[:, :-1][answer]), ids[:, 1:][answer]), ids


def looks(things: list[Object | None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Colour (one more for nothing), shape and size as classes; -100, which the loss leaves out,
    where nothing is."""
    color = torch.tensor([COLORS.index(t.color) if t else len(COLORS) for t in things])
    shape = torch.tensor([SHAPES.index(t.shape) if t else -100 for t in things])
    size = torch.tensor([SIZES.index(t.size) if t else -100 for t in things])
    return color, shape, size


def looks_loss(logits: torch.Tensor, things: list[Object | None]) -> torch.Tensor:
    parts = logits.split([len(COLORS) + 1, len(SHAPES), len(SIZES)], dim=1)
    return sum(F.cross_entropy(x, y) for x, y in zip(parts, looks(things), strict=True))


NUM_LOOKS = len(COLORS) + 1 + len(SHAPES) + len(SIZES)


class Seeing(torch.nn.Module):
    """Colour, shape, size and place of each cell from its vision token; for the first stage, then
    thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(width, NUM_LOOKS + NUM_CELLS)

    def loss(self, batches: Batches, samples: Samples, num: int) -> torch.Tensor:
        scenes = [samples.crowd() for _ in range(num)]
        seen, place = self.head(
            batches.vision([samples._picture(scene, WIDE) for scene in scenes])
        ).split([NUM_LOOKS, NUM_CELLS], dim=1)
        return looks_loss(seen, [thing for scene in scenes for thing in scene]) + F.cross_entropy(
            place, torch.arange(NUM_CELLS).repeat(num)
        )


class Relating(torch.nn.Module):
    """What was in each cell of the second picture before, and what became of it, from the language
    model's middle layers; for training alone, then thrown away. Without it, pairs take the language
    model hours longer."""

    CHANGES = ("color", "shape", "size", "add", "remove", "away", "here")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = torch.nn.Linear(width, NUM_LOOKS)
        self.change = torch.nn.Linear(width, len(self.CHANGES))
        self.other = torch.nn.Linear(width, NUM_CELLS)

    def loss(self, batches: Batches, ids: torch.Tensor, pairs) -> torch.Tensor:
        second = (
            (ids == batches.model.config.image_token_id)
            .nonzero()[:, 1]
            .reshape(len(ids), 2, NUM_CELLS)[:, 1]
        )
        early, late = (
            x.float().gather(1, second[:, :, None].expand(-1, -1, x.shape[2])).flatten(0, 1)
            for x in batches.middle
        )
        labels = torch.zeros(len(ids), NUM_CELLS, len(self.CHANGES))
        other = torch.full((len(ids), NUM_CELLS), -100)
        for row, (a, b) in enumerate(pairs):
            for change in differences(a, b):
                if change.kind == "move":
                    away, here = change.selector.cell, change.cell
                    labels[row, away, 5] = labels[row, here, 6] = 1
                    other[row, away], other[row, here] = here, away
                else:
                    cell = change.cell if change.selector is None else change.selector.cell
                    labels[row, cell, self.CHANGES.index(change.kind)] = 1
        loss = looks_loss(self.before(early), [thing for a, _ in pairs for thing in a])
        loss = loss + 5 * F.binary_cross_entropy_with_logits(
            self.change(late), labels.flatten(0, 1)
        )
        if (other >= 0).any():
            loss = loss + 0.3 * F.cross_entropy(self.other(late), other.flatten())
        return loss


class Composing(torch.nn.Module):
    """Retrieval; beside it, each cell of the picture that an embedding stands for, from the
    embedding by a linear head thrown away in the end: the candidate's own, and of a query the cells
    that its text and its reference settle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(width, NUM_CELLS * NUM_LOOKS)

    def losses(self, batches: Batches, samples: Samples, args) -> dict[str, torch.Tensor]:
        queries, candidates = samples.retrieve(args.families, args.per_family)
        n = len(queries)
        texts = [q[0] for q in queries] + [DOCUMENT] * len(candidates)
        hidden = batches.last(texts, [q[1] for q in queries] + [pixels for _, pixels in candidates])
        vectors = F.normalize(hidden, dim=-1)
        scores = vectors[:n] @ vectors[n:].T / 0.05
        target = torch.tensor([q[2] for q in queries])
        right = torch.tensor(
            [
                [scene in q[3] and i != q[2] for i, (scene, _) in enumerate(candidates)]
                for q in queries
            ]
        )
        cells = self.head(hidden).unflatten(1, (NUM_CELLS, NUM_LOOKS))
        settled = torch.tensor(
            [[len({s[cell] for s in q[3]}) == 1 for cell in range(NUM_CELLS)] for q in queries]
        )
        asked = [thing for q in queries for thing in candidates[q[2]][0]]
        kept = settled.flatten().nonzero()[:, 0]
        own = looks_loss(
            cells[n:].flatten(0, 1), [thing for scene, _ in candidates for thing in scene]
        )
        return {
            "retrieve": F.cross_entropy(scores.masked_fill(right, -1e4), target),
            "own cells": own,
            "asked cells": looks_loss(
                cells[:n].flatten(0, 1)[kept], [asked[i] for i in kept.tolist()]
            ),
        }


def losses(
    batches: Batches,
    samples: Samples,
    seeing: Seeing,
    relating: Relating,
    composing: Composing,
    args,
    step: int,
) -> dict[str, torch.Tensor]:
    def say(rows) -> torch.Tensor:
        return answer_loss(batches, rows)[0]

    def relate(name: str, rows) -> dict[str, torch.Tensor]:
        loss, ids = answer_loss(batches, rows)
        return {name: loss, f"{name} relate": relating.loss(batches, ids, [row[3] for row in rows])}

    if step < args.see_steps:
        return {"see": seeing.loss(batches, samples, args.see)}
    step -= args.see_steps
    if step < args.align_steps:
        return {"describe": say(samples.single(args.align))}
    if step < args.align_steps + args.compare_steps:
        return {
            "describe": say(samples.single(args.align // 4)),
            **relate("compare", samples.compare(args.align // 2)),
        }
    batches.model.model.visual.requires_grad_(False)  # it sees well by now
    if step < args.align_steps + args.compare_steps + args.rewrite_steps:
        return {
            "describe": say(samples.single(args.describe)),
            **relate("compare", samples.compare(args.describe * 2)),
            **relate("rewrite", samples.rewrites(args.rewrite + args.verify // 2)),
        }
    return {
        "describe": say(samples.single(args.describe)),
        "compare": say(samples.compare(args.describe)),
        **composing.losses(batches, samples, args),
        "rewrite": say(samples.rewrites(args.rewrite)),
        "verify": say(samples.verifications(args.verify)),
    }


@torch.no_grad()
def evaluate(batches: Batches, num: int) -> dict[str, float]:
    """On val: R@1 and R@5 of `num` queries over 484 images; of 96 at most, truth of rewrites,
    accuracy of verifying."""
    batches.model.eval()
    val = build_splits()["val"]
    pictures = {row: val.pixels(row) for row in range(44 * 11)}
    queries = [query for query in val.queries if query.reference < len(pictures)][:num]
    rank = ranks_of_targets(batches, queries, pictures)
    pairs = pairs_to_rewrite(val.scenes, queries, min(96, num))
    shown = [pictures[row] for query, other in pairs for row in (query.reference, other)]
    texts = generate(
        batches, [chat(REWRITE.messages(query.text)[0]["content"]) for query, _ in pairs], shown
    )
    changes = [read(text) for text in texts]
    scenes = [(val.scenes[query.reference], val.scenes[other]) for query, other in pairs]
    true = [
        change is not None and after in results(before, change)
        for change, (before, after) in zip(changes, scenes, strict=True)
    ]
    accepted = verify(batches, texts, shown)
    of_accepted = [t for t, ok in zip(true, accepted, strict=True) if ok]
    of_one_change = [
        t for t, pair in zip(true, scenes, strict=True) if len(differences(*pair)) == 1
    ]
    batches.model.train()
    return {
        "R@1": (rank < 1).float().mean().item(),
        "R@5": (rank < 5).float().mean().item(),
        "true": sum(true) / len(true),
        "true, one change": sum(of_one_change) / max(1, len(of_one_change)),
        "readable": sum(change is not None for change in changes) / len(changes),
        "verified": len(of_accepted) / len(true),
        "true of verified": sum(of_accepted) / max(1, len(of_accepted)),
        "verify accuracy": sum(t == ok for t, ok in zip(true, accepted, strict=True)) / len(true),
        "example": texts[0] + " | " + pairs[0][0].text,
    }


def ranks_of_targets(batches: Batches, queries, pictures) -> torch.Tensor:
    """How many pictures, but the reference, each query finds better than its target."""
    rows = [*pictures]
    gallery = [
        batches.embed([DOCUMENT] * 44, [pictures[row] for row in rows[i : i + 44]])
        for i in range(0, len(rows), 44)
    ]
    vectors = [
        batches.embed(
            [QUERY.format(text=query.text) for query in queries[i : i + 50]],
            [pictures[query.reference] for query in queries[i : i + 50]],
        )
        for i in range(0, len(queries), 50)
    ]
    scores = torch.cat(vectors) @ torch.cat(gallery).T
    for i, query in enumerate(queries):
        scores[i, query.reference] = -2
    targets = torch.tensor([query.target for query in queries])
    return (scores > scores[torch.arange(len(queries)), targets][:, None]).sum(1)


def pairs_to_rewrite(scenes, queries, num: int):
    """`num` queries, each with a picture of its reference's family that differs by 1 to 3
    changes."""
    draws = SeededRandom("evaluate")
    pairs = []
    while len(pairs) < num:
        query = draws.choice(queries)
        other = query.reference // 11 * 11 + draws.below(11)
        if 1 <= len(differences(scenes[query.reference], scenes[other])) <= 3:
            pairs.append((query, other))
    return pairs


def verify(batches: Batches, texts: list[str], pictures) -> list[bool]:
    """Whether the model says yes to each text of two pictures."""
    yes, no = (batches.tokenizer.encode(word)[0] for word in ("yes", "no"))
    prompts = [chat(VERIFY.messages(text)[0]["content"]) for text in texts]
    hidden, _, mask = batches.hidden(prompts, pictures)
    logits = batches.model.lm_head(hidden[torch.arange(len(texts)), mask.sum(1) - 1])
    return (logits[:, yes] > logits[:, no]).tolist()


def generate(batches: Batches, prompts: list[str], pictures) -> list[str]:
    ids, mask = batches.tokens(prompts)
    flip = [
        torch.arange(ids.shape[1]).roll(int(ids.shape[1] - m.sum())) for m in mask
    ]  # right to left padding
    order = torch.stack(flip)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    out = batches.model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=batches.patches(pictures),
        image_grid_thw=torch.tensor([[1, 6, 6]]).repeat(len(pictures), 1),
        mm_token_type_ids=(ids == batches.model.config.image_token_id).int(),
        max_new_tokens=48,
        do_sample=False,
    )
    return batches.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def save(batches: Batches, output: Path) -> None:
    processor = Qwen2VLProcessor(
        image_processor=batches.processor,
        tokenizer=batches.tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(output)
    state = {k: v.to(torch.float16) for k, v in batches.model.state_dict().items()}
    copy = make_model(batches.tokenizer).to(torch.float16)
    copy.load_state_dict(state)
    copy.save_pretrained(output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--start_from",
        type=Path,
        help="go on from a model of this script, with new stages and rates",
    )
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--families", type=int, default=6)
    parser.add_argument("--per_family", type=int, default=6)
    parser.add_argument("--rewrite", type=int, default=28)
    parser.add_argument("--verify", type=int, default=20)
    parser.add_argument("--describe", type=int, default=6)
    parser.add_argument("--see", type=int, default=96, help="pictures per step of the first stage")
    parser.add_argument(
        "--see_steps", type=int, default=250, help="steps of the vision tower alone, first"
    )
    parser.add_argument(
        "--align", type=int, default=96, help="single pictures per step of the second stage"
    )
    parser.add_argument(
        "--align_steps", type=int, default=300, help="steps on single pictures alone, second"
    )
    parser.add_argument(
        "--compare_steps", type=int, default=1000, help="steps of comparing pictures, third"
    )
    parser.add_argument(
        "--rewrite_steps", type=int, default=800, help="steps of wording the change, fourth"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast the language model")
    parser.add_argument("--eval_every", type=int, default=300)
    parser.add_argument(
        "--eval_examples", type=int, default=200, help="queries of val that an evaluation asks"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    if args.start_from is not None:
        tokenizer = AutoProcessor.from_pretrained(
            args.start_from, trust_remote_code=False
        ).tokenizer
        model = Qwen2VLForConditionalGeneration.from_pretrained(
            args.start_from, dtype=torch.float32
        )
    else:
        tokenizer = make_tokenizer(768)
        model = make_model(tokenizer)
    batches = Batches(tokenizer, model)
    assert_same_as_library(batches)
    batches.bf16 = args.bf16
    model.model.language_model.set_attn_implementation("float_sdpa")
    model.train()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens",
        flush=True,
    )
    train(batches, args)


def train(batches: Batches, args) -> None:
    """All stages, one after another; the model is saved at every evaluation."""
    model = batches.model
    seeing, relating, composing = (
        head(model.config.text_config.hidden_size) for head in (Seeing, Relating, Composing)
    )
    batches.watch()
    trained = [p for part in (model, seeing, relating, composing) for p in part.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    samples = Samples(args.seed)
    start = time.time()
    log: list[dict[str, float]] = []
    for step in range(args.steps):
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts = losses(batches, samples, seeing, relating, composing, args, step)
        sum(parts.values()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.append({name: part.item() for name, part in parts.items()})
        if step % 50 == 49:
            means = {
                name: np.mean([row[name] for row in log[-50:] if name in row]) for name in parts
            }
            line = " ".join(f"{name} {value:.3f}" for name, value in means.items())
            print(f"{step + 1:5d} {time.time() - start:6.0f}s lr {rate:.1e}  {line}", flush=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            scores = evaluate(batches, args.eval_examples)
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in scores.items()}
            print(json.dumps(shown), flush=True)
            save(batches, args.output)


def learning_rate(step: int, args) -> float:
    """Up over 100 steps, level until 60% of the steps, then down to 2%."""
    fall = (args.steps - step) / (args.steps - 0.6 * args.steps)
    return args.learning_rate * min(1.0, (step + 1) / 100, max(0.02, fall))


if __name__ == "__main__":
    prepare_process()
    main()
