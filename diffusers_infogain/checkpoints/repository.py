"""Repositories: folders, or downloads from the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def local_folder(
    repository: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of that name, or a download of those files of a Hub repository.

    Args:
        repository: A folder, or a Hub id.
        patterns: File names, with wildcards, that are needed.
        revision, cache_dir, token, local_files_only: As in `huggingface_hub.snapshot_download`.

    Raises:
        OSError: If there is no such folder and nothing of that name can be downloaded.
    """
    if Path(repository).is_dir():
        return Path(repository)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    try:
        return Path(snapshot_download(os.fspath(repository), allow_patterns=list(patterns), **where))
    except (HFValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{os.fspath(repository)!r} is neither a folder nor a Hub repository that can be read: {reason}") from error
