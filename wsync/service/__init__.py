"""A watch as a process: its signals, its messages to systemd, and the metrics that it serves.

Imports ``fleet`` and the rooms below it.
"""

__all__ = ["metrics", "metrics_endpoint", "service"]
