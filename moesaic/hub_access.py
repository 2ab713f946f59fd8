"""Asks the Hugging Face hub: the sizes of a repository's files; and turns errors of the hub's library into ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moesaic.errors import DownloadError, NotFound
from moesaic.hub_files import HubName


def sizes_on_hub(name: HubName) -> dict[str, int]:
    """Return the size in bytes of each file of a hub repository, by its path.

    Raises:
        NotFound: the hub has no such repository or revision.
        DownloadError: the hub cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(name):
        entries = HfApi().list_repo_tree(name.repository, revision=name.revision, recursive=True)
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


@contextmanager
def hub_errors(name: HubName) -> Iterator[None]:
    """Return a context in which errors of the hub's library become ``NotFound`` or ``DownloadError`` of one line."""
    from huggingface_hub import errors

    http_error = errors.HTTPError  # type: ignore[attr-defined]  # the class depends on the HTTP client of the version
    repository, revision = name.repository, name.revision
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repository}: accept the model's terms on the hub, then log in (hf auth login)"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(
            f"the hub has no {repository}{f'@{revision}' if revision else ''}, or you have no access to it"
        ) from error
    except (http_error, OSError, ValueError, RuntimeError) as error:
        raise DownloadError(f"{repository}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error message; the class name if the message is empty."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
