"""``wsync bench``: measures this box, and puts each figure beside the machine's limit or the usual way.

``rows`` holds the settings and one figure, ``cases`` what is measured, ``workspace`` the private directories and the
processes. It may import every room below it, and only the command line imports it.
"""
