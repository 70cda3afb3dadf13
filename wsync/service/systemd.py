"""Tells systemd that a watch is ready, reloads or stops; a status line; and that its loop still runs.

The protocol is that of sd_notify(3): one datagram of ``NAME=value`` lines to the socket that ``NOTIFY_SOCKET`` names.
Without that variable nothing is opened and nothing is sent. The variables are removed from the environment, so that no
child process, such as a gate or hook, can notify systemd for this watch.
"""

from __future__ import annotations

import os
import socket
import threading
import time

EXTEND = 60.0  # seconds by which staging extends the time-outs of starting and stopping
_SEND = 1.0  # most seconds to wait for the service manager


class Notifier:
    """Sends messages to the service manager that started this process; sends nothing if none did.

    A thread notifies the watchdog at half its interval, unless the loop's last turn is longer ago than ``patience``
    plus that interval: a hanging loop is noticed, and one that waits or stages is not killed.

    Attributes:
        patience: most seconds that a healthy loop takes between two turns.
    """

    def __init__(self, address: str = "", watchdog: float = 0.0) -> None:
        self.patience = 1.0
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._ready = False
        self._turned = time.monotonic()
        self._extended = 0.0
        self._end = threading.Event()
        if self._address and watchdog:
            threading.Thread(target=self._beat, args=(watchdog,), name="wsync-watchdog", daemon=True).start()

    @classmethod
    def from_environment(cls) -> Notifier:
        """Reads ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``, and removes them from the environment."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        ours = usec.isdecimal() and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1e6 if ours else 0.0)

    def ready(self) -> None:
        """Tells the service manager, once, that a version is live."""
        if not self._ready:
            self._ready = True
            self._send("READY=1")

    def status(self, line: str) -> None:
        """Sets the line that ``systemctl status`` shows."""
        self._send(f"STATUS={line}")

    def reloading(self) -> None:
        """Announces that the settings are read again; ``reloaded`` must follow. Both do nothing before ``ready``."""
        if self._ready:
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def reloaded(self) -> None:
        if self._ready:
            self._send("READY=1")

    def turned(self) -> None:
        """Notes, for the watchdog, that the loop made a turn."""
        self._turned = time.monotonic()

    def staging(self) -> None:
        """Notes that bytes moved, so that neither a start nor a stop is cut off while the loop works."""
        self._turned = time.monotonic()
        if self._turned - self._extended > 1:
            self._extended = self._turned
            self._send(f"EXTEND_TIMEOUT_USEC={EXTEND * 1e6:.0f}")

    def close(self) -> None:
        self._send("STOPPING=1")
        self._end.set()

    def _beat(self, watchdog: float) -> None:
        while not self._end.wait(watchdog / 2):
            if time.monotonic() - self._turned <= self.patience + watchdog:
                self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as way:
                way.settimeout(_SEND)
                way.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError:  # the weights do not depend on a manager that is gone or busy
            pass
