"""``wsync bench``: measures this box, and compares each figure with the hardware's limit or with the usual way.

``rows`` defines the settings and a figure, ``cases`` the measurements, ``workspace`` their directories and processes.
May import every room below it; only the command line imports it.
"""

__all__ = ["cases", "rows"]
