"""Finds a checkpoint's files, decides whether they are complete and of one save, and reads their bytes.

``parts`` finds the files, ``settling`` decides whether their writer is done, and ``digest`` finds their digests.
``source`` is the interface to their bytes; ``local_files`` implements it for a disk, ``store_objects`` for a store.
``extras`` and ``extras_reading`` handle files that travel with the weights. Imports ``stores`` and the rooms below it.
"""

__all__ = ["digest", "extras", "extras_reading", "local_files", "parts", "settling", "source", "store_objects"]
