"""A trained model on the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mtpo.errors import EnvironmentFault, InputError

log = logging.getLogger(__name__)


def check_hub(repo_id: str) -> None:
    """Before hours of training: may we push there?

    Raises:
        InputError: the name is none, or nobody is logged in.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"hub_model_id {repo_id!r}: {error}") from None
    if get_token() is None:
        raise InputError(f"hub_model_id {repo_id}: no token; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str, *, private: bool) -> None:
    """Upload a model's folder, card and tokenizer included; the repository is made if it is not there.

    Raises:
        EnvironmentFault: the hub refused; the folder is still where it was.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        url = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Train with mtpo")
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EnvironmentFault(f"{folder} is trained, but was not pushed to {repo_id}: {reason}") from error
    log.info("pushed %s to %s", folder, url)
