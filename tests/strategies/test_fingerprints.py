"""Hashes that ranks compare: every bit, name, shape, type and order counts."""

from __future__ import annotations

import torch

from lightning_sgd.strategies._comm.fingerprints import fingerprint, layout, short_hash


def test_the_layout_tells_names_shapes_types_and_order_apart():
    a, b = torch.zeros(2), torch.zeros(3)
    usual = layout([("a", a), ("b", b)])
    others = [
        [("a", a), ("c", b)],
        [("b", b), ("a", a)],
        [("a", a), ("b", b[:, None])],
        [("a", a), ("b", b.double())],
    ]
    assert usual not in [layout(other) for other in others]
    assert 0 <= short_hash(b"x") < 2**63


def test_the_fingerprint_changes_with_any_bit_of_any_tensor():
    tensors = [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)]
    usual = fingerprint(tensors)
    assert usual == fingerprint([tensor.clone() for tensor in tensors])
    tensors[1][1] = -0.0
    assert usual != fingerprint(tensors)
    assert 0 <= usual < 2**63
