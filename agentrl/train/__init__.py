"""Training: the policy, its updates, and the loop around them. Call it: `agentrl.train("run.yaml")`."""

from agentrl.verb import make_callable

make_callable(__name__)
