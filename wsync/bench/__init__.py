"""``wsync bench``: what this box can do, each figure beside the machine's limit or the usual way.

``rows`` holds the settings and the record of one figure, ``cases`` what is measured, ``place`` the private directories
in which that happens, ``processes`` the policies and publishers that run in processes of their own, ``by_hand`` the
script that one would write instead, and ``view`` the table and the JSON object. A case uses wsync as its users do: the
command line, ``attach``, and a checkpoint that is read into a slot. It may import every room below it, and only the
command line imports it.
"""
