"""`python -m convert from-pytorch SRC DST` and `to-pytorch SRC DST`: a released directory to an Orbax checkpoint and back.

Not here: what the two formats are (m3jax/weights.py, m3jax/checkpoint.py).
"""

import argparse

from convert import inspection, merge, verify
from m3jax import M3, checkpoint, hub, weights


def main(arguments: list[str] | None = None) -> None:
    """Convert, keeping every tensor's dtype and bits, and say what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="PyTorch directories to Orbax checkpoints and back."
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    for direction, source in (
        ("from-pytorch", "a released directory, or a hub name"),
        ("to-pytorch", "an Orbax checkpoint of m3jax"),
    ):
        one = directions.add_parser(direction)
        one.add_argument("src", help=source)
        one.add_argument("dst", help="the directory to write; it must be new")
        if direction == "from-pytorch":
            one.add_argument("--revision", help="of a hub name: a branch, tag or commit; without it, main")
    for name, program in (("inspect", inspection), ("verify", verify), ("merge", merge)):
        one = directions.add_parser(name, description=program.__doc__)
        program.add_arguments(one)
        one.set_defaults(run=program.run)
    given = parser.parse_args(arguments)
    try:
        if "run" in given:
            return given.run(given)
        if given.direction == "from-pytorch":
            m3 = M3(*weights.read(hub.fetch(given.src, revision=given.revision)))
            checkpoint.write(m3, given.dst)
        else:
            m3 = M3(*checkpoint.read(given.src))
            weights.write(m3, given.dst)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{m3} → {given.dst}")


if __name__ == "__main__":
    main()
