"""The weight updaters, with the API of torchrl's collectors and without needing torchrl.

``scheme`` alone needs torchrl: it is for ``wsync.torchrl`` to import.

Imports ``policy`` and what lies below.
"""
