"""The settings of gate and hooks, and the environment that they run in.

A gate checks staged weights before they go live; hooks run after a publish. Both are code of the user and run as this
user, with the environment that the publisher was started with and ``VARIABLES``, which describe the version.
This module holds only their settings, because every command reads those. ``hooks.gate`` and ``hooks.runner`` run them,
and are imported only if there is something to run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..errors import UsageError
from ..system.environment import given

VARIABLES = tuple(f"WSYNC_HOOK_{name}" for name in ("STAGED", "NAME", "VERSION", "STEP", "CHECKPOINT", "EXTRAS"))
"""What wsync sets for gates and hooks besides ``WSYNC_RUNTIME_DIR`` and ``WSYNC_STATE_DIR``. No option reads such a
variable: a wsync that a hook runs for another policy must not take over the name of this policy."""

MAX_SECONDS = 86_400.0

_FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"


@dataclass(frozen=True, slots=True)
class Hooks:
    """The settings of ``[hooks]``; raises UsageError for an invalid value. An empty command or URL turns its hook off.

    Attributes:
        gate: ``package.module:function``; anything else is a command for ``/bin/sh``, run in the spec's directory.
        gate_timeout: seconds that the gate may take; a gate that takes longer is ended, and rejects.
        exec: command for ``/bin/sh``, run in the spec's directory after a publish.
        exec_timeout: seconds that the command may take.
        exec_backoff: seconds from a failure to the next try.
        webhook: http or https URL that is called after a publish. It is never shown, because it may hold a secret.
        webhook_method: method of the request.
        webhook_timeout: seconds that the whole request may take.
        webhook_backoff: seconds from a failure to the next try.
        webhook_success_status: the one status of an answer that is a success; 0 for any.
    """

    gate: str = ""
    gate_timeout: float = 60.0
    exec: str = ""
    exec_timeout: float = 30.0
    exec_backoff: float = 3.0
    webhook: str = field(default="", repr=False)
    webhook_method: str = "POST"
    webhook_timeout: float = 1.0
    webhook_backoff: float = 3.0
    webhook_success_status: int = 200

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(setting.default, float) and not 0 < value <= MAX_SECONDS:
                raise UsageError(
                    f"hooks.{setting.name} = {value} is not a valid time ({_flag(setting.name)}). Give seconds above "
                    "0, a day at most."
                )
            if isinstance(value, str) and "\0" in value:
                raise UsageError(f"hooks.{setting.name} holds a NUL character ({_flag(setting.name)}). Remove it.")
        if self.webhook and not self._is_url():
            raise UsageError(
                "hooks.webhook is not an http or https URL (--webhook; it is not shown, because it may hold a "
                "secret). Give a URL of printable ASCII, with a host."
            )
        if not (self.webhook_method.isascii() and self.webhook_method.isalpha()):
            raise UsageError(
                f"hooks.webhook_method = {self.webhook_method!r} is not an HTTP method. Give POST, or another."
            )
        if self.webhook_success_status and not 100 <= self.webhook_success_status <= 599:
            raise UsageError(
                f"hooks.webhook_success_status = {self.webhook_success_status} is not an HTTP status. Give 100 to "
                "599, or 0 to accept any."
            )

    @property
    def gate_is_function(self) -> bool:
        """Whether the gate is ``package.module:function``, and not a command."""
        return bool(re.fullmatch(_FUNCTION, self.gate))

    def _is_url(self) -> bool:
        from urllib.parse import urlsplit

        if not re.fullmatch(r"https?://[!-~]+", self.webhook, re.IGNORECASE):
            return False
        try:
            parts = urlsplit(self.webhook)
            return bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is not a number, or an IPv6 address is broken
            return False


def environment(runtime: Path, state_dir: Path | None, **about: object) -> dict[str, str]:
    """Returns the environment of a gate or hook: ``given()``, the two directories, and ``WSYNC_HOOK_…``.

    If the gate or hook runs wsync, that uses the same segments and the same history.

    Args:
        runtime: where segments live.
        state_dir: where history and pins are kept; None for the default.
        about: values by the variable's name in lower case without ``WSYNC_HOOK_``; None becomes empty.
    """
    places = {"WSYNC_RUNTIME_DIR": runtime, "WSYNC_STATE_DIR": state_dir or os.environ.get("WSYNC_STATE_DIR")}
    own = {name: str(place) for name, place in places.items() if place}
    own |= {f"WSYNC_HOOK_{name.upper()}": "" if value is None else str(value) for name, value in about.items()}
    return given() | own


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
