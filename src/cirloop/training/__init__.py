"""Training a LoRA contrastively on human and augmented triplets with mined negatives."""

from cirloop.training.config import TrainingSettings

__all__ = ["TrainingSettings"]
