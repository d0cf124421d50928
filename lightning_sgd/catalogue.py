"""The single table of methods.

The console command ``lightning-sgd list``, the overview and the API reference of the documentation, and
the tests that every method must pass are generated from :data:`CATALOGUE`. Adding a method means adding
one record here; the tests then name every place that is still missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from lightning_sgd.functional.biased_sgd import BiasedSGDProblem

Kind: TypeAlias = Literal["optimizer", "lr_scheduler", "callback", "strategy", "model", "data"]

FOLDERS: Mapping[Kind, str] = MappingProxyType(
    {
        "optimizer": "lightning_sgd/optimizers",
        "lr_scheduler": "lightning_sgd/lr_schedulers",
        "callback": "callbacks",
        "strategy": "strategies",
        "model": "lightning_sgd/models",
        "data": "lightning_sgd/data",
    }
)
"""Where, seen from the root of the repository, the adapters of each kind live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    venue: str
    year: int
    url: str

    def __str__(self) -> str:
        return f"{self.authors}. {self.title}. {self.venue}, {self.year}. {self.url}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One class that a user switches on in YAML.

    Attributes:
        name: Public name, ``lightning_sgd.<name>``.
        kind: What sort of object it is; decides the folder and the conformance suite.
        settings: Arguments with which the conformance suites build it; required ones at least.
        metric_keys: Keys that it logs; ``*`` stands for a layer name.
    """

    name: str
    kind: Kind
    settings: Mapping[str, object] = field(default_factory=dict)
    metric_keys: tuple[str, ...] = ()

    @property
    def class_path(self) -> str:
        """The spelling that works in every LightningCLI config."""
        return f"lightning_sgd.{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One published method and the fixed set of places that belong to it.

    Attributes:
        key: File stem shared by the functional core, the test, the example and the card.
        title: Name of the method as the paper spells it.
        summary: One sentence: what it does.
        use_when: One sentence: the symptom that leads a user to it.
        paper: The reference.
        plugins: The classes that YAML can name, main one first.
        helpers: Further public names, functions and result types.
    """

    key: str
    title: str
    summary: str
    use_when: str
    paper: Paper
    plugins: tuple[Plugin, ...]
    helpers: tuple[str, ...] = ()

    @property
    def symbols(self) -> tuple[str, ...]:
        """Every public name of the method."""
        return (*(plugin.name for plugin in self.plugins), *self.helpers)

    @property
    def core(self) -> str:
        """Module that holds the mathematics."""
        return f"lightning_sgd.functional.{self.key}"

    @property
    def example(self) -> str:
        """YAML that trains with the method, relative to the root of the repository."""
        return f"examples/{self.key}.yaml"

    @property
    def card(self) -> str:
        """Documentation of the method, relative to the root of the repository."""
        return f"docs/methods/{self.key}.md"

    @property
    def tests(self) -> tuple[str, ...]:
        """Files that test the method, relative to the root of the repository."""
        folders = [FOLDERS[plugin.kind].removeprefix("lightning_sgd/") for plugin in self.plugins]
        return tuple(dict.fromkeys(f"tests/{folder}/test_{self.key}.py" for folder in folders))


_PROBLEM = BiasedSGDProblem(m=0.5, L=1.0, G2=0.1)

