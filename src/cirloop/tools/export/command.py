"""A run's model for others, with a card: for transformers + peft, for transformers, or for
sentence-transformers.

    python -m cirloop.export --experiment_dir DIR --iteration 1 --format sentence-transformers
    python -m cirloop.export --vectors --experiment_dir DIR --iteration 1 --output V

With --vectors it is `cirloop.export_vectors`, with its flags. What is made of a model is opened
again and compared with the run's own embedder before it gets its name (docs/export.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cirloop.config import cli
from cirloop.tools.export.config import ExportConfig, require_package

PROGRAM = "python -m cirloop.export"
VECTORS = "--vectors"
"""The flag that asks for vectors, and not for the model."""


def main(argv: Sequence[str]) -> None:
    """Export a model, or vectors. Raises UserError for wrong flags; then nothing is written."""
    if VECTORS in argv:
        from cirloop.tools import export_embeddings

        export_embeddings.main([word for word in argv if word != VECTORS])
        return
    options = cli.parse_flags(ExportConfig, argv, PROGRAM)
    require_package(options)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from cirloop.tools.export.export import export

    export(options)
