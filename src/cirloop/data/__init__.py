"""Files or generators -> triplets, galleries, relevance and pixels. The union is the registry."""

from cirloop.data.config import DataConfig, ShapesSettings
from cirloop.data.dataset import Dataset

__all__ = ["DataConfig", "Dataset", "ShapesSettings"]
