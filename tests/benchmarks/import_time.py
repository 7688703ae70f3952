"""How long `import m3jax` takes beside `import jax`; the aim is at most 1.2 times as long.

Run it as `python tests/benchmarks/import_time.py [repeats]`. The statements take turns, each in an interpreter of its own,
so that what else the machine does falls on all alike; medians are compared, less that of an empty interpreter.
"""

import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "an empty interpreter": "pass",
    "import jax": "import jax",
    "import m3jax": "import m3jax",
    "import jax, m3jax": "import jax, m3jax",
    "m3jax.load, m3jax.encode (first use)": "import m3jax; m3jax.load, m3jax.encode",
}


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main(repeats: int = 11) -> None:
    for statement in STATEMENTS.values():
        seconds(statement)  # compiles bytecode and fills the disk cache
    taken: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(repeats):
        for name, statement in STATEMENTS.items():
            taken[name].append(seconds(statement))
    empty = statistics.median(taken["an empty interpreter"])
    medians = {name: statistics.median(times) - empty for name, times in taken.items()}
    print(f"median of {repeats}, an empty interpreter's {empty:.3f} s taken off")
    for name in list(STATEMENTS)[1:]:
        print(f"{medians[name]:7.3f} s  {medians[name] / medians['import jax']:5.2f} × import jax  {name}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
