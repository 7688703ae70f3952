"""Meshes of TPUs: where the axes lie on the chips."""

import pytest

from m3jax.sharding import make_mesh
from tests.tpu.chips import described


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p"])
def test_eight_by_eight(chip, tpu_mesh):
    """Also on 4 × 4 × 4 chips, where an axis of 8 is no side of them."""
    mesh = tpu_mesh(chip, 64, data=8, fsdp=8)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 8, "tensor": 1}
    assert len({device.id for device in mesh.devices.flat}) == 64


def test_slices_are_split_over_data(tpu_mesh):
    devices = described("v5e", 8, slices=2)
    mesh = make_mesh(-1, 4, devices=devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 1}
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="must divide by their number, 2; got data=1"):
        make_mesh(1, -1, devices=devices)
