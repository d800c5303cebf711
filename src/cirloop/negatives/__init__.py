"""Mining: scores of queries against a gallery -> wrong images to learn from. One short file per
strategy."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from cirloop.config.base import Settings, default_type
from cirloop.negatives.anchors import AnchorSettings
from cirloop.negatives.base import Strategy
from cirloop.negatives.filters import FilterConfig
from cirloop.negatives.strategies.attribute_mismatch import AttributeMismatch
from cirloop.negatives.strategies.band import Band
from cirloop.negatives.strategies.category_discrepant import CategoryDiscrepant
from cirloop.negatives.strategies.category_mix import CategoryMix
from cirloop.negatives.strategies.curriculum import Curriculum
from cirloop.negatives.strategies.diverse import Diverse
from cirloop.negatives.strategies.group import Group
from cirloop.negatives.strategies.in_batch import InBatch
from cirloop.negatives.strategies.knn_text import KnnText
from cirloop.negatives.strategies.margin import Margin
from cirloop.negatives.strategies.mixture import Mixture, MixturePart
from cirloop.negatives.strategies.near_reference import NearReference
from cirloop.negatives.strategies.none import NoMining
from cirloop.negatives.strategies.online_hardest import OnlineHardest
from cirloop.negatives.strategies.random import Random
from cirloop.negatives.strategies.semantic import Semantic
from cirloop.negatives.strategies.semi_hard import SemiHard
from cirloop.negatives.strategies.soft import Soft
from cirloop.negatives.strategies.top_k import TopK
from cirloop.retrieval.config import IndexSettings, Search

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
    | NearReference
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

StrategyConfig = Annotated[
    Curriculum | Mixture | NoMining | Single,
    Field(discriminator="type"),
    BeforeValidator(default_type("top_k")),
]
STRATEGIES: dict[str, type[Strategy]] = {
    kind.model_fields["type"].default: kind for kind in get_args(get_args(StrategyConfig)[0])
}
"""Every strategy by its type."""


SHORT_NAMES = {"k": "negatives_per_query", "below": "extra_ranks"}
"""What a file may call settings of a strategy that stand right under `mining`."""


def below_strategy(mining: dict[str, Any]) -> dict[str, Any]:
    """Return a file's `mining` with what stands right under it, such as {type: top_k, k: 3}, put
    under `strategy`."""
    if "type" not in mining or "strategy" in mining:
        return mining
    own = {name: value for name, value in mining.items() if name not in MiningSettings.model_fields}
    shared = {name: value for name, value in mining.items() if name in MiningSettings.model_fields}
    return {
        **shared,
        "strategy": {_full_name(name, own): value for name, value in own.items()},
    }


def _full_name(name: str, settings: dict[str, Any]) -> str:
    """Return what a short name stands for; of both names the short one stays, to be refused."""
    full = SHORT_NAMES.get(name, name)
    return name if full in settings else full


class MiningSettings(Settings):
    """Which wrong images a query learns from, and how they are found."""

    strategy: StrategyConfig = TopK()
    search: Search = "exact"
    """How the best images are found: exactly, or by a FAISS index of this kind; only for strategies
    that need no more than the best."""
    index: IndexSettings = IndexSettings()
    filters: tuple[FilterConfig, ...] = ()
    """False-negative filters, one after the other; what they drop is counted and not replaced."""
    fallback: Literal["none", "top_k", "random"] = "none"
    """What fills up a query with fewer images than the strategy is to give: nothing, its
    best-ranked or random wrong ones."""
    rank_reference: bool = False
    """Rank the reference too, which may then be mined."""
    only_failed_queries: bool | None = None
    """Mine only for queries whose target is not ranked first; by default so with `top_k` and
    `random` alone."""
    num_rounds: int | None = Field(None, ge=1)
    """Rounds that mine and write texts, from the first; later ones train on what there is. None:
    all."""
    skip_captioned: bool = False
    """Mine no image again for a reference with an accepted text that leads from one to the other;
    the next-ranked image takes its place."""
    anchors: AnchorSettings = AnchorSettings()
    """Gallery images without a human text that texts are written for."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if ignored := self.index.ignored_settings(self.search):
            raise ValueError(
                f"index: {' and '.join(ignored)} does nothing with search: {self.search}"
            )
        if self.search != "exact" and (
            self.strategy.needs_full_gallery or self.fallback == "random"
        ):
            raise ValueError(
                f"search: {self.search} is for strategies that need the best images only, without a"
                f" random fallback; {self.strategy.type} with fallback: {self.fallback} sees the"
                " whole gallery"
            )
        if self.fallback != "none" and self.strategy.type == "none":
            raise ValueError(f"fallback: {self.fallback} does nothing with the strategy `none`")
        return self

    def mines_in(self, iteration: int) -> bool:
        """Whether images are mined for the training of `iteration`, from 1."""
        return self.num_rounds is None or iteration <= self.num_rounds

    @property
    def verifies(self) -> bool:
        """Whether a filter asks the foundation model for verdicts."""
        return any(mining_filter.type == "verify" for mining_filter in self.filters)

    @property
    def skips_solved_queries(self) -> bool:
        """Whether queries whose target is ranked first are passed over."""
        chosen = self.only_failed_queries
        return self.strategy.only_failed_queries if chosen is None else chosen


__all__ = [
    "STRATEGIES",
    "AnyStrategy",
    "Band",
    "Margin",
    "MiningSettings",
    "NoMining",
    "Random",
    "StrategyConfig",
    "TopK",
]
