"""A trainer: learns CartPole with PPO on one core and leaves checkpoints behind, nothing else.

It knows nothing of wsync. Every other second it writes the actor's weights as
`step_000123.safetensors`, under a temporary name first, so that a checkpoint appears whole or not
at all, and keeps the newest few. For each one it prints a JSON line: its step, the time it appeared
and the mean return of the latest training episodes.

    python train.py checkpoints --seconds 30
"""

import argparse
import json
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
from policy import make_policy
from safetensors.torch import save_file
from torch import Tensor, nn

ENVS, ROLLOUT, EPOCHS, MINIBATCH = 16, 64, 4, 256
GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2
RATES = (1e-4, 1e-3)  # learning rates of actor and critic: slow enough to watch it climb
REWARD = 0.05  # for each step upright, so that values stay within a few units


@dataclass
class Rollout:
    """`ROLLOUT` steps of `ENVS` environments; all but the observations are (ROLLOUT, ENVS)."""

    observations: Tensor  # (ROLLOUT + 1, ENVS, 4)
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    ended: Tensor  # terminated, or out of time
    resets: Tensor  # steps that only began a new episode, and teach nothing


class Collector:
    """Plays the policy in all environments at once and remembers the latest returns."""

    def __init__(self, seed: int) -> None:
        self.envs = gym.make_vec("CartPole-v1", num_envs=ENVS)
        self.observation = torch.from_numpy(self.envs.reset(seed=seed)[0])
        self.fresh = torch.zeros(ENVS, dtype=torch.bool)  # the next step of these is a reset
        self.running = torch.zeros(ENVS)
        self.returns: deque[float] = deque(maxlen=50)

    @torch.no_grad()
    def collect(self, policy: nn.Module) -> Rollout:
        rollout = Rollout(
            torch.zeros(ROLLOUT + 1, ENVS, 4),
            torch.zeros(ROLLOUT, ENVS, dtype=torch.int64),
            torch.zeros(ROLLOUT, ENVS),
            *(torch.zeros(ROLLOUT, ENVS, dtype=torch.bool) for _ in range(3)),
        )
        for t in range(ROLLOUT):
            action = policy(self.observation).softmax(-1).multinomial(1).squeeze(-1)
            observation, reward, terminated, truncated, _ = self.envs.step(action.numpy())
            rollout.observations[t] = self.observation
            rollout.actions[t] = action
            rollout.rewards[t] = torch.from_numpy(reward)
            rollout.terminated[t] = torch.from_numpy(terminated)
            rollout.ended[t] = torch.from_numpy(terminated | truncated)
            rollout.resets[t] = self.fresh
            self.observation = torch.from_numpy(observation)
            self.fresh = rollout.ended[t]
            self.running += rollout.rewards[t]
            self.returns.extend(self.running[self.fresh].tolist())
            self.running[self.fresh] = 0.0
        rollout.observations[ROLLOUT] = self.observation
        return rollout


class Learner:
    """The actor, its critic, and one PPO update of both."""

    def __init__(self) -> None:
        self.policy = make_policy()
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
        self.parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam([{"params": net.parameters()} for net in (self.policy, self.critic)])

    def update(self, rollout: Rollout, progress: float) -> None:
        """Learn from one rollout; `progress`, from 0 to 1, lowers the learning rates to nothing."""
        for group, rate in zip(self.optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate * (1.0 - progress)
        advantages, targets, logprobs = self.judge(rollout)
        keep = ~rollout.resets.flatten()
        observations = rollout.observations[:-1].flatten(0, 1)[keep]
        actions, advantages = rollout.actions.flatten()[keep], advantages.flatten()[keep]
        targets, logprobs = targets.flatten()[keep], logprobs.flatten()[keep]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        for _ in range(EPOCHS):
            for part in torch.split(torch.randperm(len(actions)), MINIBATCH):
                now = self.logprobs(observations[part])
                ratio = (of(actions[part], now) - logprobs[part]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                gain = torch.min(ratio * advantages[part], clipped * advantages[part]).mean()
                error = (self.values(observations[part]) - targets[part]).square().mean()
                entropy = -(now.exp() * now).sum(-1).mean()
                loss = -gain + 0.5 * error - 0.01 * entropy
                self.optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(self.parameters, 0.5)
                self.optimizer.step()

    def values(self, observations: Tensor) -> Tensor:
        return torch.squeeze(self.critic(observations), -1)

    def logprobs(self, observations: Tensor) -> Tensor:
        return torch.log_softmax(self.policy(observations), -1)

    @torch.no_grad()
    def judge(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages (generalised advantage estimation), value targets and log-probabilities."""
        values = self.values(rollout.observations)
        ahead = REWARD * rollout.rewards + GAMMA * values[1:] * ~rollout.terminated - values[:-1]
        advantages, later = torch.zeros_like(ahead), torch.zeros(ENVS)
        for t in reversed(range(ROLLOUT)):
            later = ahead[t] + GAMMA * LAMBDA * later * ~rollout.ended[t]
            advantages[t] = later
        logprobs = of(rollout.actions, self.logprobs(rollout.observations[:-1]))
        return advantages, advantages + values[:-1], logprobs


def of(actions: Tensor, logprobs: Tensor) -> Tensor:
    """The log-probabilities of these actions, out of those of all actions."""
    return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def save(policy: nn.Module, directory: Path, step: int, keep: int) -> float:
    """Write one checkpoint, drop the oldest beyond `keep`; returns the time it got its name."""
    path = directory / f"step_{step:06d}.safetensors"
    temporary = directory / f".step_{step:06d}.tmp"
    save_file(policy.state_dict(), temporary, metadata={"step": str(step)})
    appeared = time.time()
    os.replace(temporary, path)
    for old in sorted(directory.glob("step_*.safetensors"))[:-keep]:
        old.unlink()
    return appeared


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn CartPole-v1 and write checkpoints.")
    parser.add_argument("directory", type=Path, help="where the checkpoints go")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to learn")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between checkpoints")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before it learns at all")
    parser.add_argument("--keep", type=int, default=5, help="how many checkpoints stay")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    collector, learner = Collector(args.seed), Learner()
    began, step, saves = time.monotonic(), 0, 0
    while True:
        elapsed = time.monotonic() - began
        done = elapsed >= args.seconds
        if done or elapsed >= saves * args.every:
            appeared = save(learner.policy, args.directory, step, args.keep)
            mean = sum(collector.returns) / len(collector.returns) if collector.returns else None
            line = {"event": "checkpoint", "step": step, "time": appeared, "mean_return": mean}
            print(json.dumps(line), flush=True)
            saves += 1
            if saves == 1:
                time.sleep(args.delay)
                began += args.delay
        if done:
            break
        learner.update(collector.collect(learner.policy), elapsed / args.seconds)
        step += 1


if __name__ == "__main__":
    main()
