"""A trainer's side: one PUT for each checkpoint, which the store shows whole or not at all.

python upload.py s3://bucket/run STEP
"""

from __future__ import annotations

import sys

import obstore
from net import make_policy
from obstore.store import from_url
from safetensors.torch import save


def main() -> None:
    url, step = sys.argv[1:]
    policy = make_policy()  # trained, in a trainer
    store = from_url(url, client_options={"allow_http": True})
    data = save(policy.state_dict(), metadata={"step": step})
    obstore.put(store, f"step_{step}.safetensors", data)
    print(f"{url}/step_{step}.safetensors: {len(data):,} bytes")


if __name__ == "__main__":
    main()
