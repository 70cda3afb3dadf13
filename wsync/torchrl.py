"""``wsync.torchrl.SegmentWeightSyncScheme``: what torchrl's collectors take; importing it imports torchrl."""

from .updaters.scheme import SegmentWeightSyncScheme

__all__ = ["SegmentWeightSyncScheme"]
