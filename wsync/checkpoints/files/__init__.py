"""The files of a checkpoint: which they are, whether they are whole and of one save, and their bytes.

``parts`` says what a checkpoint consists of, ``settling`` whether its writer is done, and ``digest`` what its bytes
should be; ``source`` is where they come from, ``local`` from a disk and ``objects`` from a store. ``extras`` and
``extras_reading`` are about files that travel with the weights. Imports ``stores`` and what lies below.
"""

__all__ = ["digest", "extras", "extras_reading", "local", "objects", "parts", "settling", "source"]
