"""Settings of what writes texts without a model: a rule, and a catalogue."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cirloop.artifacts.store import file_digest, fingerprint
from cirloop.captioning.foundation_base import Foundation
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.backbones.vlm import VlmEmbedder
    from cirloop.captioning.base import Captioner
    from cirloop.data.catalogue import AttributeCatalogue
    from cirloop.types import Catalogue, ImageId, TrainSplit

logger = logging.getLogger(__name__)


class WithoutModel(Foundation):
    """Settings of what writes texts without a model and without weights."""

    can_describe: ClassVar[bool] = False
    is_timed: ClassVar[bool] = False
    path: str = ""
    """Not used."""

    def resolve_dir(self) -> Path:
        return Path(str(files("cirloop.captioning")))


class TemplateFoundation(WithoutModel):
    """No model: a rule rewrites the human text without the images, for dry runs. Every text is
    marked `template (no model)`, and the results mean nothing. The rule cannot verify, so
    `captioning.min_verify_probability` must be 0."""

    can_verify: ClassVar[bool] = False
    type: Literal["template"] = "template"

    def weights_digest(self) -> str:
        from cirloop.captioning.backends.template import VERSION

        return fingerprint(VERSION)

    def build(
        self, embedder: VlmEmbedder | None = None, train: TrainSplit | None = None
    ) -> Captioner:
        from cirloop.captioning.backends.template import TemplateCaptioner

        return TemplateCaptioner()


class CatalogueFoundation(WithoutModel):
    """No model: true texts and exact verdicts from a catalogue, which knows what the images show:
    the data set's own, as `shapes` has one, or a `file`."""

    judges_exactly: ClassVar[bool] = True
    type: Literal["catalogue"] = "catalogue"
    file: Path | None = None
    """JSON or YAML of what images show, {image or folder: {attribute: value}}. None: the data set's
    own catalogue."""
    phrases: Path | None = None
    """YAML of words for changes, {attributes: [phrases]}. None: learned from the human texts of
    training, or the words of the data set's own catalogue."""
    max_changes: int | None = Field(None, ge=1)
    """Most attributes in which two images differ that have a text. None: 2; 3 for `shapes`."""

    exclude_right: bool = False
    """Images that the catalogue says are right for a query or text of training are no negatives of
    it: neither mined nor in a batch."""

    def judge(self, train: TrainSplit) -> Catalogue | None:
        return self.open(train) if self.exclude_right else None

    def open(self, train: TrainSplit) -> Catalogue:
        """Open the catalogue. Raises UserError where there is none, or a file is wrong."""
        from cirloop.data import catalogue as data

        catalogue = train.catalogue
        if self.file is not None:
            items = data.Items(data.read_items(self.file))
            self._num_known(lambda image: items.attributes(image) is not None, train)
            if self.phrases is not None:
                phrasebook = data.read_phrases(self.phrases)
            else:
                phrasebook = data.learn_phrases(train.triplets, items)
            catalogue = data.AttributeCatalogue(items, phrasebook)
        elif catalogue is None:
            raise UserError(
                f"foundation.type catalogue: {train.name} has no catalogue of its own. Name a file"
                f" of what its images show by --foundation.file FILE. {data.ITEMS_FORM}"
            )
        elif self.phrases is not None:
            if not isinstance(catalogue, data.AttributeCatalogue):
                raise UserError(
                    f"foundation.phrases {self.phrases}: the catalogue of {train.name} has words of"
                    " its own and reads no others. Leave it out."
                )
            catalogue = replace(catalogue, phrasebook=data.read_phrases(self.phrases))
        return catalogue.limited(self.max_changes) if self.max_changes else catalogue

    def check_data(self, train: TrainSplit) -> None:
        """Raise UserError where no text can be written for images of `train`; warn where some have
        none."""
        from cirloop.data.catalogue import AttributeCatalogue

        catalogue = self.open(train)
        num_known = self._num_known(catalogue.knows, train)
        if num_known < len(train.gallery.ids):
            logger.warning(
                "foundation.type catalogue: knows %s of the %s images of %s; the others get no"
                " texts",
                f"{num_known:,}",
                f"{len(train.gallery.ids):,}",
                train.name,
            )
        if self.phrases is not None and isinstance(catalogue, AttributeCatalogue):
            self._check_phrases(catalogue)

    def _num_known(self, knows: Callable[[ImageId], bool], train: TrainSplit) -> int:
        """Return how many images of the gallery are known. Raises UserError where none is."""
        images = train.gallery.ids
        num_known = sum(map(knows, images))
        if not num_known:
            where = "its own catalogue" if self.file is None else f"foundation.file {self.file}"
            raise UserError(
                f"{where}: none of the {len(images):,} images of {train.name}, such as"
                f" {images[0]!r}, has an entry, nor has a folder of its path. Give entries the"
                " names of these images or folders."
            )
        return num_known

    def _check_phrases(self, catalogue: AttributeCatalogue) -> None:
        """Check that the phrases are about attributes of the catalogue."""
        attributes = catalogue.items.names
        phrases = catalogue.phrasebook.phrases
        unknown = {name for phrase in phrases for name in phrase.names} - attributes
        if not unknown:
            return
        listed = ", ".join(map(repr, sorted(unknown)))
        problem = f"no entry of the catalogue has {listed}; it has {', '.join(sorted(attributes))}"
        if not any(phrase.names <= attributes for phrase in phrases):
            raise UserError(f"foundation.phrases {self.phrases}: {problem}.")
        logger.warning("foundation.phrases %s: %s", self.phrases, problem)

    def weights_digest(self) -> str:
        """Return the digest of both files, in place of weights."""
        from cirloop.data.catalogue import VERSION

        return fingerprint([VERSION, self._digest(self.file), self._digest(self.phrases)])

    def path_digests(self) -> dict[str, str | None]:
        """Return the digests of both files."""
        files = {"file": self._digest(self.file), "phrases": self._digest(self.phrases)}
        return {**super().path_digests(), **files}

    def _digest(self, path: Path | None) -> str | None:
        return None if path is None else file_digest(path)

    def train_digests(self, train: TrainSplit) -> dict[str, str]:
        """Return the digest of the data set's own catalogue, where that is used."""
        own = train.catalogue if self.file is None else None
        return {} if own is None else {"catalogue": own.fingerprint}

    def build(
        self, embedder: VlmEmbedder | None = None, train: TrainSplit | None = None
    ) -> Captioner:
        """Build the captioner for the images of `train`."""
        from cirloop.captioning.backends.catalogue import CatalogueCaptioner

        assert train is not None, "a catalogue is of a data set"
        return CatalogueCaptioner(self.open(train))
