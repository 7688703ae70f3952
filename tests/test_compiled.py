"""The search for sub-batches that fit, on programs that only say what memory they take."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

import train.compiled
from train.compiled import bytes_of, compile_step, device_memory, fitting
from train.sub_batch import SubBatches

QUERIES, PASSAGES = (16, 8), (64, 128)  # a device's rows and their length
FIXED, TOKEN = 1000, 10  # bytes


def compiler(tried, fixed=FIXED):
    """Programs whose memory is `fixed` and TOKEN for each token of the larger part."""

    def compile(parts):
        tried.append(parts)
        part = max(QUERIES[0] // parts.queries * QUERIES[1], PASSAGES[0] // parts.passages * PASSAGES[1])
        sizes = SimpleNamespace(
            argument_size_in_bytes=fixed // 2,
            output_size_in_bytes=fixed // 2,
            alias_size_in_bytes=fixed // 2,
            temp_size_in_bytes=fixed // 2 + TOKEN * part,
        )
        return SimpleNamespace(memory_analysis=lambda: sizes)

    return compile


@pytest.mark.parametrize(
    ("limit", "passages"), [(1e9, 1), (83_000, 1), (82_000, 2), (41_000, 4), (6_500, 16), (2_300, 64)]
)
def test_the_fewest_that_fit_or_nearly(limit, passages):
    tried = []
    program, parts, used = fitting(compiler(tried), queries=QUERIES, passages=PASSAGES, tokens=0, limit=limit)
    assert used == bytes_of(program) <= limit and parts == tried[-1]
    assert parts.passages in (passages, 2 * passages) and len(tried) <= 3
    assert tried[0] == SubBatches(1, 1)


def refusing(limit):
    """A compiler that, as TPU's, raises where a program takes more than `limit`."""
    compile = compiler([])

    def compile_or_refuse(parts):
        program = compile(parts)
        if bytes_of(program) > limit:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Used 9G of 8G hbm. Exceeded hbm capacity by 1G.\nmore"
            )
        return program

    return compile_or_refuse


def test_a_program_that_the_compiler_refuses_is_too_large():
    _, parts, used = fitting(refusing(41_000), queries=QUERIES, passages=PASSAGES, tokens=0, limit=41_000)
    assert parts.passages == 4 and used <= 41_000
    with pytest.raises(
        ValueError, match=r"one row at a time .* than its compiler accepts \(RESOURCE_EXHAUSTED.*1G\.\)"
    ):
        fitting(refusing(2_000), queries=QUERIES, passages=PASSAGES, tokens=0, limit=2_000)
    with pytest.raises(ValueError, match=r"sub_batch_tokens = 1024 of 16 queries .* lower it or the batch"):
        fitting(refusing(2_000), queries=QUERIES, passages=PASSAGES, tokens=1024, limit=2_000)


def test_another_error_of_the_compiler_is_seen():
    def broken(parts):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fitting(broken, queries=QUERIES, passages=PASSAGES, tokens=0, limit=1e9)


def test_a_given_number_of_tokens_is_taken():
    tried = []
    _, parts, _ = fitting(compiler(tried), queries=QUERIES, passages=PASSAGES, tokens=256, limit=1.0)
    assert parts == SubBatches(1, 32) and tried == [parts]


@pytest.mark.parametrize(("tokens", "memory", "passages"), [(256, 1e9, 32), (0, 1e9, 1), (0, 41_000 / 0.92, 4)])
def test_a_step_is_compiled_for_a_device_s_rows_tokens_and_memory(monkeypatch, tokens, memory, passages):
    monkeypatch.setattr(train.compiled, "device_memory", lambda: memory)
    compile, lowered = compiler([]), []

    def make(parts):
        return SimpleNamespace(
            lower=lambda *given: lowered.append(given) or SimpleNamespace(compile=lambda: compile(parts))
        )

    batch = SimpleNamespace(sides={"queries": (32, 8), "passages": (128, 128)})  # of two devices
    _, parts, used = compile_step(make, "state", batch, 2, tokens)
    assert parts.passages in ((passages,) if tokens else (passages, 2 * passages)) and lowered[-1] == ("state", batch)
    assert tokens or used <= 0.92 * memory


def test_what_no_sub_batch_makes_fit():
    with pytest.raises(
        ValueError, match=r"16 queries × 8 and 64 passages × 128 a device takes 0\.0 GB; lower the batch"
    ):
        fitting(compiler([]), queries=QUERIES, passages=PASSAGES, tokens=0, limit=2_000)


def test_a_real_program_and_this_machine():
    program = jax.jit(lambda x: (jnp.sin(x), x.sum())).lower(jnp.zeros((1000,))).compile()
    assert 8000 <= bytes_of(program) < 20_000
    assert 1e9 < device_memory() < 1e13
