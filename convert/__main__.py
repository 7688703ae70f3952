"""`python -m convert`: models between PyTorch directories and Orbax checkpoints, and what is in them.

Not here: the programs themselves, one file each.
"""

import argparse
import logging
import sys
import time
import warnings

import jax

from convert import from_pytorch, inspection, merge, to_pytorch, verify

_PROGRAMS = {"from-pytorch": from_pytorch, "to-pytorch": to_pytorch}
_PROGRAMS |= {"inspect": inspection, "verify": verify, "merge": merge}


def main(arguments: list[str] | None = None) -> None:
    """Run one program; a model that it wrote is told in a closing line, and what is wrong in one that begins with `error:`."""
    parser = argparse.ArgumentParser(prog="python -m convert", description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True)
    for name, program in _PROGRAMS.items():
        program.add_arguments(programs.add_parser(name, description=program.__doc__))
    given = parser.parse_args(arguments)
    # Orbax logs each error of its threads, with a traceback, and raises it too.
    logging.getLogger("absl").disabled = True
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            written = _PROGRAMS[given.program].run(given)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing was finished") from None
    if written is not None:
        arrays, seconds = jax.tree.leaves(written.params), time.perf_counter() - start
        print(
            f"{given.dst}: {len(arrays)} tensors, {sum(x.size for x in arrays):,} parameters, "
            f"{sum(x.nbytes for x in arrays):,} bytes, {seconds:.1f} s"
        )


if __name__ == "__main__":
    main()
