"""Which weights count as matrices, checked against matrices cut out by hand, and that reading leaves no trace."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from support.processes import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_sgd import NoEffectWarning, OutsideIntendedUseWarning
from lightning_sgd.functional.spectra.weight_matrices import find_weight_matrices


def read(module, **arguments):
    """Names and values, in order."""
    return {m.name: m.read() for m in find_weight_matrices(module, min_side=1, **arguments)}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, matrix in found.items():
        assert torch.equal(matrix, expected[name]), name
        assert not matrix.requires_grad


def test_linear_layers_are_read_in_place():
    # The monitor measures what training has made since, without a copy.
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    matrices = find_weight_matrices(net, min_side=1)
    assert [(m.name, m.shape) for m in matrices] == [("0.weight", (4, 3)), ("3.weight", (2, 4))]
    with torch.no_grad():
        net[0].weight.add_(1)
    assert torch.equal(matrices[0].read(), net[0].weight)
    assert matrices[0].read().data_ptr() == net[0].weight.data_ptr()


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_are_rows_of_filters(convolution):
    layer = convolution(3, 4, 2)
    assert_same(read(layer), {"weight": torch.stack([row.reshape(-1) for row in layer.weight])})


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_matrices_of_their_own(transposed):
    # Block-diagonal as one operator: each block maps its own input channels to its own output channels.
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(6, 4, 3, groups=2)
    half = len(layer.weight) // 2
    expected = {
        "weight.group0": layer.weight[:half].reshape(half, -1),
        "weight.group1": layer.weight[half:].reshape(half, -1),
    }
    assert_same(read(layer), expected)
    assert half == (3 if transposed else 2)


def test_depthwise_convolutions_disappear_by_their_side():
    net = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 64, 1))
    assert [m.name for m in find_weight_matrices(net)] == ["1.weight"]


def test_the_projections_of_attention_are_three_matrices():
    layer = nn.MultiheadAttention(4, 2)
    q, k, v = layer.in_proj_weight.chunk(3)
    expected = {
        "in_proj_weight.q": q,
        "in_proj_weight.k": k,
        "in_proj_weight.v": v,
        "out_proj.weight": layer.out_proj.weight,
    }
    assert_same(read(layer), expected)
    split = read(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    assert [(name, tuple(m.shape)) for name, m in split.items()] == [
        ("q_proj_weight", (4, 4)),
        ("k_proj_weight", (4, 3)),
        ("v_proj_weight", (4, 5)),
        ("out_proj.weight", (4, 4)),
    ]


@pytest.mark.parametrize(
    ("layer", "suffix", "gates"),
    [
        (nn.LSTM(3, 5, num_layers=2, proj_size=2), "_l1", ["input", "forget", "cell", "output"]),
        (nn.LSTMCell(3, 5), "", ["input", "forget", "cell", "output"]),
        (nn.GRU(3, 5, bidirectional=True), "_l0_reverse", ["reset", "update", "new"]),
        (nn.GRUCell(3, 5), "", ["reset", "update", "new"]),
        (nn.RNN(3, 5), "_l0", None),
    ],
)
def test_recurrent_weights_are_split_by_gate(layer, suffix, gates):
    found = read(layer)
    for kind in ("weight_ih", "weight_hh"):
        weight = getattr(layer, kind + suffix)
        if gates is None:
            assert torch.equal(found[kind + suffix], weight)
            continue
        for i, gate in enumerate(gates):
            assert torch.equal(found[f"{kind}{suffix}.{gate}"], weight[5 * i : 5 * (i + 1)])
    assert not any("bias" in name for name in found)
    if "proj" in repr(layer) or getattr(layer, "proj_size", 0):
        assert torch.equal(found[f"weight_hr{suffix}"], getattr(layer, f"weight_hr{suffix}"))


def test_the_gates_are_named_in_the_order_of_torch():
    # An LSTM whose forget gate is shut forgets its state, so the rows of that name are the forget gate.
    cell = nn.LSTMCell(1, 2)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
    rows = {m.name: m for m in find_weight_matrices(cell, min_side=1)}
    rows["weight_ih.forget"].read().fill_(-100.0)
    _, state = cell(torch.ones(1, 1), (torch.zeros(1, 2), torch.full((1, 2), 8.0)))
    assert state.abs().max() < 1e-6
    gru = nn.GRUCell(1, 2)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.zero_()
    rows = {m.name: m for m in find_weight_matrices(gru, min_side=1)}
    rows["weight_ih.update"].read().fill_(100.0)  # keep the old state
    assert torch.allclose(gru(torch.ones(1, 1), torch.full((1, 2), 8.0)), torch.tensor(8.0))


class Odd(nn.Module):
    """Everything that is or is not a matrix, besides layers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 2, 3))
        self.scale = nn.Parameter(torch.randn(4))
        self.number = nn.Parameter(torch.randn(()))
        self.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.register_buffer("statistics", torch.randn(4, 4))


