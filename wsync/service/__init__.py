"""A watch: its passes, its messages to systemd, and the figures that it serves.

Imports ``fleet`` and what lies below.
"""

__all__ = ["metrics", "metrics_endpoint", "service"]
