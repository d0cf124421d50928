"""The parameters of an optimizer are looked up once per step, and those that are added later are included."""

from __future__ import annotations

import torch

from lightning_sgd.strategies._base.replica import GradientReplica


class Counting(torch.optim.SGD):
    """Counts how often its parameters are listed."""

    num_listed = 0

    @property
    def param_groups(self):
        self.num_listed += 1
        return self._groups

    @param_groups.setter
    def param_groups(self, groups):
        self._groups = groups


def parameter(*values):
    param = torch.zeros(len(values), requires_grad=True)
    param.grad = torch.tensor(values)
    return param


def test_parameters_are_listed_once_per_step():
    # With a thousand parameters, listing and comparing them takes milliseconds.
    optimizer = Counting([parameter(1.0, 2.0)], lr=0.1)
    replica = GradientReplica(0, optimizer, 1, {})
    for _ in range(3):
        optimizer.num_listed = 0
        replica.pack(1.0, absent=False)
        gradients = replica.gradients
        assert gradients.rows.tolist() == [[1.0, 2.0]]
        gradients.unpack(gradients.rows[0], gradients.used)
        replica.clear()
        assert optimizer.num_listed == 1


def test_parameters_that_are_added_between_steps_are_included():
    first, second = parameter(1.0, 2.0), parameter(3.0)
    optimizer = torch.optim.SGD([first], lr=0.1)
    replica = GradientReplica(0, optimizer, 2, {})
    replica.pack(1.0, absent=False)
    replica.clear()
    optimizer.add_param_group({"params": [second]})
    replica.pack(1.0, absent=False)
    assert replica.gradients.rows.tolist() == [[1.0, 2.0, 3.0, 0.0]]
    assert [id(x) for x in replica.tensors] == [id(first), id(second)]


def test_rows_of_micro_batches_stay_when_parameters_are_added_in_between():
    first, second = parameter(1.0), parameter(2.0)
    optimizer = torch.optim.SGD([first], lr=0.1)
    replica = GradientReplica(0, optimizer, 1, {})
    replica.pack(1.0, absent=False)
    optimizer.add_param_group({"params": [second]})
    replica.pack(2.0, absent=False)
    assert replica.gradients.rows.tolist() == [[1.0], [2.0]]
    replica.clear()
    replica.pack(1.0, absent=False)
    assert replica.gradients.rows.tolist() == [[1.0, 2.0]]
