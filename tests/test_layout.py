"""Row-major copies are the numbers of what they are made from, bit for bit, and only what has to move moves."""

import ml_dtypes
import numpy as np
import pytest

from m3jax import layout


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.bool_])
def test_copies_are_the_numbers_and_aligned(dtype):
    random = np.random.default_rng(0)
    whole = random.integers(0, 2, (37, 130)).astype(dtype)
    views = {"t": whole.T, "back": whole[::-1, ::3], "line": whole[:, 1], "empty": whole[:0].T, "deep": whole[None].T}
    found = layout.row_major(views)
    for name, x in views.items():
        assert found[name].flags.c_contiguous and (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].tobytes() == x.tobytes(), name
    assert all(found[name].ctypes.data % 64 == 0 for name in ("t", "back", "line", "deep"))


def test_what_is_row_major_stays_what_it_is():
    x = np.ones((3, 4), np.float32)
    assert layout.row_major({"x": x})["x"] is x
