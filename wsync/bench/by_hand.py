"""What one writes without wsync: ``python by_hand.py CHECKPOINTS SHARED`` puts the newest file into shared memory.

It ends early where there is nothing new. It checks nothing, takes a file that is still being written as it is, and
leaves it to each policy to notice the new file and to load it. It imports nothing of wsync.
"""

import os
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

if __name__ == "__main__":
    checkpoints, shared = map(Path, sys.argv[1:])
    newest = max(checkpoints.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    stamp, found = shared / "stamp", f"{newest} {newest.stat().st_mtime_ns}"
    if not stamp.exists() or stamp.read_text() != found:
        save_file(load_file(newest), shared / "weights.new")
        os.replace(shared / "weights.new", shared / "weights.safetensors")
        stamp.write_text(found)
