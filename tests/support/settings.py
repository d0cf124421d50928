"""Arguments with which the suites build each plug-in: required ones at least, and small ones for a small task."""

from __future__ import annotations

from lightning_sgd import BiasedSGDProblem

PROBLEM = BiasedSGDProblem(m=0.5, L=1.0, G2=0.1)

SETTINGS = {
    "MaSS": {"lr": 0.1},
    "NovoGrad": {"lr": 0.01},
    "RankMonitor": {
        "min_side": 4,
        "every_n_steps": 1,
        "max_overhead": 1.0,
        "log_layers": True,
        "log_bound": True,
    },
    "TailIndexMonitor": {
        "num_batches": 8,
        "every_n_steps": 2,
        "max_overhead": 1.0,
        "log_layers": True,
    },
    "GaussianityMonitor": {
        "num_batches": 20,
        "num_directions": 16,
        "every_n_steps": 2,
        "max_overhead": 1.0,
        "log_layers": True,
    },
    "CriticalBatchSizeMonitor": {
        "num_batches": 4,
        "every_n_steps": 2,
        "max_overhead": 1.0,
        "log_layers": True,
    },
    "LocalSGDStrategy": {"period": 3},
    "CommunicationMonitor": {"every_n_steps": 1, "max_overhead": 1.0},
    "DiminishingLR": {"mu": 0.5, "L": 1.0},
    "BiasedSGDLR": {"problem": PROBLEM, "U0": 1.0, "delta": 0.01, "c": 0.01},
    "GradientErrorMonitor": {
        "compressor": "int8",
        "problem": PROBLEM,
        "every_n_steps": 1,
        "max_overhead": 1.0,
    },
    "TRSGD": {"lr": 0.05, "inner_steps": 3},
    "TRAdam": {"lr": 0.01, "inner_steps": 3},
    "TrajectoryRegularization": {"inner_steps": 3},
    "GossipPGAStrategy": {"period": 3},
    "OverlapLocalSGDStrategy": {"period": 3},
    "ByzantineStrategy": {"aggregator": "filter"},
    "ByzantineMonitor": {"every_n_steps": 1, "max_overhead": 1.0},
    "PrioritySampling": {"uniform_mix": 0.5},
}
"""By name of the plug-in."""
