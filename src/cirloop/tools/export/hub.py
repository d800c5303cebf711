"""Putting an export on the Hugging Face Hub. What can be known to fail is found before anything is
made."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from cirloop.io.redact import sanitize
from cirloop.types import UserError
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)


def check(name: str) -> None:
    """Raise UserError with all that keeps a repository `name` from being written to. The token is
    never shown."""
    problems = ValidationReport()
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it should be OWNER/NAME")
    except HFValidationError as error:
        problems.add(f"--push_to_hub {name}", f"is no name of a repository: {error}")
    if not get_token():
        problems.add("--push_to_hub", "there is no token: run `hf auth login`, or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        problems.add("--push_to_hub", "HF_HUB_OFFLINE is set; unset it")
    problems.raise_if_any("Nothing was made. Leave --push_to_hub out to export without the Hub.")


def push(directory: Path, name: str, private: bool) -> str:
    """Return the address of the repository, made where there is none, with the files of
    `directory`. Raises UserError where the Hub refuses."""
    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=directory, commit_message="A model exported by cirloop"
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(
            f"--push_to_hub {name}: the Hub refused: {sanitize(str(error))}\n{directory} is whole."
            f" Upload it with `hf upload {name} {directory}`, once the Hub takes it."
        ) from None
    logger.info("uploaded %s to %s", directory, url)
    return str(url)
