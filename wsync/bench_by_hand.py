"""What one writes without wsync: the newest checkpoint into shared memory, where a policy maps it.

``python bench_by_hand.py CHECKPOINTS SHARED [--watch]``. It stops early where there is nothing new, and a policy
process maps what it wrote with ``TensorDict.load_memmap(SHARED)``. It promises less than wsync: a policy can see half a
version, nothing is checked, and a file that is still being written is taken as it is. It imports nothing of wsync.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensordict import TensorDict


def look(checkpoints: Path, shared: Path) -> None:
    """One pass: nothing where the newest file is the one before."""
    files = [(path.stat().st_mtime_ns, path) for path in checkpoints.glob("*.safetensors")]
    if not files:
        return
    stamp, (written, newest) = shared / "stamp", max(files)
    if stamp.exists() and stamp.read_text() == f"{written} {newest}":
        return
    weights = TensorDict(load_file(newest))
    if stamp.exists():
        with torch.no_grad():
            TensorDict.load_memmap(shared).update_(weights)
    else:
        weights.memmap(shared)
    new = stamp.with_suffix(".new")
    new.write_text(f"{written} {newest}")
    os.replace(new, stamp)


def main() -> None:
    checkpoints, shared = Path(sys.argv[1]), Path(sys.argv[2])
    look(checkpoints, shared)
    if "--watch" in sys.argv:
        print("watching", flush=True)
        while True:
            time.sleep(1)
            look(checkpoints, shared)


if __name__ == "__main__":
    main()
