"""Mixing matrices against the published table, networkx, NumPy's linear algebra, and what every matrix must keep."""

from __future__ import annotations

import math
import pickle
import sys

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgd import (
    Complete,
    Exponential,
    FromGraph,
    Hypercube,
    OnePeerExponential,
    Ring,
    Topology,
    Torus,
)
from lightning_sgd.functional.distributed.mixing import chain
from lightning_sgd.functional.distributed.topologies import NAMED

# β by number of ranks: ring, torus, mesh with the weights of Metropolis and Hastings, exponential, hypercube.
TABLE = {
    4: (0.3333, None, 0.3333, 0.3333, 0.3333),
    8: (0.8047, None, 0.8536, 0.5000, 0.5000),
    16: (0.9493, 0.6000, 0.8686, 0.6000, 0.6000),
    20: (0.9674, 0.7236, 0.9143, 0.6667, None),
    32: (0.9872, 0.8828, 0.9658, 0.6667, 0.6667),
    50: (0.9947, 0.9236, 0.9785, 0.7143, None),
    64: (0.9968, 0.8828, 0.9677, 0.7143, 0.7143),
    100: (0.9987, 0.9236, 0.9795, 0.7500, None),
}
MESHES = {4: (2, 2), 8: (2, 4), 16: (4, 4), 20: (4, 5), 32: (4, 8), 50: (5, 10), 64: (8, 8)}
MESHES[100] = (10, 10)


def mesh(n):
    return FromGraph(nx.grid_2d_graph(*MESHES[n]))


@pytest.mark.parametrize("n", TABLE)
def test_beta_is_as_published(n):
    graphs = (Ring(), Torus(), mesh(n), Exponential(), Hypercube())
    for graph, expected in zip(graphs, TABLE[n], strict=True):
        assert graph.suits(n) == (expected is not None)
        if expected is not None:
            assert graph.on(n).beta == pytest.approx(expected, abs=1e-4)
            assert graph.on(n).spectral_gap == pytest.approx(1 - expected, abs=1e-4)


@pytest.mark.parametrize("n", [4, 6, 10, 32, 100])
def test_beta_in_closed_form(n):
    assert Ring().on(n).beta == pytest.approx(1 / 3 + 2 / 3 * math.cos(2 * math.pi / n))
    expected = 1 - 2 / (1 + math.ceil(math.log2(n)))
    assert Exponential().on(n).beta == pytest.approx(expected)
    assert Complete().on(n).beta == pytest.approx(0, abs=1e-12)
    one = OnePeerExponential().on(n).matrix(0).numpy()
    assert np.linalg.norm(one - 1 / n, 2) == pytest.approx(math.cos(math.pi / n))


@pytest.mark.parametrize(
    ("n", "beta"), [(3, 0.25), (5, 0.20), (6, 0.22), (20, 0.19), (50, 0.19), (100, 0.19)]
)
def test_a_cycle_of_one_peer_rounds_is_nearly_exact_for_any_number_of_ranks(n, beta):
    assert OnePeerExponential().on(n).beta == pytest.approx(beta, abs=5e-3)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 64])
def test_one_peer_rounds_average_exactly_from_any_start(n):
    mixing, hops = OnePeerExponential().on(n), int(math.log2(n))
    for start in range(hops + 1):
        product = chain([mixing.matrix(start + step) for step in range(hops)])
        torch.testing.assert_close(product, torch.full_like(product, 1 / n), rtol=0, atol=1e-12)


GRAPHS = [Ring(), Torus(), Exponential(), OnePeerExponential(), Hypercube(), Complete()]


@st.composite
def mixings(draw):
    """Any graph of ours for any number of ranks that suits it, or a random graph of networkx."""
    n = draw(st.integers(1, 40))
    if draw(st.booleans()):
        return draw(st.sampled_from([g for g in GRAPHS if g.suits(n)])).on(n)
    graph = nx.gnp_random_graph(n, draw(st.floats(0, 1)), seed=draw(st.integers(0, 99)))
    return FromGraph(graph).on(n)


@settings(max_examples=60, deadline=None)
@given(mixings(), st.integers(0, 20), st.integers(0, 2**31))
def test_every_mixing_keeps_the_mean_and_shrinks_the_distance(mixing, turn, seed):
    matrix = mixing.matrix(turn).numpy()
    n = mixing.num_ranks
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(axis=0), np.ones(n), atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), np.ones(n), atol=1e-12)
    x = np.random.default_rng(seed).normal(size=(n, 3))
    mixed = matrix @ x
    np.testing.assert_allclose(mixed.mean(axis=0), x.mean(axis=0), atol=1e-12)
    if mixing.num_rounds == 1:
        before, after = (((y - y.mean(axis=0)) ** 2).sum() for y in (x, mixed))
        assert after <= mixing.beta**2 * before + 1e-10


