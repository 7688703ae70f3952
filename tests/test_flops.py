"""The work of a step beside a count of the products in the traced encoder; the rate beside a clock of the test's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

import train.flops
from m3jax.config import M3Config
from m3jax.model import apply, shapes
from m3jax.scores import colbert_scores
from m3jax.sharding import make_mesh
from train.flops import matrix_rate, step_flops
from train.sub_batch import SubBatches, encode_in

MODEL = M3Config.tiny(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=2, colbert_dim=24)


def products(jaxpr):
    """FLOPs of all matrix products in a jaxpr: two for each multiplication, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            left, right = (np.array(x.aval.shape) for x in equation.invars)
            shared = np.prod(left[list(contracted)])
            total += 2 * left.prod() * right.prod() / shared / np.prod(left[list(batch)])
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * products(inner)
    return total


def test_the_formula_beside_the_traced_products():
    rows, length, passages, passage_length = 2, 12, 6, 20

    def forward(params, ids, mask):
        return apply(MODEL, params, ids, mask)

    def scores(queries, passages):
        return colbert_scores(queries, jnp.ones(queries.shape[:2], bool), passages, jnp.ones(passages.shape[:2], bool))

    def traced(function, *arguments):
        return products(jax.make_jaxpr(function)(*arguments).jaxpr)

    def texts(count, tokens):
        return jax.ShapeDtypeStruct((count, tokens), jnp.int32), jax.ShapeDtypeStruct((count, tokens), bool)

    def vectors(count, tokens):
        return jax.ShapeDtypeStruct((count, tokens, MODEL.colbert_dim), jnp.float32)

    encoded = sum(
        traced(forward, shapes(MODEL), *texts(*sizes)) for sizes in ((rows, length), (passages, passage_length))
    )
    heads = (
        2 * (rows * length + passages * passage_length) * MODEL.hidden_size
    )  # sparse: one output, left out in step_flops
    matched = traced(scores, vectors(rows, length), vectors(passages, passage_length))
    found = step_flops(MODEL, np.full(rows, length), np.full(passages, passage_length))
    # Colbert's vectors leave out <s>; its scores mix the maxima, [q, i] by [p, q, i].
    assert (found.encoder + found.colbert) / 3 == pytest.approx(encoded - heads + matched, rel=0.03)
    assert found.colbert / 3 == pytest.approx(
        2 * MODEL.hidden_size * MODEL.colbert_dim * (rows * length + passages * passage_length) + matched, rel=0.05
    )


@pytest.mark.parametrize("frozen", [(), ("encoder",)])
@pytest.mark.parametrize(
    "remat", ["all_but_products", "all"]
)  # with "elements" too, this backend's attention is made twice
@pytest.mark.parametrize("parts", [SubBatches(1, 1), SubBatches(1, 3)])
def test_the_encoder_s_passes_beside_the_traced_products(frozen, remat, parts):
    """Of the gradient of a loss on the sparse weights, which need a head beside a frozen encoder."""
    rows, length, passages, passage_length = 2, 12, 6, 20

    def loss(params):
        def encode(params, ids):
            if frozen:
                params = params | {"encoder": jax.lax.stop_gradient(params["encoder"])}
            return apply(MODEL, params, ids, ids >= 0, remat=remat).token_weights

        texts = jnp.ones((rows, length), int), jnp.ones((passages, passage_length), int)
        sides = ((count, (ids,)) for count, ids in zip(parts[:2], texts, strict=True))
        return sum((found**2).sum() for found in encode_in(encode, params, *sides))

    traced = jax.make_jaxpr(jax.grad(loss))(shapes(MODEL))
    used, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    found = step_flops(
        MODEL, np.full(rows, length), np.full(passages, passage_length), frozen=frozen, remat=remat, sub_batches=parts
    )
    assert found.encoder == pytest.approx(products(used), rel=0.02)


def test_only_what_is_trained_costs():
    lengths = np.array([3, 7]), np.array([5, 1, 9])
    whole, pairs = step_flops(MODEL, *lengths), 2 * 10 * 15
    assert step_flops(MODEL, *lengths, functions=("dense",)) == (whole.encoder, 0)
    assert step_flops(MODEL, *lengths, widths=(8, 4)).colbert - whole.colbert == 3 * pairs * 12
    beside = step_flops(MODEL, *lengths, frozen=("encoder", "colbert"))
    assert beside == pytest.approx((whole.encoder / 3, whole.colbert / 3))


def test_only_real_lengths_count_and_tracers_are_taken():
    lengths = np.array([3, 7]), np.array([5, 1, 9])
    one_by_one = sum(step_flops(MODEL, np.array([n]), np.array([])).encoder for n in np.concatenate(lengths))
    assert step_flops(MODEL, *lengths).encoder == pytest.approx(one_by_one)
    assert jax.jit(lambda *n: step_flops(MODEL, *n))(*lengths) == pytest.approx(step_flops(MODEL, *lengths), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rate_is_of_all_devices(monkeypatch, dtype):
    """The clock says a second for each run: its products are counted, on every device, in the dtype asked for."""
    ran = []

    def seconds(function, argument):
        ran.append((argument.shape, argument.dtype.name, len(argument.sharding.device_set)))
        return 1.0

    monkeypatch.setattr(train.flops, "_seconds", seconds)
    matrix_rate.cache_clear()
    mesh = make_mesh()
    assert matrix_rate(mesh, dtype) == 2 * 1024**3 * 4 * mesh.size
    assert set(ran) == {((mesh.size, 1024, 1024), dtype, mesh.size)}
    matrix_rate.cache_clear()


def test_all_processes_measure_the_same_sizes(monkeypatch):
    """This one's clock would go on to the next size, the first one's would not."""
    sizes = []
    monkeypatch.setattr(train.flops, "_seconds", lambda _, argument: sizes.append(argument.shape[1]) or 0.001)
    monkeypatch.setattr(train.flops, "agreed", lambda slow: not slow)
    matrix_rate.cache_clear()
    matrix_rate(make_mesh(), "float32")
    assert {*sizes} == {1024}
    matrix_rate.cache_clear()
