"""A watch: passes for as long as it runs, what it tells systemd, and the figures that it serves.

Imports ``fleet`` and what lies below.
"""