@settings(max_examples=60, deadline=None)
@given(mixings(), st.integers(0, 20))
def test_send_lists_are_the_transposed_receive_lists(mixing, turn):
    matrix = mixing.matrix(turn).numpy()
    for rank in range(mixing.num_ranks):
        others = np.arange(mixing.num_ranks) != rank
        assert mixing.send(rank, turn) == np.flatnonzero(matrix[:, rank] * others).tolist()
        received = mixing.receive(rank, turn)
        assert list(received) == np.flatnonzero(matrix[rank] * others).tolist()
        assert all(matrix[rank, peer] == weight for peer, weight in received.items())


def test_messages_per_round():
    sent = {kind.__name__: len(kind().on(16).send(3, 0)) for kind in NAMED.values()}
    expected = {"Ring": 2, "Torus": 4, "Exponential": 4, "OnePeerExponential": 1}
    assert sent == {**expected, "Hypercube": 4, "Complete": 15}
    assert len(Ring().on(2).send(0, 0)) == 1


@pytest.mark.parametrize("graph", GRAPHS)
def test_one_rank_mixes_with_nobody(graph):
    if graph.suits(1):
        assert graph.on(1).matrix().tolist() == [[1.0]]
        assert graph.on(1).send(0, 0) == []


def test_graphs_of_networkx_get_its_own_weights():
    # Metropolis and Hastings, written out; a path of four nodes has degrees 1, 2, 2, 1.
    third = 1 / 3
    expected = [
        [2 * third, third, 0, 0],
        [third, third, third, 0],
        [0, third, third, third],
        [0, 0, third, 2 * third],
    ]
    matrix = FromGraph(nx.path_graph(4)).on(4).matrix()
    np.testing.assert_allclose(matrix.numpy(), expected, atol=1e-15)


def test_torus_is_that_of_networkx():
    graph = FromGraph(nx.grid_2d_graph(4, 5, periodic=True)).on(20)
    assert torch.allclose(graph.matrix(), Torus(rows=4).on(20).matrix(), atol=1e-15)
    assert torch.allclose(
        FromGraph(nx.hypercube_graph(3)).on(8).matrix(), Hypercube().on(8).matrix(), atol=1e-15
    )


def test_edges_and_files(tmp_path):
    edges = [[0, 1], [1, 2], [2, 0], [2, 3]]
    file = tmp_path / "edges.txt"
    file.write_text("\n".join(f"{a} {b}" for a, b in edges))
    for graph in (FromGraph(str(file)), FromGraph(edges), FromGraph(nx.Graph(edges))):
        assert sorted(graph.on(4).receive(2, 0)) == [0, 1, 3]
        assert repr(pickle.loads(pickle.dumps(graph))) == repr(graph)


def test_directed_cycles_work_and_unbalanced_graphs_do_not():
    mixing = FromGraph(nx.DiGraph([(0, 1), (1, 2), (2, 0)])).on(3)
    assert (mixing.receive(1, 0), mixing.send(1, 0)) == ({0: 0.5}, [2])
    with pytest.raises(ValueError, match=r"Expected `topology` to be doubly stochastic, got From"):
        FromGraph(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])).on(3)


class Lazy(Topology):
    """Sums of columns are not one."""

    def row(self, rank, round_index, num_ranks):
        return {0: 1.0}


def test_weights_of_ones_own_are_checked():
    with pytest.raises(ValueError, match="Rows and columns of the weights must sum to 1"):
        Lazy().on(2)


@pytest.mark.parametrize(
    ("graph", "n", "message"),
    [
        (Hypercube(), 6, r"6 ranks, got Hypercube\(\). It needs a power of two, such as 2, 4, 8;"),
        (
            Torus(),
            7,
            r"at least 3 rows and at least 3 columns, such as 9, 12, 15; 7 ranks can have",
        ),
        (Torus(rows=5), 12, r"It needs 5 rows and at least 3 columns, such as 15, 20, 25"),
        (FromGraph([[0, 1]]), 3, r"as many ranks as the graph has nodes, such as 2"),
        (
            Hypercube(),
            9,
            r"9 ranks can have Ring, Torus, Exponential, OnePeerExponential, Complete",
        ),
    ],
)
def test_awkward_numbers_of_ranks_are_told_what_would_do(graph, n, message):
    with pytest.raises(ValueError, match=message):
        graph.on(n)


def test_two_rows_are_refused():
    with pytest.raises(ValueError, match=r"Expected `rows` to be at least 3, got 2"):
        Torus(rows=2)


def test_networkx_is_needed_for_edges_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-sgd\[graphs\]'"):
        FromGraph([[0, 1]])
