"""Opens obstore's clients: with time limits, without retries of their own, and with credentials from the usual places.

Credentials come from the environment, as for the stores' own tools: keys, a role of the machine or the container, a
token file. If the environment has none, and boto3's own files exist, boto3 is asked for profiles and single sign-on.
Credentials are passed on, and never looked at or printed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import UsageError

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a store may take.

    Attributes:
        tries: most tries of one range or listing.
        pause: seconds to wait after the first failed try; doubled after each.
        connect: most seconds until a connection is open.
        quiet: most seconds without a byte.
        request: most seconds of one request in total.
    """

    tries: int = 6
    pause: float = 0.25
    connect: float = 5.0
    quiet: float = 15.0
    request: float = 60.0


def bucket(scheme: str, name: str, patience: Patience) -> Any:
    """Opens a client of a bucket or container.

    Raises:
        UsageError: the credentials or the endpoint cannot be used.
        obstore.exceptions.BaseError, ValueError: its settings in the environment are wrong.
    """
    from obstore import store

    options = _options(patience, http=_endpoint(scheme).startswith("http://"))
    if scheme == "s3":
        return store.S3Store(name, **options, **_profile())
    if scheme == "az" and not (
        os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or "AZURE_STORAGE_USE_EMULATOR" in os.environ
    ):
        raise UsageError(
            f"az://{name}: no storage account is configured. Set AZURE_STORAGE_ACCOUNT_NAME, and give this process a "
            "key, a token or an identity as Azure's own tools take them."
        )
    return (store.GCSStore if scheme == "gs" else store.AzureStore)(name, **options)


def web(url: str, authorization: str, patience: Patience) -> Any:
    """Opens a client of a web server, which sends this ``authorization`` header if it is not empty."""
    from obstore.store import HTTPStore

    options = _options(patience, http=True)
    if authorization:
        options["client_options"]["default_headers"] = {"authorization": authorization}
    return HTTPStore.from_url(url, **options)


def _options(patience: Patience, *, http: bool = False) -> dict[str, Any]:
    limits = {"connect_timeout": patience.connect, "read_timeout": patience.quiet, "timeout": patience.request}
    client: dict[str, Any] = {name: timedelta(seconds=value) for name, value in limits.items()}
    return {"client_options": {**client, "allow_http": http}, "retry_config": {"max_retries": 0}}


def _endpoint(scheme: str) -> str:
    """The store's address, if the environment sets one for its own tools.

    Raises:
        UsageError: it is not the URL of a server, which would make obstore panic.
    """
    name = next((name for name in _ENDPOINTS[scheme] if os.environ.get(name)), "")
    if not name:
        return ""
    try:
        url = urlsplit(os.environ[name])
        usable = url.scheme in ("http", "https") and url.hostname and not url.username and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            f"{name} is not the URL of a server. Write https://host, or http://host:port, and nothing secret."
        )
    return os.environ[name]


def _profile() -> dict[str, Any]:
    """S3 credentials that boto3 finds in a profile; empty if the environment has some, or there is no profile."""
    direct = ["ACCESS_KEY_ID", "WEB_IDENTITY_TOKEN_FILE", "SKIP_SIGNATURE"]
    direct += ["CONTAINER_CREDENTIALS_RELATIVE_URI", "CONTAINER_CREDENTIALS_FULL_URI"]
    files = [os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")]
    files += [os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")]
    if any(os.environ.get(f"AWS_{name}") for name in direct) or not any(Path(f).expanduser().exists() for f in files):
        return {}
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise UsageError(
            "credentials in ~/.aws are read with boto3, which is not installed: pip install 'wsync[remote]', or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from None
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return {}
    except BotoCoreError as exc:
        raise UsageError(
            f"the credentials of ~/.aws cannot be used ({type(exc).__name__}). Check AWS_PROFILE and the profile that "
            "it names."
        ) from None
    region = {"region": session.region_name} if session.region_name else {}
    return {"credential_provider": Boto3CredentialProvider(session), **region}
