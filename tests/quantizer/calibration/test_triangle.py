"""A symmetric matrix survives being stored as its upper triangle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rrsq.quantizer.calibration.triangle import pack_symmetric, packed_size, unpack_symmetric


@pytest.mark.parametrize("channels", [1, 2, 7, 96])
def test_the_triangle_is_numpys_and_comes_back(channels: int) -> None:
    X = torch.randn(50, channels, generator=torch.Generator().manual_seed(channels))
    matrix = X.T @ X
    packed = pack_symmetric(matrix)
    assert packed.shape == (packed_size(channels),) == (channels * (channels + 1) // 2,)
    np.testing.assert_array_equal(packed.numpy(), matrix.numpy()[np.triu_indices(channels)])
    back = unpack_symmetric(packed, channels)
    assert torch.equal(back, back.T)
    assert torch.equal(back.triu(), matrix.triu())
