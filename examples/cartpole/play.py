"""A policy process: plays CartPole without end while wsync brings newer weights in as it goes.

Three lines of it are wsync: the import, `attach`, and `refresh` between two steps. Every version
that comes in and every episode that ends is a JSON line on stdout. SIGTERM or Ctrl-C stops it.

    python play.py --episodes 100
"""

import argparse
import json
import signal
import sys
import time

import gymnasium as gym
import torch
from policy import act, make_policy

import wsync


def report(event: str, **facts: float | None) -> None:
    """Print one JSON line, stamped with the time."""
    print(json.dumps({"event": event, "time": time.time(), **facts}), flush=True)


def tell(version: int, step: int | None, extras: object) -> None:
    """Report a version that came in; the first one comes while `attach` waits for it."""
    report("version", version=version, step=step)


class Pace:
    """Keeps a loop at `rate` turns a second, so that playing does not eat a whole core."""

    def __init__(self, rate: float) -> None:
        self.period, self.due = 1.0 / rate, time.monotonic()

    def wait(self) -> None:
        now = time.monotonic()
        self.due = max(self.due + self.period, now)
        time.sleep(self.due - now)


def play(name: str, episodes: float, seconds: float, rate: float) -> None:
    """Play until `episodes` have ended or `seconds` have passed since the first version came in."""
    policy = make_policy()
    env = gym.make("CartPole-v1")
    pace = Pace(rate)
    with wsync.attach(policy, name, on_version=tell) as reader:
        until = time.monotonic() + seconds
        played, total, first = 0, 0.0, reader.version
        observation, _ = env.reset(seed=0)
        while played < episodes and time.monotonic() < until:
            reader.refresh()
            observation, reward, terminated, truncated, _ = env.step(act(policy, observation))
            total += float(reward)
            if terminated or truncated:
                report("episode", first_version=first, last_version=reader.version,
                       step=reader.step, **{"return": total})  # fmt: skip
                observation, _ = env.reset()
                played, total, first = played + 1, 0.0, reader.version
            pace.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Play CartPole-v1 with the newest weights.")
    parser.add_argument("name", nargs="?", default="cartpole", help="the segment to attach to")
    parser.add_argument("--episodes", type=float, default=float("inf"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--rate", type=float, default=1500.0, help="steps a second, at most")
    args = parser.parse_args()

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the way Ctrl-C does
    try:
        play(args.name, args.episodes, args.seconds, args.rate)
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