CATALOGUE: tuple[Method, ...] = (
    Method(
        key="mass",
        title="MaSS",
        summary="Nesterov SGD with a compensation term that keeps it stable at SGD's step size.",
        use_when="Nesterov momentum is unstable at the step size where plain SGD still trains.",
        paper=Paper(
            title="Accelerating SGD with momentum for over-parameterized learning",
            authors="Chaoyue Liu, Mikhail Belkin",
            venue="ICLR",
            year=2020,
            url="https://arxiv.org/abs/1810.13395",
        ),
        plugins=(Plugin(name="MaSS", kind="optimizer", settings={"lr": 0.1}),),
        helpers=(
            "MaSSHyperParameters",
            "mass_hyperparameters",
            "critical_batch_sizes",
            "batch_size_regime",
            "ConditionNumbers",
            "estimate_condition_numbers",
            "effective_batch_size",
        ),
    ),
    Method(
        key="novograd",
        title="NovoGrad",
        summary="SGD with momentum on gradients normalised layer by layer; half of Adam's optimizer memory.",
        use_when="Adam's memory is too much, or the step size must hold for any scale of loss and batch.",
        paper=Paper(
            title=(
                "Training Deep Networks with Stochastic Gradient Normalized by Layerwise Adaptive Second Moments"
            ),
            authors=(
                "Boris Ginsburg, Patrice Castonguay, Oleksii Hrinchuk, Oleksii Kuchaiev, Ryan Leary, "
                "Vitaly Lavrukhin, Jason Li, Huyen Nguyen, Yang Zhang, Jonathan M. Cohen"
            ),
            venue="arXiv",
            year=2020,
            url="https://arxiv.org/abs/1905.11286",
        ),
        plugins=(Plugin(name="NovoGrad", kind="optimizer", settings={"lr": 0.01}),),
    ),
    Method(
        key="rank_collapse",
        title="Rank collapse",
        summary="Watches how mini-batch noise and weight decay drive weight matrices towards low rank.",
        use_when="You want to know which layers lose rank, die, or could be compressed, and since when.",
        paper=Paper(
            title="SGD and Weight Decay Secretly Minimize the Rank of Your Neural Network",
            authors="Tomer Galanti, Zachary S. Siegel, Aparna Gupte, Tomaso Poggio",
            venue="CPAL",
            year=2025,
            url="https://arxiv.org/abs/2206.05794",
        ),
        plugins=(
            Plugin(
                name="RankMonitor",
                kind="callback",
                settings={
                    "min_side": 4,
                    "every_n_steps": 1,
                    "max_overhead": 1.0,
                    "log_layers": True,
                    "log_bound": True,
                },
                metric_keys=(
                    "rank/rank_*",
                    "rank/stable_rank",
                    "rank/effective_rank",
                    "rank/frobenius_norm",
                    "rank/num_dead",
                    "rank/bound_*",
                    "rank/*/*",
                ),
            ),
        ),
        helpers=("WeightRank", "RankMe", "spectral_stats"),
    ),
    Method(
        key="tail_index",
        title="Tail index",
        summary="Watches how heavy-tailed gradient noise is, and says when the number is an artefact.",
        use_when="You want to know whether gradient noise is heavy-tailed before you clip or change the batch size.",
        paper=Paper(
            title="A Tail-Index Analysis of Stochastic Gradient Noise in Deep Neural Networks",
            authors="Umut Şimşekli, Levent Sagun, Mert Gürbüzbalaban",
            venue="ICML",
            year=2019,
            url="https://arxiv.org/abs/1901.06053",
        ),
        plugins=(
            Plugin(
                name="TailIndexMonitor",
                kind="callback",
                settings={
                    "num_batches": 8,
                    "every_n_steps": 2,
                    "max_overhead": 1.0,
                    "log_layers": True,
                },
                metric_keys=(
                    "tail_index/coordinate",
                    "tail_index/coordinate_error",
                    "tail_index/pooled",
                    "tail_index/pooled_shuffled",
                    "tail_index/zero_fraction",
                    "tail_index/coordinate/*",
                ),
            ),
        ),
        helpers=(
            "TailIndex",
            "TailIndexResult",
            "log_moment_tail_index",
            "dyadic_tail_index",
            "hill_tail_index",
            "pickands_tail_index",
            "dedh_tail_index",
            "mcculloch_tail_index",
            "ecf_tail_index",
            "sample_stable",
        ),
    ),
    Method(
        key="gradient_gaussianity",
        title="Gaussianity",
        summary="Tests whether gradient noise is Gaussian, against what Gaussian noise of its covariance would give.",
        use_when="A theory or a rule for batch sizes supposes Gaussian gradient noise, and you want to see if it is.",
        paper=Paper(
            title="Non-Gaussianity of Stochastic Gradient Noise",
            authors="Abhishek Panigrahi, Raghav Somani, Navin Goyal, Praneeth Netrapalli",
            venue="NeurIPS workshop Science meets Engineering of Deep Learning",
            year=2019,
            url="https://arxiv.org/abs/1910.09626",
        ),
        plugins=(
            Plugin(
                name="GaussianityMonitor",
                kind="callback",
                settings={
                    "num_batches": 20,
                    "num_directions": 16,
                    "every_n_steps": 2,
                    "max_overhead": 1.0,
                    "log_layers": True,
                },
                metric_keys=(
                    "gaussianity/rejected",
                    "gaussianity/expected",
                    "gaussianity/limit",
                    "gaussianity/p_value",
                    "gaussianity/coordinate_rejected",
                    "gaussianity/coordinate_expected",
                    "gaussianity/coordinate_limit",
                    "gaussianity/coordinate_p_value",
                    "gaussianity/statistic",
                    "gaussianity/expected_statistic",
                    "gaussianity/rejected_anderson_darling",
                    "gaussianity/norm_kurtosis",
                    "gaussianity/effective_dimension",
                    "gaussianity/rejected/*",
                ),
            ),
        ),
        helpers=(
            "GradientGaussianity",
            "GaussianityResult",
            "GaussianitySettings",
            "DirectionTests",
            "NormalityTest",
            "gradient_gaussianity",
            "shapiro_wilk",
            "anderson_darling",
            "jarque_bera",
            "gram_projections",
            "effective_dimension",
        ),
    ),
    Method(
        key="critical_batch_size",
        title="Critical batch size",
        summary="Watches the noise scale of gradients, and says which batch size still pays and which does not.",
        use_when="You want to know whether a larger batch would save steps, and how much larger the step may be.",
        paper=Paper(
            title=(
                "Parallelizing Stochastic Gradient Descent for Least Squares Regression: Mini-batching, Averaging, "
                "and Model Misspecification"
            ),
            authors="Prateek Jain, Sham M. Kakade, Rahul Kidambi, Praneeth Netrapalli, Aaron Sidford",
            venue="JMLR",
            year=2018,
            url="https://arxiv.org/abs/1610.03774",
        ),
        plugins=(
            Plugin(
                name="CriticalBatchSizeMonitor",
                kind="callback",
                settings={
                    "num_batches": 4,
                    "every_n_steps": 2,
                    "max_overhead": 1.0,
                    "log_layers": True,
                },
                metric_keys=(
                    "critical_batch_size/noise_scale",
                    "critical_batch_size/low",
                    "critical_batch_size/high",
                    "critical_batch_size/noise_trace",
                    "critical_batch_size/gradient_sq",
                    "critical_batch_size/noise_scale/*",
                ),
            ),
        ),
        helpers=(
            "GradientNoiseScale",
            "NoiseScale",
            "LeastSquaresConstants",
            "least_squares_constants",
            "critical_batch_size",
            "max_learning_rate",
        ),
    ),
    Method(
        key="local_sgd",
        title="Local SGD",
        summary="Every rank trains on its own, and now and then all go on from the mean of their models.",
        use_when="Waiting for the gradients of other ranks takes a good part of every step.",
        paper=Paper(
            title="Local SGD Converges Fast and Communicates Little",
            authors="Sebastian U. Stich",
            venue="ICLR",
            year=2019,
            url="https://arxiv.org/abs/1805.09767",
        ),
        plugins=(
            Plugin(
                name="LocalSGDStrategy",
                kind="strategy",
                settings={"period": 3},
                metric_keys=(
                    "comm/bytes_per_step",
                    "comm/messages_per_step",
                    "comm/blocked_seconds_per_step",
                ),
            ),
            Plugin(
                name="CommunicationMonitor",
                kind="callback",
                settings={"every_n_steps": 1, "max_overhead": 1.0},
                metric_keys=(
                    "communication/bytes_per_step",
                    "communication/messages_per_step",
                    "communication/blocked_seconds_per_step",
                    "communication/blocked_share",
                    "communication/consensus_distance",
                ),
            ),
        ),
    ),
    Method(
        key="hogwild",
        title="Hogwild!",
        summary="Step sizes that fall like 1/t, with proofs for SGD alone and for delayed lock-free updates.",
        use_when="SGD at a constant step size stops at a noise floor, or several processes update with delays.",
        paper=Paper(
            title="SGD and Hogwild! Convergence Without the Bounded Gradients Assumption",
            authors="Lam M. Nguyen, Phuong Ha Nguyen, Marten van Dijk, Peter Richtárik, Katya Scheinberg, Martin Takáč",
            venue="ICML",
            year=2018,
            url="https://arxiv.org/abs/1802.03801",
        ),
        plugins=(
            Plugin(name="DiminishingLR", kind="lr_scheduler", settings={"mu": 0.5, "L": 1.0}),
        ),
        helpers=("diminishing_bound",),
    ),
    Method(
        key="biased_sgd",
        title="Biased SGD",
        summary="Plans step sizes for gradients with an error, and says how much error a training bears.",
        use_when="Gradients are compressed, rounded or inexact, and you want a step size and a budget for the error.",
        paper=Paper(
            title="Analysis of Biased Stochastic Gradient Descent Using Sequential Semidefinite Programs",
            authors="Bin Hu, Peter Seiler, Laurent Lessard",
            venue="Mathematical Programming",
            year=2021,
            url="https://arxiv.org/abs/1711.00987",
        ),
        plugins=(
            Plugin(
                name="BiasedSGDLR",
                kind="lr_scheduler",
                settings={"problem": _PROBLEM, "U0": 1.0, "delta": 0.01, "c": 0.01},
            ),
            Plugin(
                name="GradientErrorMonitor",
                kind="callback",
                settings={
                    "compressor": "int8",
                    "problem": _PROBLEM,
                    "every_n_steps": 1,
                    "max_overhead": 1.0,
                },
                metric_keys=(
                    "gradient_error/relative",
                    "gradient_error/cosine",
                    "gradient_error/delta",
                    "gradient_error/c",
                    "gradient_error/floor",
                ),
            ),
        ),
        helpers=(
            "BiasedSGDProblem",
            "StepBound",
            "biased_sgd_bound",
            "biased_sgd_floor",
            "biased_sgd_sdp",
            "biased_sgd_step_bound",
            "fit_error_model",
            "max_relative_error",
            "optimal_step",
        ),
    ),
    Method(
        key="tra",
        title="TRA",
        summary="Stages of a few steps, each pulled to its start and with falling steps, for tiny batches.",
        use_when="Memory allows batches of a few samples only, and training at the usual step size fails.",
        paper=Paper(
            title="Taming the Noisy Gradient: Train Deep Neural Networks with Small Batch Sizes",
            authors="Yikai Zhang, Hui Qu, Chao Chen, Dimitris Metaxas",
            venue="IJCAI",
            year=2019,
            url="https://doi.org/10.24963/ijcai.2019/604",
        ),
        plugins=(
            Plugin(name="TRSGD", kind="optimizer", settings={"lr": 0.05, "inner_steps": 3}),
            Plugin(name="TRAdam", kind="optimizer", settings={"lr": 0.01, "inner_steps": 3}),
            Plugin(name="TrajectoryRegularization", kind="callback", settings={"inner_steps": 3}),
        ),
    ),
    Method(
        key="gossip_pga",
        title="Gossip-PGA",
        summary="Ranks mix their models with neighbours in a graph after every step, and now and then with all.",
        use_when="The latency of all-reduces over many ranks takes a good part of every step.",
        paper=Paper(
            title="Accelerating Gossip SGD with Periodic Global Averaging",
            authors="Yiming Chen, Kun Yuan, Yingya Zhang, Pan Pan, Yinghui Xu, Wotao Yin",
            venue="ICML",
            year=2021,
            url="https://arxiv.org/abs/2105.09080",
        ),
        plugins=(
            Plugin(
                name="GossipPGAStrategy",
                kind="strategy",
                settings={"period": 3},
                metric_keys=(
                    "comm/bytes_per_step",
                    "comm/messages_per_step",
                    "comm/blocked_seconds_per_step",
                    "gossip/consensus_distance",
                    "gossip/period",
                ),
            ),
        ),
        helpers=(
            "Topology",
            "Mixing",
            "Ring",
            "Torus",
            "Exponential",
            "OnePeerExponential",
            "Hypercube",
            "Complete",
            "FromGraph",
        ),
    ),
    Method(
        key="overlap_local_sgd",
        title="Overlap-Local-SGD",
        summary="Local SGD that exchanges models in the background and pulls each towards the last mean.",
        use_when="Ranks of Local SGD still wait for each other, or one of them is late now and then.",
        paper=Paper(
            title="Overlap Local-SGD: An Algorithmic Approach to Hide Communication Delays in Distributed SGD",
            authors="Jianyu Wang, Hao Liang, Gauri Joshi",
            venue="ICASSP",
            year=2020,
            url="https://arxiv.org/abs/2002.09539",
        ),
        plugins=(
            Plugin(
                name="OverlapLocalSGDStrategy",
                kind="strategy",
                settings={"period": 3},
                metric_keys=(
                    "comm/bytes_per_step",
                    "comm/messages_per_step",
                    "comm/blocked_seconds_per_step",
                    "overlap/anchor_distance",
                ),
            ),
        ),
    ),
    Method(
        key="byzantine",
        title="Byzantine SGD",
        summary="Combines the gradients of ranks or micro-batches so that a few wrong ones do not matter.",
        use_when="A rank may compute wrongly, send NaN, or train on poisoned data, and training must go on.",
        paper=Paper(
            title="Byzantine-Resilient SGD in High Dimensions on Heterogeneous Data",
            authors="Deepesh Data, Suhas Diggavi",
            venue="ISIT",
            year=2021,
            url="https://arxiv.org/abs/2005.07866",
        ),
        plugins=(
            Plugin(
                name="ByzantineStrategy",
                kind="strategy",
                settings={"aggregator": "filter"},
                metric_keys=(
                    "comm/bytes_per_step",
                    "comm/messages_per_step",
                    "comm/blocked_seconds_per_step",
                ),
            ),
            Plugin(
                name="ByzantineMonitor",
                kind="callback",
                settings={"every_n_steps": 1, "max_overhead": 1.0},
                metric_keys=(
                    "byzantine/weight/*",
                    "byzantine/distance/*",
                    "byzantine/rejected/*",
                    "byzantine/num_rejected",
                ),
            ),
        ),
    ),
    Method(
        key="priority_sampling",
        title="Prioritized SGD",
        summary="Draws hard samples more often while training changes what is hard, with weights against the bias.",
        use_when="Most samples are learnt already, and every epoch still spends most of its time on them.",
        paper=Paper(
            title=(
                "Distributed Framework for Accelerating Training of Deep Learning Models through Prioritization"
            ),
            authors="Tian Zhou, Lixin Gao",
            venue="IC2E",
            year=2021,
            url="https://doi.org/10.1109/IC2E52221.2021.00035",
        ),
        plugins=(
            Plugin(
                name="PrioritySampling",
                kind="callback",
                settings={"uniform_mix": 0.5},
                metric_keys=(
                    "priority/effective_batch_share",
                    "priority/max_weight",
                    "priority/gain",
                    "priority/lag",
                    "priority/mean_age",
                    "priority/effective_share",
                    "priority/never_drawn",
                ),
            ),
        ),
        helpers=(
            "PrioritySampler",
            "PriorityBatchSampler",
            "SumTree",
            "Presampling",
            "InBatchSelection",
            "priority_mean",
        ),
    ),
)


def plugins(kind: Kind | None = None) -> Iterator[Plugin]:
    """Iterate over the plug-ins of all methods, or of one kind.

    Example:
        >>> [plugin.name for plugin in plugins("optimizer")][:1]
        ['MaSS']
    """
    for method in CATALOGUE:
        for plugin in method.plugins:
            if kind is None or plugin.kind == kind:
                yield plugin


def find(name: str) -> Method | None:
    """The method with this key, title or public name, ignoring case; ``None`` if there is none.

    Example:
        >>> find("MASS").title
        'MaSS'
        >>> find("mass_hyperparameters").key
        'mass'
    """
    wanted = name.casefold()
    for method in CATALOGUE:
        if wanted in {text.casefold() for text in (method.key, method.title, *method.symbols)}:
            return method
    return None
