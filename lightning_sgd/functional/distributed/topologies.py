"""Topologies of gossip: named graphs, and graphs of the user, with their weights.

A topology exists for many numbers of ranks; :meth:`Topology.on` makes it a :class:`Mixing` for one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning_sgd._validation import expect
from lightning_sgd.functional.distributed.mixing import Mixing


class Topology(ABC):
    """A graph for each suitable number of ranks; derive from this class for your own."""

    @abstractmethod
    def row(self, rank: int, round_index: int, num_ranks: int) -> Mapping[int, float]:
        """Return the weights, by rank, of the models that a rank has and receives; they sum to one.

        Args:
            rank: The rank that receives [i].
            round_index: Number of the round, from 0.
            num_ranks: Number of ranks [n].
        """

    def num_rounds(self, num_ranks: int) -> int:
        """Return the number of rounds after which the graph repeats.

        Args:
            num_ranks: Number of ranks [n].
        """
        return 1

    def suits(self, num_ranks: int) -> bool:
        """Tell whether the graph exists for this number of ranks.

        Args:
            num_ranks: Number of ranks [n].
        """
        return True

    @property
    def needs(self) -> str:
        """The suitable numbers of ranks, in words."""
        return "any number of ranks"

    def on(self, num_ranks: int) -> Mixing:
        """Return the rounds among this number of ranks.

        Args:
            num_ranks: Number of ranks [n].

        Raises:
            ValueError: If the graph does not exist for this number of ranks, or a matrix is not doubly stochastic.

        Example:
            >>> Ring().on(4).beta
            0.3333333333333333
        """
        expected = f"one that exists for {num_ranks} ranks"
        expect(self.suits(num_ranks), "topology", expected, self, _choices(self, num_ranks))
        mixing = Mixing(
            num_ranks, self.num_rounds(num_ranks), lambda rank, t: self.row(rank, t, num_ranks)
        )
        remedy = "Rows and columns of the weights must sum to 1, or the mean of the models drifts."
        expect(mixing.is_doubly_stochastic, "topology", "doubly stochastic", self, remedy)
        return mixing


@dataclass(frozen=True)
class Ring(Topology):
    """Connects each rank with the ones before and after it, with weights ⅓; two ranks with weights ½.

    Two messages per round, as many bytes as a ring all-reduce, but a rank waits for its neighbours only.
    β = ⅓ + ⅔ cos(2π/n) for even n ≥ 4.

    Example:
        >>> Ring().on(5).receive(0, 0)
        {1: 0.3333333333333333, 4: 0.3333333333333333}
    """

    def row(self, rank: int, round_index: int, num_ranks: int) -> Mapping[int, float]:
        """Return the weights, the same in every round."""
        # A set: of two ranks both neighbours are the same, which has weight ½ and not ⅔.
        return _evenly({(rank + step) % num_ranks for step in (-1, 0, 1)})


@dataclass(frozen=True)
class Torus(Topology):
    """Connects each rank with four neighbours in a grid that closes in both directions, with weights ⅕.

    Args:
        rows: Rows of the grid; by default those of the grid nearest to a square.

    Example:
        >>> sorted(Torus().on(16).receive(0, 0)), round(Torus().on(16).beta, 4)
        ([1, 3, 4, 12], 0.6)
    """

    rows: int | None = None

    def __post_init__(self) -> None:
        remedy = "With two rows the neighbours above and below would be the same."
        expect(self.rows is None or self.rows >= 3, "rows", "at least 3", self.rows, remedy)

    def suits(self, num_ranks: int) -> bool:
        """Tell whether there is a grid of at least three rows and columns; else neighbours on both sides coincide."""
        return bool(self._sides(num_ranks))

    @property
    def needs(self) -> str:
        """The suitable grids, in words."""
        return f"{self.rows or 'at least 3'} rows and at least 3 columns"

    def row(self, rank: int, round_index: int, num_ranks: int) -> Mapping[int, float]:
        """Return the weights, the same in every round."""
        rows, columns = self._sides(num_ranks)
        r, c = divmod(rank, columns)
        vertical = [(r + step) % rows * columns + c for step in (-1, 1)]
        horizontal = [r * columns + (c + step) % columns for step in (-1, 1)]
        return _evenly({rank, *vertical, *horizontal})

    def _sides(self, num_ranks: int) -> tuple[int, ...]:
        # Below three rows or columns both neighbours of a rank would be the same.
        heights = range(3, num_ranks // 3 + 1) if self.rows is None else (self.rows,)
        sides = [(h, num_ranks // h) for h in heights if h >= 3 and num_ranks % h == 0]
        fitting = [(h, w) for h, w in sides if w >= 3]
        # The grid nearest to a square has the smallest β.
        return min(fitting, key=lambda side: abs(side[0] - side[1]), default=())


@dataclass(frozen=True)
class Exponential(Topology):
    """Connects each rank with those 1, 2, 4, … places after it, with equal weights.

    ⌈log₂ n⌉ messages per round; β = 1 − 2/(1 + ⌈log₂ n⌉) for even n.

    Example:
        >>> sorted(Exponential().on(8).receive(0, 0)), Exponential().on(8).beta
        ([1, 2, 4], 0.5)
    """

    def row(self, rank: int, round_index: int, num_ranks: int) -> Mapping[int, float]:
        """Return the weights, the same in every round."""
        hops = range(num_hops(num_ranks))
        return _evenly({rank, *((rank + 2**t) % num_ranks for t in hops)})


@dataclass(frozen=True)
class OnePeerExponential(Topology):
    """Connects each rank with one neighbour per round, in turn 1, 2, 4, … places after it, with weights ½.

    One message per round, the fewest bytes of all. If n is a power of two, any log₂ n successive rounds make an exact
    average.

    Example:
        >>> mixing = OnePeerExponential().on(8)
        >>> [mixing.receive(0, round) for round in range(4)]
        [{1: 0.5}, {2: 0.5}, {4: 0.5}, {1: 0.5}]
        >>> round(mixing.beta, 6)
        0.0
    """

    def num_rounds(self, num_ranks: int) -> int:
        """Return ⌈log₂ n⌉."""
        return max(1, num_hops(num_ranks))

    def row(self, rank: int, round_index: int, num_ranks: int) -> Mapping[int, float]:
        """Return the weights of round r modulo ⌈log₂ n⌉."""
        hop = 2 ** (round_index % self.num_rounds(num_ranks))
        return _evenly({rank, (rank + hop) % num_ranks})


@dataclass(frozen=True)
class Hypercube(Topology):
    """Connects each rank with those whose number differs in one binary digit, with equal weights.

    log₂ n messages per round; β = 1 − 2/(1 + log₂ n). All edges are undirected.

    Example:
        >>> sorted(Hypercube().on(8).receive(5, 0))
        [1, 4, 7]
    """

    def suits(self, num_ranks: int) -> bool:
        """Tell whether the number is a power of two."""
        return num_ranks & (num_ranks - 1) == 0

    @property
    def needs(self) -> str:
        """The suitable numbers, in words."""
        return "a power of two"

    def row(self, rank: int, round_index: int, num_ranks: int) -> Mapping[int, float]:
        """Return the weights, the same in every round."""
        return _evenly({rank, *(rank ^ 2**t for t in range(num_hops(num_ranks)))})


@dataclass(frozen=True)
class Complete(Topology):
    """Connects all ranks: an exact average by n − 1 messages, for comparison.

    One all-reduce, with ``period=1``, has the same result and sends less.

    Example:
        >>> round(Complete().on(8).beta, 6)
        0.0
    """

    def row(self, rank: int, round_index: int, num_ranks: int) -> Mapping[int, float]:
        """Return the weights, the same in every round."""
        return _evenly(set(range(num_ranks)))


class FromGraph(Topology):
    """A graph of the user, with one node per rank.

    Undirected graphs get Metropolis–Hastings weights, 1/(1 + the larger of both degrees), directed ones 1/(1 + the
    largest degree); the rest is the weight of the rank's own model. In a directed graph every node must have as many
    incoming as outgoing edges.

    Args:
        graph: A networkx graph, whose nodes 0 … n − 1 are the ranks (other nodes are numbered in their order);
            undirected edges such as ``[[0, 1], [1, 2]]``; or the name of a file with one such edge per line.

    Example:
        >>> star = FromGraph([[0, 1], [0, 2], [0, 3]])
        >>> star.on(4).receive(1, 0), round(star.on(4).beta, 4)
        ({0: 0.25}, 0.75)
    """

    def __init__(self, graph: Any) -> None:
        if not hasattr(graph, "edges"):
            graph = _networkx(graph)
        nodes = list(graph.nodes)
        # networkx lists nodes in the order in which edges name them; numbered ones are to be the ranks of these
        # numbers.
        order = sorted(nodes) if set(nodes) == set(range(len(nodes))) else nodes
        ranks = {node: rank for rank, node in enumerate(order)}
        self.num_nodes, self.is_directed = len(order), bool(graph.is_directed())
        # Every rank keeps its own model anyway, so loops say nothing.
        edges = {(ranks[a], ranks[b]) for a, b in graph.edges() if a != b}
        self.edges = edges if self.is_directed else edges | {(b, a) for a, b in edges}
        self._degrees = Counter(a for a, _ in self.edges)

    def __repr__(self) -> str:
        return f"FromGraph({self.num_nodes} nodes, {len(self.edges)} edges)"

    def suits(self, num_ranks: int) -> bool:
        """Tell whether there are as many ranks as nodes."""
        return num_ranks == self.num_nodes

    @property
    def needs(self) -> str:
        """The suitable number, in words."""
        return "as many ranks as the graph has nodes"

    def row(self, rank: int, round_index: int, num_ranks: int) -> Mapping[int, float]:
        """Return the weights, the same in every round."""
        row = {a: self._weight(a, b) for a, b in self.edges if b == rank}
        # The rest goes to the own model: rows sum to one by construction, columns by symmetry or by equal degrees.
        return {**row, rank: 1 - sum(row.values())}

    def _weight(self, a: int, b: int) -> float:
        rivals = (
            # One weight for all edges of a directed graph: with weights by pairs columns would not sum to one.
            self._degrees.values() if self.is_directed else (self._degrees[a], self._degrees[b])
        )
        return 1 / (1 + max(rivals))


def _networkx(graph: object) -> Any:
    try:
        import networkx as nx
    except ImportError as error:
        raise ImportError(
            "FromGraph needs networkx for edges and files: pip install 'lightning-sgd[graphs]'."
        ) from error
    if isinstance(graph, (str, Path)):
        return nx.read_edgelist(graph, nodetype=int)
    return nx.Graph([tuple(edge) for edge in cast("Iterable[Iterable[int]]", graph)])


NAMED: dict[str, type[Topology]] = {
    "ring": Ring,
    "torus": Torus,
    "exponential": Exponential,
    "one_peer_exponential": OnePeerExponential,
    "hypercube": Hypercube,
    "complete": Complete,
}


def num_hops(num_ranks: int) -> int:
    """Return ⌈log₂ n⌉, by integer arithmetic.

    Example:
        >>> [num_hops(n) for n in (1, 2, 3, 4, 5, 8, 9)]
        [0, 1, 2, 2, 3, 3, 4]
    """
    return (num_ranks - 1).bit_length()


def _evenly(ranks: set[int]) -> Mapping[int, float]:
    return dict.fromkeys(ranks, 1 / len(ranks))


def _choices(topology: Topology, num_ranks: int) -> str:
    sizes = [n for n in range(2, 4 * num_ranks + 9) if topology.suits(n)]
    nearest = sorted(sorted(sizes, key=lambda n: abs(n - num_ranks))[:3])
    fitting = [kind.__name__ for kind in NAMED.values() if kind().suits(num_ranks)]
    return (
        f"It needs {topology.needs}, such as {', '.join(map(str, nearest))}; "
        f"{num_ranks} ranks can have {', '.join(fitting)} or a FromGraph."
    )
