"""The weight updaters, with the API of torchrl's collectors and without needing torchrl.

Imports ``places`` and what lies below.
"""
