"""A process that encodes on its devices, for test_encode.py: `python encode_worker.py '{"model": …, "texts": […], …}'`.

Keys: model, texts, out (an .npz file for each mesh, at out/NAME.npz), address and index where it is one of two processes. NAME
is "local" for parameters as `load` places them, and data × fsdp × tensor for a mesh of all devices of all processes.
"""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np

import m3jax
from m3jax import forward
from m3jax.model import M3
from m3jax.sharding import make_mesh, shardings

_COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


def watched(names: list[str], groups: int) -> None:
    """Collect into `names` the collectives of every program that forward runs; check that each device has its own rows only."""

    def watch(stage):
        seen = set()

        def run(*args):
            shapes = str([x.shape for x in args if isinstance(x, jax.Array)])
            if shapes not in seen:
                names.extend(_COLLECTIVE.findall(stage.lower(*args).compile().as_text()))
                seen.add(shapes)
            result = stage(*args)
            for array in jax.tree.leaves(result):
                assert {shard.data.shape[0] for shard in array.addressable_shards} == {array.shape[0] // groups}, array
            return result

        return run

    for stage in ("_embed", "_layer", "_heads"):
        setattr(forward, stage, watch(getattr(forward, stage)))


def write(m3: M3, texts: list[str], path: Path) -> None:
    got = m3jax.encode(m3, texts, colbert=True, batch_tokens=2048)
    assert got.dense is not None and got.terms is not None and got.colbert is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, dense=got.dense, sparse=got.terms.toarray(), colbert=np.concatenate(got.colbert))


def main() -> None:
    given = json.loads(sys.argv[1])
    several = "address" in given
    if several:
        jax.distributed.initialize(given["address"], num_processes=2, process_id=given["index"])
    out, texts = Path(given["out"]), given["texts"]
    m3 = m3jax.load(given["model"])
    held = {len(x.devices()) for x in jax.tree.leaves(m3.params)}
    assert held == {jax.local_device_count()}, held
    assert forward.row_groups(m3.params) == jax.local_device_count()
    host = jax.tree.map(np.asarray, m3.params)
    for sizes in given["meshes"]:
        mesh = make_mesh(*sizes)
        placed = M3(m3.config, jax.tree.map(jax.device_put, host, shardings(host, mesh)), m3.tokenizer)
        assert forward.row_groups(placed.params) == sizes[0] * sizes[1]
        write(placed, texts, out / f"{'x'.join(map(str, sizes))}.npz")
    own = texts[given["index"] :: 2] if several else texts
    collectives = []
    watched(collectives, jax.local_device_count())
    write(m3, own, out / "local.npz")
    assert not collectives, collectives
    print(f"encoded on {jax.local_device_count()} of {jax.device_count()}, {Path(m3jax.__file__).parents[1]}")


if __name__ == "__main__":
    main()
