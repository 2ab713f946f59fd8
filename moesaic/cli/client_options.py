"""Flags of the commands that connect to a gateway: its address, an API key, and the trusted certificates.

This module imports nothing slow, because ``moesaic --help`` imports it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from moesaic.errors import InvalidRequest

if TYPE_CHECKING:
    import ssl


def add_flags(group: argparse._ArgumentGroup, variable: str, kind: str) -> None:
    """Add the flags that ``key`` and ``trusted`` read, and ``--insecure-plaintext``.

    Args:
        group: the group of the help text that shows the flags.
        variable: environment variable that may hold the key.
        kind: kind of key, with its article, for the help text.
    """
    group.add_argument("--key", metavar="KEY", help=f"{kind} API key; better: {variable} or --key-file")
    group.add_argument("--key-file", type=Path, metavar="FILE", help="file that contains the key")
    group.add_argument("--ca", type=Path, metavar="FILE", help="trust only these certificate authorities (PEM)")
    group.add_argument("--insecure-plaintext", action="store_true", help="allow http:// to another machine")


def check(flag: str, url: str, *, plain: bool) -> None:
    """Check that an address is http:// or https://, and that it is encrypted unless it is on this machine.

    Args:
        flag: flag that gave the address, for the message.
        url: the address.
        plain: whether http:// to another machine is allowed.

    Raises:
        InvalidRequest: the address is neither http:// nor https://, or would send data unencrypted.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{flag}: {url:.100} is not an http:// or https:// URL")
    loopback = parts.hostname == "localhost" or parts.hostname.startswith("127.") or parts.hostname == "::1"
    if parts.scheme == "http" and not loopback and not plain:
        raise InvalidRequest(
            f"{flag}: {url:.100} would send prompts and keys unencrypted: use https:// or pass --insecure-plaintext"
        )


def key(args: argparse.Namespace, variable: str) -> str | None:
    """Return the API key from the flags or the environment; None if there is none.

    Raises:
        InvalidRequest: the key file cannot be read.
    """
    if args.key_file is None:
        return args.key or os.environ.get(variable)
    try:
        return str(args.key_file.read_text("utf-8-sig").strip())
    except OSError as error:
        raise InvalidRequest(f"{args.key_file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{args.key_file}: is not UTF-8") from error


def trusted(ca: Path | None) -> ssl.SSLContext:
    """Return a TLS context that trusts the certificates in a file, or the system's if ``ca`` is None.

    Raises:
        InvalidRequest: no certificates can be read from the file.
    """
    import ssl

    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(f"{ca}: no certificates can be read from this file") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
