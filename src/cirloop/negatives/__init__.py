"""Mining: scores of queries against a gallery -> wrong images to learn from. One short file per strategy."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from cirloop.negatives.attribute_mismatch import AttributeMismatch
from cirloop.negatives.band import Band
from cirloop.negatives.category_discrepant import CategoryDiscrepant
from cirloop.negatives.category_mix import CategoryMix
from cirloop.negatives.curriculum import Curriculum
from cirloop.negatives.diverse import Diverse
from cirloop.negatives.group import Group
from cirloop.negatives.in_batch import InBatch
from cirloop.negatives.knn_text import KnnText
from cirloop.negatives.margin import Margin
from cirloop.negatives.mixture import Mixture, MixturePart
from cirloop.negatives.none import Nothing
from cirloop.negatives.online_hardest import OnlineHardest
from cirloop.negatives.random import Random
from cirloop.negatives.semantic import Semantic
from cirloop.negatives.semi_hard import SemiHard
from cirloop.negatives.soft import Soft
from cirloop.negatives.top_k import TopK
from cirloop.settings import default_type

# TopK last: `--help` shows the last one's name and defaults.
Single = (
    AttributeMismatch
    | Band
    | CategoryDiscrepant
    | CategoryMix
    | Diverse
    | Group
    | InBatch
    | KnnText
    | Margin
    | OnlineHardest
    | Random
    | Semantic
    | SemiHard
    | Soft
    | TopK
)
AnyStrategy = Annotated[Single, Field(discriminator="type")]
"""What a mixture or a curriculum may hold."""

_names: dict[str, Any] = {"AnyStrategy": AnyStrategy}
MixturePart.model_rebuild(_types_namespace=_names)
Mixture.model_rebuild(_types_namespace=_names)
Curriculum.model_rebuild(_types_namespace=_names)

MinerConfig = Annotated[
    Curriculum | Mixture | Nothing | Single, Field(discriminator="type"), BeforeValidator(default_type("top_k"))
]

__all__ = ["AnyStrategy", "Band", "Margin", "MinerConfig", "Nothing", "Random", "TopK"]
