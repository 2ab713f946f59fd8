"""What everything that dials a gateway has in common: its address, a key, and whose certificate is trusted.

Imports nothing slow: ``moesaic --help`` reads this.
"""

from __future__ import annotations

import argparse
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from moesaic.errors import InvalidRequest


def add_flags(group: argparse._ArgumentGroup, variable: str, whose: str) -> None:
    """Add the flags that ``key`` and ``trusted`` read, and ``--insecure-plaintext``; the key may be in a variable."""
    group.add_argument("--key", metavar="KEY", help=f"{whose} key; better: {variable} or --key-file")
    group.add_argument("--key-file", type=Path, metavar="FILE", help="where the key stands")
    group.add_argument("--ca", type=Path, metavar="FILE", help="certificates that the gateway's must come from, PEM")
    group.add_argument("--insecure-plaintext", action="store_true", help="speak http:// to another machine")


def check(flag: str, url: str, *, plain: bool) -> None:
    """Refuse what is no address, and, unless ``plain``, to speak unencrypted to another machine.

    Raises:
        InvalidRequest: see above.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{flag}: {url:.100} is no http:// or https:// address")
    near = parts.hostname == "localhost" or parts.hostname.startswith("127.") or parts.hostname == "::1"
    if parts.scheme == "http" and not near and not plain:
        raise InvalidRequest(
            f"{flag}: {url:.100} would carry prompts and keys unencrypted: take https://, or --insecure-plaintext"
        )


def key(args: argparse.Namespace, variable: str) -> str | None:
    """Return the key to show, or None.

    Raises:
        InvalidRequest: its file cannot be read.
    """
    if args.key_file is None:
        return args.key or os.environ.get(variable)
    try:
        return str(args.key_file.read_text().strip())
    except OSError as error:
        raise InvalidRequest(f"{args.key_file}: cannot be read: {error.strerror}") from error


def trusted(ca: Path | None) -> ssl.SSLContext:
    """Return what checks certificates, against those in a file if there is one.

    Raises:
        InvalidRequest: none can be read from it.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(f"{ca}: no certificates can be read from it") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
