"""What the devices of a training step send each other: of hidden states nothing but what the tables' split makes them, and
gradients once a sub-batch. And that the reader of compiled programs reads."""

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

from m3jax import retromae
from m3jax.config import M3Config
from m3jax.model import shapes
from tests.collectives import Collective, activations, collectives, gradients

ROOT = Path(__file__).parents[1]
MODEL = M3Config.tiny(
    num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=2, vocab_size=104, colbert_dim=16
)
PARAMETERS = [x.shape for x in jax.tree.leaves(shapes(MODEL))]
OF_STAGE_1 = [x.shape for x in jax.tree.leaves(retromae.shapes(MODEL))]
LEAST = 2 * 8 * 64  # numbers: a device has 2 queries of 8 tokens in a sub-batch, and 2 passages of 24

TEXT = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%layer (p: (f32[16,24,64])) -> (f32[16,24,64]) {
  %all-reduce.1 = (f32[16,24,64]{2,1,0}, /*index=1*/f32[64]{0}) all-reduce(%a, %b), replica_groups={{0,1}}, to_apply=%add, \
metadata={op_name="jit(step)/transpose(jvp())/while/body/while/body/dot_general"}
}

%layer_condition (p: (f32[16,24,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
}

%part_condition (p: (f32[16,24,64])) -> pred[] {
  %bound.1 = u32[] constant(4)
}

%part (p: (f32[16,24,64])) -> (f32[16,24,64]) {
  %all-to-all.1 = f32[8,2,24,8]{3,2,1,0} all-to-all(%x), dimensions={0}, metadata={op_name="jit(step)/jvp()/while/body/gather"}
  %while.1 = (f32[16,24,64]{2,1,0:T(8,128)}) while(%t), condition=%layer_condition, body=%layer
}

%fused (p: bf16[1,64,24,64]) -> bf16[1,64,24,64] {
  %slice.1 = bf16[1,1,24,64]{3,2,0,1} dynamic-slice(%x), metadata={op_name="jit(step)/jvp(scores)/while/body/slice"}
  ROOT %update.1 = bf16[1,64,24,64]{3,2,0,1} dynamic-update-slice(%p, %slice.1, %y)
}

ENTRY %main (p: f32[64,96]) -> f32[] {
  %all-gather-start.1 = (f32[8,96]{1,0}, f32[64,96]{1,0}) all-gather-start(%kernel), dimensions={0}
  %while.2 = (f32[16,24,64]{2,1,0}) while(%t), condition=%part_condition, body=%part
  %all-gather.2 = bf16[1,64,24,64]{3,2,0,1} all-gather(%v), metadata={op_name="jit(step)/jvp(scores)/while/body/squeeze"}
  %none = bf16[] constant(0), metadata={op_name="jit(step)/zeros"}
  %zeros = bf16[1,64,24,64]{3,2,0,1} broadcast(%none), dimensions={}
  %own.1 = bf16[1,64,24,64]{3,2,0,1:T(8,128)(2,1)} fusion(%zeros, %at, %unnamed), kind=kLoop, calls=%fused
  %all-reduce.4 = bf16[1,64,24,64]{3,2,0,1:T(8,128)(2,1)} all-reduce(%own.1), to_apply=%add
  %called = f32[] fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}

%all-reduce-scatter (p: f32[96,64]) -> f32[12,64] {
  %all-reduce.3 = f32[96,64]{1,0} all-reduce(%p), to_apply=%add
}
"""


def test_a_program_is_read():
    reduced, exchanged, gathered, of_scores, unnamed, scattered = found = collectives(TEXT)
    name = "jit(step)/transpose(jvp())/while/body/while/body/dot_general"
    assert reduced == Collective("all-reduce", ((16, 24, 64), (64,)), 2, name, 8 * (16 * 24 * 64 + 64), 12)
    assert (exchanged.kind, exchanged.arrays, exchanged.loops, exchanged.times) == (
        "all-to-all",
        ((8, 2, 24, 8),),
        1,
        4,
    )
    assert gathered == Collective("all-gather", ((8, 96), (64, 96)), 0, "", 4 * 64 * 96, 1)
    assert (of_scores.kind, of_scores.received) == ("all-gather", 2 * 64 * 24 * 64)
    name = "jit(step)/jvp(scores)/while/body/slice"  # of what is in the fusion that makes what it sends
    assert unnamed == Collective("all-reduce", ((1, 64, 24, 64),), 0, name, 2 * 2 * 64 * 24 * 64, 1)
    assert scattered == Collective("all-reduce", ((96, 64),), 0, "", 4 * 96 * 64, 1)
    assert activations(found, PARAMETERS, LEAST) == [reduced._replace(arrays=((16, 24, 64),)), exchanged]
    assert activations(found, PARAMETERS, 16 * 24 * 64 + 1) == []
    assert gradients(found, PARAMETERS) == {2: 64, 0: 96 * 64}


EIGHT = """
import sys
from pathlib import Path
import jax
import m3jax.xlm_roberta
from configs import base
from m3jax import retromae
from m3jax.sharding import make_mesh
from m3jax.model import shapes
from tests.test_collectives import MODEL
from train import reconstruction
from train.abstract import abstract_batch, abstract_state, abstract_texts
from train.data.streams import Shape
from train.optimizer import make_optimizer
from train.step import make_step
from train.sub_batch import SubBatches

assert jax.device_count() == 8
config = base.get_config()
optimizer = make_optimizer(config)

def write(name, *sizes):
    mesh = make_mesh(*sizes)
    state = abstract_state(shapes(MODEL), optimizer, mesh)
    batch = abstract_batch(Shape(32, 2, 8, 24), 1, mesh)
    with jax.set_mesh(mesh):
        step = make_step(MODEL, config, optimizer, mesh, state, SubBatches(2, 4))
        Path(sys.argv[1], name).write_text(step.lower(state, batch).compile().as_text())

def write_stage_1(name, *sizes):
    mesh = make_mesh(*sizes)
    state, batch = abstract_state(retromae.shapes(MODEL), optimizer, mesh), abstract_texts(64, 24, mesh)
    with jax.set_mesh(mesh):
        step = reconstruction.make_step(MODEL, 4, config, optimizer, mesh, state, SubBatches(texts=4))
        Path(sys.argv[1], name).write_text(step.lower(state, batch).compile().as_text())

write("data", 8, 1)
write("fsdp", 1, 8)
write("both", 2, 4)
write_stage_1("stage 1, data", 8, 1)
write_stage_1("stage 1, fsdp", 1, 8)
m3jax.xlm_roberta.constrain = lambda x, spec: x
write("left alone", 1, 8)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The collectives of a step in 2 and 4 sub-batches on meshes of eight devices, and of one whose hidden states no rule
    places."""
    folder = tmp_path_factory.mktemp("programs")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, folder], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: collectives(path.read_text()) for path in folder.iterdir()}


def test_without_fsdp_devices_send_no_hidden_states(programs):
    assert activations(programs["data"], PARAMETERS, LEAST) == []


@pytest.mark.parametrize("mesh", ["fsdp", "both"])
def test_with_fsdp_they_send_what_they_look_up_in_tables_and_nothing_within_the_layers(programs, mesh):
    """Of a part's embeddings, once forward, once when they are computed again, and once backward, a device's own share."""
    found = activations(programs[mesh], PARAMETERS, LEAST)
    assert {(one.kind, one.loops) for one in found} == {("all-to-all", 1)}
    assert sorted(sum(map(math.prod, one.arrays)) for one in found) == [2 * 8 * 64] * 3 + [2 * 24 * 64] * 3


def test_in_stage_1_too(programs):
    """A part's embeddings, of what the encoder and the decoder read: forward, when they are computed again, and backward."""
    assert activations(programs["stage 1, data"], OF_STAGE_1, LEAST) == []
    found = activations(programs["stage 1, fsdp"], OF_STAGE_1, LEAST)
    assert {(one.kind, one.loops) for one in found} == {("all-to-all", 1)}
    assert [sum(map(math.prod, one.arrays)) for one in found] == [2 * 24 * 64] * 11


def test_left_alone_the_compiler_sends_them_within_the_layers(programs):
    found = activations(programs["left alone"], PARAMETERS, LEAST)
    assert {one.kind for one in found if one.loops == 2} >= {"all-gather", "all-reduce"}


def test_gradients_are_reduced_once_a_sub_batch(programs):
    """Not once a step: each part's are summed over devices before they are added up. In the loop of the layers it is one
    layer's, of queries and of passages."""
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(MODEL)["encoder"]["layers"][0]))
    assert gradients(programs["data"], PARAMETERS)[2] == 2 * size
