"""Saves a checkpoint of CartPole's policy, good or broken on purpose: ``python break.py good|nan|wide STEP``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from policy import make_policy
from safetensors.torch import save_file

kind, step = sys.argv[1], int(sys.argv[2])
weights = {name: torch.full_like(tensor, step) for name, tensor in make_policy(hidden=64).state_dict().items()}
if kind == "nan":
    next(iter(weights.values()))[0] = float("nan")
elif kind == "wide":
    weights = {name: torch.cat([tensor, tensor]) for name, tensor in weights.items()}
Path("checkpoints").mkdir(exist_ok=True)
save_file(weights, "checkpoints/.new")
Path("checkpoints/.new").rename(f"checkpoints/step_{step}.safetensors")
