"""The environment that this process was started with, for the commands that it starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

SERVICE = re.compile(
    r"WSYNC(_[A-Z0-9_]+)?_(SERVICE_HOST=|SERVICE_PORT(_[A-Z0-9_]+)?=|PORT=(tcp|udp|sctp)://"
    r"|PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?=)"
)
"""What Kubernetes sets in every pod if there is a service named ``wsync`` or ``wsync-…``."""

_ADDED = ("OPENBLAS_NUM_THREADS", "LC_CTYPE")
"""Set by ``cli.commands.main`` and by Python itself at its start (PEP 538), if they are missing."""


def given() -> dict[str, str]:
    """The environment of this process, without what wsync added at its start, and without wsync's options.

    The options (``WSYNC_…``) are for this command, and not for a wsync that a gate or hook runs; variables of that form
    that Kubernetes sets stay. ``NOTIFY_SOCKET`` was removed before, so that no command can notify systemd for this one.
    """
    text = Path("/proc/self/environ").read_bytes()
    start = dict(os.fsdecode(pair).partition("=")[::2] for pair in text.split(b"\0") if b"=" in pair)
    ours = {name: value for name, value in os.environ.items() if name not in _ADDED or name in start}
    services = {name: value for name, value in start.items() if SERVICE.match(f"{name}={value}")}
    return {name: value for name, value in ours.items() if not name.startswith("WSYNC_")} | services
