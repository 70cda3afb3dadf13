"""Lets one reader try new weights beside two that play the old ones, then promotes the new ones or rolls them back.

python canary.py EPISODES
"""

import json
import subprocess
import sys
from statistics import mean
from typing import Any

Reader = subprocess.Popen[str]


def start(name: str) -> Reader:
    return subprocess.Popen([sys.executable, "episodes.py", name], stdout=subprocess.PIPE, text=True)


def episode(reader: Reader) -> dict[str, Any]:
    """The next episode of a reader: its version, step and return."""
    assert reader.stdout
    played: dict[str, Any] = json.loads(reader.stdout.readline())
    return played


def mean_return(name: str, readers: list[Reader], episodes: int) -> float:
    played = [episode(reader) for reader in readers for _ in range(episodes)]
    value: float = mean(each["return"] for each in played)
    print(f"{name}: step {played[0]['step']} has a mean return of {value:.0f}", flush=True)
    return value


def follow(name: str, readers: list[Reader]) -> None:
    """Waits until each reader plays another version than before."""
    for reader in readers:
        first = played = episode(reader)
        while played["version"] == first["version"]:
            played = episode(reader)
        print(f"{name}: a reader plays step {played['step']}, with a return of {played['return']:.0f}", flush=True)


def wsync(*arguments: str) -> None:
    """Runs a command; where the gate does not want the promote, this program ends with the command's message."""
    subprocess.run([sys.executable, "-m", "wsync", *arguments], check=True)


def decide(old: list[Reader], new: list[Reader], episodes: int) -> None:
    if mean_return("cartpole-canary", new, episodes) > mean_return("cartpole", old, episodes):
        wsync("promote", "cartpole-canary", "cartpole")
        follow("cartpole", old)
    else:
        wsync("rollback", "cartpole-canary")
        follow("cartpole-canary", new)


if __name__ == "__main__":
    readers = [start(name) for name in ("cartpole", "cartpole", "cartpole-canary")]
    try:
        decide(readers[:2], readers[2:], int(sys.argv[1]))
    finally:
        for reader in readers:
            reader.terminate()
