"""The base classes of the strategies: replicas, common model, checkpoints."""
