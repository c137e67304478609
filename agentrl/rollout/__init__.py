"""Rollouts: episodes, actors, strategies and their manager. Call it: `agentrl.rollout("run.yaml", out="runs/look")`."""

from agentrl.verb import make_callable

make_callable(__name__)
