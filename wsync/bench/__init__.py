"""``wsync bench``: measures this box, and puts each figure beside the machine's limit or the usual way.

``rows`` holds the settings and one figure, ``cases`` what is measured, ``workspace`` the private directories and the
processes. Imports every room below it; only the command line imports it.
"""

__all__ = ["cases", "rows"]
