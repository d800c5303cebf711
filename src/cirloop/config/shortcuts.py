"""Short flags of settings, flags that choose the type of a group, and settings that are paths."""

UNION_FLAGS = {
    "data": "dataset_name",
    "mining.strategy": "negative_strategy",
    "model": "model_backbone",
    "foundation": "foundation_model_backbone",
    "training.loss": "loss",
}
"""Groups of settings that a flag may give another type, and the flag."""
SHORT_FLAGS = (
    "data.allow_missing_images",
    "data.allow_symlinks",
    "data.categories",
    "mining.strategy.n_def",
    "training.batch_size",
    "training.learning_rate",
    "training.max_skipped_batches",
    "evaluation.early_stopping",
    "runtime.num_processes",
    "runtime.accelerate_config",
    "runtime.deepspeed",
    "runtime.profile",
    "runtime.compare_with",
    "runtime.report_to",
)
"""Settings whose last word alone is a flag too."""
SHORTCUTS = {
    **{name: name.rpartition(".")[2] for name in SHORT_FLAGS},
    "model.type": "model_backbone",
    "model.path": "model_path",
    "foundation.type": "foundation_model_backbone",
    "foundation.path": "foundation_model_path",
    "data.type": "dataset_name",
    "mining.strategy.type": "negative_strategy",
    "mining.strategy.negatives_per_query": "hard_negative_k",
    "training.loss.type": "loss",
}
"""Setting -> its short flag."""
PATH_SETTINGS = (
    ("", ("data_dir", "train_dir")),
    ("runtime", ("cache_dir", "answers_dir", "compare_with", "accelerate_config", "deepspeed")),
)
"""Settings that are paths and decide no result."""
