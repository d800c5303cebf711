"""Files or generators -> triplets, galleries, relevance and pixels. The union is the registry."""

from cirloop.data.config import DataConfig
from cirloop.data.dataset import Dataset
from cirloop.data.paths import DataPaths
from cirloop.data.shapes.load import ShapesSettings

__all__ = ["DataConfig", "DataPaths", "Dataset", "ShapesSettings"]
