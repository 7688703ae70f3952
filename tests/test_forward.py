import jax
import numpy as np
import pytest

from m3jax import forward
from m3jax.batching import arrange, pack
from m3jax.config import M3Config
from m3jax.model import init

CONFIG = M3Config.tiny(num_hidden_layers=3)


def batch(lengths):
    (packing,) = pack(lengths, batch_tokens=1024, row_length=64)
    return arrange(packing, [np.full(lengths[text], 5, np.int32) for text in packing.texts], 1)


@pytest.mark.parametrize(("lengths", "several"), [([40, 50], False), ([40, 20], True)])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_gpus_are_told_whether_a_row_holds_several_texts(backend, lengths, several, monkeypatch):
    """Others would compile the shape twice for it."""
    told = []
    monkeypatch.setattr(forward, "backend", lambda params: backend)
    monkeypatch.setattr(
        forward, "_layer", lambda config, packed, params, hidden, segments: (told.append(packed), hidden)[1]
    )
    forward.forward(CONFIG, init(CONFIG, jax.random.key(0)), batch(lengths), forward.Asked(True, False, False))
    assert told == [several or backend != "gpu"] * 3


def test_a_layer_is_compiled_for_the_devices_of_the_parameters(monkeypatch):
    """Not for the default ones: `attention` reads the platform from the mesh in context."""
    meshes = []
    monkeypatch.setattr(forward, "_layer", lambda *args: (meshes.append(jax.sharding.get_mesh()), args[3])[1])
    params = init(CONFIG, jax.random.key(0))
    forward.forward(CONFIG, params, batch([5]), forward.Asked(True, False, False))
    assert [list(mesh.devices.flat) for mesh in meshes] == [[jax.devices()[0]]] * 3


def test_a_mesh_with_other_axes_is_refused(monkeypatch):
    other = jax.sharding.AbstractMesh((2, 4), ("x", "y"))
    monkeypatch.setattr(forward, "mesh_of", lambda params: other)
    with pytest.raises(ValueError, match=r"with the axes \('data', 'fsdp', 'tensor'\), .* got \('x', 'y'\)"):
        forward.row_groups({})
