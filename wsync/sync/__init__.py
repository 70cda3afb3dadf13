"""One pass: look, choose, stage, verify, publish.

Whatever goes wrong before the publish leaves the live version as it was. Imports ``hooks``, ``history``, ``updaters``
and what lies below.
"""
