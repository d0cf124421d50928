"""Draw hard samples more often."""

from lightning_sgd.callbacks.priority_sampling.priority_sampling import PrioritySampling

__all__ = ["PrioritySampling"]
