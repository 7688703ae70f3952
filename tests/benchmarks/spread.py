"""What the dense vectors of models tell apart: RESULTS.md's figures of the stages.

`python tests/benchmarks/spread.py MODEL … --tasks FOLDER …`: MODEL is a released directory, of stage 1 too, or random:MODEL for
its sizes and tokenizer with random weights; FOLDER an evaluation folder, of one language each. Printed are the mean cosine of
passages of a folder and of two folders, and how many dimensions the vectors of all fill: (Σ λ)² / Σ λ² over the eigenvalues λ
of their covariance.
"""

import argparse
import itertools
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

import m3jax
from m3jax import sources
from m3jax.model import init
from train.tasks import read_task


def model_of(name: str) -> m3jax.M3:
    config, params, tokenizer = sources.read(name.removeprefix("random:"), heads="init")
    if name.startswith("random:"):
        params = init(config, jax.random.key(0))
    return m3jax.M3(config, params, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tasks", nargs="+", required=True, type=Path)
    parser.add_argument("--count", type=int, default=300, help="passages of each folder, its first")
    parser.add_argument("--max_length", type=int, default=64)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".* are longer than max_length")
    passages = [[*read_task(folder).corpus.values()][: given.count] for folder in given.tasks]
    for name in given.models:
        m3 = model_of(name)
        vectors = [m3jax.encode(m3, texts, sparse=False, max_length=given.max_length).dense_vecs for texts in passages]
        within = np.mean([(x @ x.T)[np.triu_indices(len(x), 1)].mean() for x in vectors])
        across = np.mean([(x @ y.T).mean() for x, y in itertools.combinations(vectors, 2)])
        eigenvalues = np.linalg.eigvalsh(np.cov(np.concatenate(vectors).T))
        filled = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
        print(f"within {within:.3f}, across {across:.3f}, dimensions {filled:.1f} of {m3.config.hidden_size}: {name}")


if __name__ == "__main__":
    main()
