"""The policy: a linear rule for CartPole. Run as a program it saves a checkpoint: `python rule.py STEP DAMPING`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def make_policy() -> nn.Module:
    """Gives the push to the right from position, speed, angle and angular speed: left where it is negative."""
    return nn.Linear(4, 1, bias=False).eval()


if __name__ == "__main__":
    step, damping = int(sys.argv[1]), float(sys.argv[2])
    folder = Path("checkpoints")
    folder.mkdir(exist_ok=True)
    temporary = folder / f".step_{step}.tmp"
    save_file({"weight": torch.tensor([[0.0, 0.0, 1.0, damping]])}, temporary)
    temporary.rename(folder / f"step_{step}.safetensors")
