"""The interface of the settings of foundation models."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, ClassVar

from cirloop.backbones.model_settings import ModelSettings

if TYPE_CHECKING:
    from cirloop.backbones.vlm import VlmEmbedder
    from cirloop.captioning.base import Captioner
    from cirloop.captioning.batched_captioner import CaptionClient, Progress
    from cirloop.captioning.journal import Journal
    from cirloop.types import Catalogue, Images, TrainSplit


class Foundation(ModelSettings):
    """Settings of a foundation model, the captioner."""

    concatenates_images: ClassVar[bool] = False
    """Whether the model is shown one image that holds both."""
    can_verify: ClassVar[bool] = True
    """Whether the model can say if a text is right."""
    judges_exactly: ClassVar[bool] = False
    """Whether what it says of a text is never wrong."""
    can_describe: ClassVar[bool] = True
    """Whether the model can say what an image shows."""
    in_processes: ClassVar[bool] = True
    """Whether each process of a run loads it for a share of the questions."""
    is_timed: ClassVar[bool] = True
    """Whether its texts are timed on a sample before a run."""
    resultless: ClassVar[frozenset[str]] = frozenset()
    """Settings that decide no result; they stand in no fingerprint."""

    def build(
        self, embedder: VlmEmbedder | None = None, train: TrainSplit | None = None
    ) -> Captioner:
        """Build the captioner, on the weights of `embedder` where that has the same base.

        `train` is the split whose images it writes for; a model does not need it.
        """
        from cirloop.captioning import CAPTIONERS

        captioner: Captioner = resolve_name(CAPTIONERS[self.type])(self, embedder)
        return captioner

    def client(self, images: Images, journal: Journal, progress: Progress) -> CaptionClient | None:
        """Return what asks a model elsewhere about `images` and keeps the answers in `journal`;
        None where `build` loads one here."""
        return None

    def check_data(self, train: TrainSplit) -> None:
        """Raise UserError where it cannot write for the images of `train`."""

    def judge(self, train: TrainSplit) -> Catalogue | None:
        """Return what names right answers of training that no line names; None for models."""
        return None

    def train_digests(self, train: TrainSplit) -> dict[str, str]:
        """Return digests of what it takes from `train` beside triplets and images, by name."""
        return {}

    def shares_base_with(self, model: ModelSettings) -> bool:
        """Return whether an embedder with the settings `model` has the same base in the same form.

        The pixel budget may differ: the captioner has its own.
        """
        return False
