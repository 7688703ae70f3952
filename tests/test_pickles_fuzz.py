"""Thirty seconds of tests/fuzz/fuzz_pickles.py, after the corpus that longer runs kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS, SEED = 30, 3
FOLDER = Path(__file__).parent / "fuzz"


def test_no_file_makes_the_reader_crash_run_code_or_give_a_wrong_tensor() -> None:
    pytest.importorskip("torch", reason="the reference for what a tensor is; install the extra `test`")
    kept = len(list((FOLDER / "corpus").glob("*.pt")))
    assert 40 <= kept <= 200
    command = [sys.executable, str(FOLDER / "fuzz_pickles.py"), f"--seconds={SECONDS}", f"--seed={SEED}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the m3jax of this test
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS * 10)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kept} kept and" in done.stdout and "as torch" in done.stdout
