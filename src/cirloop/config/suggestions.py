"""What a user may have meant: settings, types and flags with names like the one that is not
known."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import get_args

from pydantic import BaseModel

OTHER_NAMES = {
    **dict.fromkeys(("qure", "two_cliffs"), "band"),
    **dict.fromkeys(("recall", "hard", "hardest", "topk", "knn"), "top_k"),
    **dict.fromkeys(("contrastive", "infonce", "softmax"), "info_nce"),
    **dict.fromkeys(("hinge", "margin_loss"), "triplet"),
    **dict.fromkeys(("own", "custom", "json", "csv"), "jsonl"),
    **dict.fromkeys(("hf", "datasets"), "huggingface"),
    **dict.fromkeys(("clip", "clip4cir"), "clip_combiner"),
}
"""What else the types of settings are called."""
OTHER_FLAGS = {
    **dict.fromkeys(("--lr", "--learning-rate"), "--learning_rate"),
    **dict.fromkeys(("--bs", "--batch"), "--batch_size"),
    **dict.fromkeys(("--epochs", "--iterations", "--rounds"), "--num_iterations"),
    **dict.fromkeys(("--patience", "--early_stopping_patience"), "--early_stopping"),
    **dict.fromkeys(("--k", "--top_k"), "--hard_negative_k"),
    **dict.fromkeys(("--data", "--dataset"), "--dataset_name"),
    **dict.fromkeys(("--model", "--backbone"), "--model_backbone"),
    **dict.fromkeys(("--strategy", "--mining"), "--negative_strategy"),
    **dict.fromkeys(("--resume",), "--auto_resume"),
    **dict.fromkeys(("--output_dir", "--out"), "--experiment_dir"),
    **dict.fromkeys(("--wandb", "--tensorboard", "--mlflow", "--tracker"), "--report_to"),
}
"""What else the flags are called, elsewhere."""


def types_like(name: str, expected: Iterable[str]) -> list[str]:
    """Return the types that an unknown name may mean."""
    types = list(expected)
    word = name.lower().replace("-", "_")
    if OTHER_NAMES.get(word) in types:
        return [OTHER_NAMES[word]]
    return difflib.get_close_matches(word, types, n=2)


def flags_like(words: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the flags that unknown words may mean."""
    near: set[str] = set()
    for word in words:
        other = OTHER_FLAGS.get(word, "")
        near |= {other} if other in known else {*difflib.get_close_matches(word, known, n=2)}
    return sorted(near)


def settings_like(where: str, model: type[BaseModel]) -> list[str]:
    """Return at most two settings of `model` with a name like the last part of `where`, its group's
    first."""
    group, _, name = where.rpartition(".")
    names = _names(model) - {where}
    like = difflib.get_close_matches(name, {n.rpartition(".")[2] for n in names})
    near = [n for n in names if n.rpartition(".")[2] in like]
    near.sort(key=lambda n: (n.rpartition(".")[0] != group, like.index(n.rpartition(".")[2]), n))
    return near[:2]


def _names(model: type[BaseModel]) -> set[str]:
    """Return every setting, dotted; in a union, with the type between as pydantic names it."""
    names: set[str] = set()

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            names.add(prefix + name)
            kinds = get_args(field.annotation) if field.discriminator else (field.annotation,)
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    tag = f"{kind.model_fields['type'].default}." if field.discriminator else ""
                    walk(kind, f"{prefix}{name}.{tag}")

    walk(model, "")
    return names
