"""One pass: look, choose, stage, verify, publish; and the loop of a watch around it.

A failure before the publish leaves the live version as it was. ``syncer`` makes a pass (``one_pass``): it chooses what
to try and publishes it (``publish_checkpoint``) by a ``Route``: to this box alone, or to the boxes of a fleet. Each box
publishes by ``put_live``, which takes the publisher's lock, looks again, publishes, and tells the history and the
hooks. ``promoting`` publishes by it what is live in another segment. Imports ``hooks`` and the rooms below it.
"""

__all__ = ["claim", "loop", "one_pass", "outcome", "promoting", "put_live", "syncer"]