def test_other_parameters_are_flattened_and_the_rest_left_out():
    odd = Odd()
    assert_same(read(odd), {"table": odd.table.reshape(4, 6), "frozen": odd.frozen})


def test_complex_weights_are_left_out_with_the_reason():
    net = nn.ModuleDict({"real": nn.Linear(3, 3), "fft": nn.Linear(3, 3, dtype=torch.complex64)})
    with pytest.warns(OutsideIntendedUseWarning, match=r"complex weight `fft.weight` is left out"):
        assert list(read(net)) == ["real.weight"]
    assert list(read(net, exclude=["fft.*"])) == ["real.weight"]


def language_model():
    net = nn.ModuleDict({"embed": nn.Embedding(7, 3), "body": nn.Linear(3, 3)})
    net["head"] = nn.Linear(3, 7, bias=False)
    return net


def test_embeddings_count_only_when_asked_for():
    net = language_model()
    assert list(read(net)) == ["body.weight", "head.weight"]
    assert list(read(net, include=["embed.*"])) == ["embed.weight"]
    assert list(read(net, include=["*"], exclude=["body*"])) == ["embed.weight", "head.weight"]


def test_tied_weights_count_once_under_the_first_name_that_is_asked_for():
    net = language_model()
    net["head"].weight = net["embed"].weight
    assert list(read(net)) == ["body.weight", "head.weight"]
    assert list(read(net, include=["*"])) == ["embed.weight", "body.weight"]
    shared = nn.Linear(3, 3)
    twice = nn.ModuleDict({"a": shared, "b": shared})
    assert list(read(twice)) == ["a.weight"]
    assert list(read(twice, include=["b.*"])) == ["b.weight"]


def test_compiled_modules_keep_their_names():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0] = torch.compile(net[0], backend="eager")
    assert list(read(net)) == ["0.weight", "1.weight"]
    assert list(read(torch.compile(net, backend="eager"), include=["0.*"])) == ["0.weight"]


def spectral(layer):
    return parametrizations.spectral_norm(layer, n_power_iterations=3)


def pruned(layer):
    return prune.l1_unstructured(prune.random_unstructured(layer, "weight", 0.25), "weight", 2)


def weight_norm_by_hook(layer):
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # deprecated, but in checkpoints and old code
        return torch.nn.utils.weight_norm(layer)


COMPUTED = {
    "spectral_norm": spectral,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm by hook": torch.nn.utils.spectral_norm,
    "weight_norm by hook": weight_norm_by_hook,
    "pruned": pruned,
}


def trace(module):
    """Everything that reading could change."""
    modes = [child.training for child in module.modules()]
    values = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = [parameter.grad for parameter in module.parameters()]
    return modes, values, gradients, torch.get_rng_state()


def assert_untouched(before, after):
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])
    for name, value in before[1].items():
        assert torch.equal(value, after[1][name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_those_of_the_forward_pass_and_stay_untouched(kind, training):
    # A power iteration advanced by a monitor would change training.
    layer = COMPUTED[kind](nn.Linear(6, 6, bias=False)).train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)  # hooks leave a stale `weight` behind
    before = trace(layer)
    (matrix,) = find_weight_matrices(layer, min_side=1)
    value = matrix.read()
    assert_untouched(before, trace(layer))
    assert (matrix.name, matrix.shape) == ("weight", (6, 6))
    used = layer.eval()(torch.eye(6)).detach().mT
    torch.testing.assert_close(value, used)


def test_the_cache_of_parametrizations_keeps_its_gradients():
    # Recurrent nets train inside `parametrize.cached()`: a weight read without gradient must not stay there.
    layer = parametrizations.orthogonal(nn.Linear(4, 4))
    with parametrize.cached():
        find_weight_matrices(layer, min_side=1)[0].read()
        layer(torch.ones(1, 4)).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


class LowRankUpdate(nn.Module):
    def __init__(self):
        super().__init__()
        self.B, self.A = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, weight):
        return weight + self.B @ self.A


