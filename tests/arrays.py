"""NumPy arrays for functions that take JAX's: tests make their data in NumPy, the mathematics names jax.Array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def from_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with every NumPy array among its arguments handed over as a JAX array."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, (args, kwargs))
        return function(*given[0], **given[1])

    return call
