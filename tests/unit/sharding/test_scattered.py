"""A flat tensor without memory: its matrices lie in other tensors, one after the other."""

from __future__ import annotations

import torch

from ds_fira.sharding.geometry import MatrixShard, matrices_of
from ds_fira.sharding.scattered import forget, scatter


def test_matrices_are_found_in_the_parts() -> None:
    parts = [torch.arange(6.0), torch.empty(0), torch.arange(6.0, 18.0)]
    flat = torch.empty(18, device="meta")
    scatter(flat, parts)
    first, *others = (*matrices_of("a", (2, 3)), *matrices_of("b", (2, 2, 3), begin=6))
    assert torch.equal(first.matrix(flat), parts[0].view(2, 3))
    assert [each.matrix(flat).data_ptr() for each in others] == [parts[2].data_ptr(), parts[2][6:].data_ptr()]
    half = MatrixShard("b", (4, 3), 9, 3, 9)
    half.fragment(flat).fill_(-1.0)
    assert parts[2].tolist() == [6.0, 7.0, 8.0, *[-1.0] * 6, 15.0, 16.0, 17.0]


def test_a_tensor_with_memory_is_read_itself() -> None:
    flat = torch.arange(6.0)
    (matrix,) = matrices_of("a", (2, 3))
    scatter(flat, [torch.zeros(6)])
    assert not matrix.matrix(flat).any()
    forget(flat)
    assert torch.equal(matrix.matrix(flat).view(-1), flat)
