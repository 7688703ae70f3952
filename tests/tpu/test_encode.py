"""encode at 24 × 1024 in bfloat16, compiled for v5e and v6e in every shape that it uses; nothing runs on a TPU here."""

import functools
import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from m3jax import encoding, forward
from m3jax.batching import arrange
from m3jax.config import M3Config
from m3jax.model import cast, shapes
from m3jax.sharding import BATCH
from m3jax.tokenization import MCLS_RUN
from tests.tpu.chips import MEMORY

CONFIG = M3Config.bge_m3()
# Tokens of the texts of tests/benchmarks/encode.py's mixes, and how many of them.
MIXES = {"queries": (5, 40, 4000), "passages": (50, 400, 4000), "documents": (1000, 8192, 1000)}
COLLECTIVE = re.compile(r"\b(?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def draws(mix: str):
    """Tokens of texts: of many of a mix, of few, and of each length alone."""
    low, high, most = MIXES[mix]
    for seed, count in itertools.product(range(3), (most, 100, 20, 5, 2)):
        yield np.random.default_rng(seed).integers(low, high + 1, count)
    yield from ([length] for length in range(low, high + 1, 64))
    yield [high]


def used(mix: str, devices: int) -> list[tuple[int, int, int, int]]:
    """(rows, length, texts a row, CLS tokens a text) of the batches of a mix, documents with mcls too, as encode packs them
    for TPUs."""
    shapes = set()
    for lengths, mcls in itertools.product(draws(mix), (False, mix == "documents")):
        lengths = np.asarray(lengths)
        characters = [range(4 * length) for length in lengths]  # of a token, about: they bound a window
        for some in encoding._slices(characters, encoding._WINDOW_TEXTS, encoding._WINDOW_CHARACTERS):
            for packing in encoding._ROWS["tpu"].pack(lengths[some], None, devices):
                ids = [np.zeros(lengths[some][text], np.int32) for text in packing.texts]
                batch = arrange(packing, ids, 1, MCLS_RUN + 1 if mcls else 0)
                shapes.add((*batch.ids.shape, *batch.slots.shape[1:]))
    return sorted(shapes)


def placed(mesh, tree, spec):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree)


def parameters(mesh):
    """Each device has all of them, as by `load`."""
    return placed(mesh, jax.eval_shape(functools.partial(cast, dtype=jnp.bfloat16), shapes(CONFIG)), PartitionSpec())


@functools.lru_cache(maxsize=64)
def compiled_encoder(mesh, rows, length):
    """Embeddings and layer, which all batches of so many rows and tokens share."""
    hidden = placed(mesh, jax.ShapeDtypeStruct((rows, length, CONFIG.hidden_size), jnp.float32), BATCH)
    tokens = placed(mesh, jax.ShapeDtypeStruct((rows, length), jnp.int32), BATCH)
    params = parameters(mesh)["encoder"]
    with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
        layer = forward._layer.lower(CONFIG, True, params["layers"][0], hidden, tokens)
        embed = forward._embed.lower(CONFIG, params["embeddings"], tokens, tokens)
        return {"embeddings": embed.compile(), "layer": layer.compile()}


def compiled(mesh, rows, length, texts, places):
    """The programs of `forward.forward` for batches of a shape."""
    params, asked = parameters(mesh), forward.Asked(dense=True, sparse=True, colbert=True)
    hidden = placed(mesh, jax.ShapeDtypeStruct((rows, length, CONFIG.hidden_size), jnp.float32), BATCH)
    tokens = placed(mesh, jax.ShapeDtypeStruct((rows, length), jnp.int32), BATCH)
    slots = placed(mesh, jax.ShapeDtypeStruct((rows, texts, places), jnp.int32), BATCH)
    with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
        heads = forward._heads.lower(CONFIG, asked, None, params["heads"], hidden, tokens, tokens, slots)
        return compiled_encoder(mesh, rows, length) | {"heads": heads.compile()}


def activations(program) -> int:
    """Bytes that a program needs on each device beyond its parameters, which lie there for all."""
    used = program.memory_analysis()
    # A donated argument is counted among the results too.
    return used.temp_size_in_bytes + used.output_size_in_bytes


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_each_shape_compiles_with_the_kernel_and_fits(chip, devices, mix, tpu_mesh, record):
    mesh = tpu_mesh(chip, devices)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parameters(mesh)))
    for rows, length, texts, places in used(mix, devices):
        start = time.perf_counter()
        programs = compiled(mesh, rows, length, texts, places)
        seconds = time.perf_counter() - start
        assert "splash_mha_fwd_segmented" in programs["layer"].as_text()
        # The next batch is computed while the results of the last wait to be copied.
        results = programs["heads"].memory_analysis().output_size_in_bytes
        memory = (weights + max(map(activations, programs.values())) + results) / 1e9
        record("encode", chip, devices, f"{rows} × {length} ({texts} texts a row, {places} CLS)", seconds, memory)
        assert memory < MEMORY[chip]
        for name, program in programs.items():
            assert not COLLECTIVE.findall(program.as_text()), f"{name} of {rows} × {length} moves activations"