def test_an_adapter_is_measured_as_the_weight_it_makes():
    layer = nn.Linear(4, 5)
    frozen, adapter = layer.weight.detach().clone(), LowRankUpdate()
    parametrize.register_parametrization(layer, "weight", adapter)
    assert_same(read(layer), {"weight": (frozen + adapter.B @ adapter.A).detach()})


def test_a_parametrized_buffer_is_no_weight():
    layer = nn.Linear(3, 4)
    layer.register_buffer("mask", torch.ones(4, 3))
    layer.register_buffer("other", torch.ones(4, 3))
    for name in ("mask", "other"):
        parametrize.register_parametrization(layer, name, nn.ReLU())
    assert list(read(layer)) == ["weight"]


def test_nothing_of_a_large_module_is_touched():
    net = nn.ModuleList([nn.LSTM(9, 9), nn.MultiheadAttention(8, 2), spectral(nn.Conv2d(9, 9, 3))])
    net[0].eval()
    before = trace(net)
    for matrix in find_weight_matrices(net):
        assert matrix.read().shape == matrix.shape
    assert_untouched(before, trace(net))


def test_a_matrix_can_be_sent_to_another_process():
    (matrix,) = find_weight_matrices(nn.Linear(8, 8))
    assert torch.equal(pickle.loads(pickle.dumps(matrix)).read(), matrix.read())


def test_patterns_choose_names():
    net = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.Flatten(), nn.Linear(16, 8))
    names = [m.name for m in find_weight_matrices(net)]
    assert names == ["0.weight.group0", "0.weight.group1", "2.weight"]
    chosen = find_weight_matrices(net, include=["0.*", "2.*"], exclude=["*.group1"])
    assert [m.name for m in chosen] == ["0.weight.group0", "2.weight"]


@pytest.mark.parametrize("arguments", [{"include": ["1.*", "0.*"]}, {"exclude": ["1.*"]}])
def test_a_pattern_that_matches_nothing_says_so(arguments):
    # A misspelt pattern would silently measure everything, or nothing.
    with pytest.warns(
        NoEffectWarning, match=r"The pattern '1\.\*' matches no weight matrix"
    ) as caught:
        find_weight_matrices(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), **arguments)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (nn.Linear(8, 8), {"include": "fc.*"}, "`include` to be a list of patterns, got 'fc"),
        (nn.Linear(8, 8), {"exclude": "fc.*"}, "`exclude` to be a list of patterns, got 'fc"),
        (nn.Linear(8, 8), {"min_side": 0}, "`min_side` to be at least 1"),
        (
            nn.LazyLinear(8),
            {},
            "`module` to be initialized, got the lazy weight. Run one forward",
        ),
    ],
)
def test_refuses_what_it_cannot_search(module, arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        find_weight_matrices(module, **arguments)


def sharded(rank):
    """An LSTM whose rows lie in two processes, across the borders of its gates."""
    mesh = init_device_mesh("cpu", (2,))
    lstm = nn.LSTM(3, 5)
    rows = torch.arange(60.0).reshape(20, 3)
    for name, value in (("weight_ih_l0", rows), ("weight_hh_l0", torch.ones(20, 5))):
        parameter = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        lstm.register_parameter(name, parameter)
    matrices = {m.name: m for m in find_weight_matrices(lstm, min_side=1)}
    assert matrices["weight_ih_l0.forget"].shape == (5, 3)
    return {name: matrix.read() for name, matrix in matrices.items()}


def test_sharded_weights_are_gathered(tmp_path):
    for found in run_ranks(sharded, 2, tmp_path):
        assert (
            found["weight_ih_l0.forget"].tolist() == torch.arange(15.0, 30.0).reshape(5, 3).tolist()
        )
        assert found["weight_hh_l0.output"].tolist() == torch.ones(5, 5).tolist()
