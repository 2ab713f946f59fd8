"""Opens text files that a user names, plain or compressed with xz, and turns what goes wrong into one clear error."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moesaic.errors import InvalidRequest, NotFound


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a file in UTF-8, with or without a byte-order mark; a name that ends with .xz means that it is compressed.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: the file cannot be read, also while the ``with`` block reads it.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    try:
        with (lzma.open if path.name.endswith(".xz") else open)(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
