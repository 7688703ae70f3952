"""Fuzzes m3jax/pickles.py: mutated zip archives and pickles, each read in a child process, torch as the reference.

`python tests/fuzz/fuzz_pickles.py --seconds 600 --seed 1 [--keep tests/fuzz/corpus]` reads the kept corpus, then new
inputs; the same seed gives the same inputs. It exits with 1, and prints the input, if any reading
- raises anything but ValueError, warns, takes more than a second, memory or the process with it;
- causes an audited event (exec, import, a file opened, a process …) beyond opening and mapping the file;
- gives an array that is not inside the mapped file, or not the tensor, by name, type, shape and bits, of
  `torch.load(weights_only=True)`; or gives arrays where torch refuses for a reason that is not in LENIENT below.
--keep DIR writes the smallest input of each outcome (a message without its particulars) there.

No coverage guides it: fuzz_inputs.py builds the inputs.

Found on 2026-11-24 with torch 2.13 in short runs and ten minutes of seed 2026 (267,831 inputs); after the mending ten
minutes of seed 2027 (175,859 inputs, 48,071 read as torch reads them) found nothing. The kept inputs named `once` are of these;
each is mended and has a test of its own in tests/test_pickles.py or test_pickles_hostile.py:
- wrong tensors: a storage named twice with two types, which torch gives the first type; an archive that holds one
  directory for zipfile and another for torch; entries that differ in case only; entries with a folder's attribute;
- read on where torch refuses: ends of the archive that disagree, no `version` entry, numbers beyond 63 bits, True as
  an offset or a size;
- refused with a message of NumPy's or a codec's: an array where a word stands, strings that are not UTF-8.
No crash, no code run, no reading over a second, no memory beyond the limit.
"""

import argparse
import base64
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

from fuzz_inputs import inputs, seeds

CORPUS = Path(__file__).with_name("corpus")
MAX_SECONDS = 1.0  # of processor time, for one reading
MAX_BYTES = 2**28  # of address space beyond what the child has when it starts
PATIENCE = 60  # seconds of the clock until a reading counts as endless
# what torch says where it refuses and we read on: why that is right
LENIENT = {
    "can require gradients": "requires_grad is not ours to read",
    "Can only build Tensor": "a plain dict with a state like OrderedDict's: the state is dropped either way",
    "UnicodeDecodeError": "`.data/serialization_id` says nothing of tensors; our strings are checked",
    "TorchScript archives": "an entry `constants.pkl` that nothing reads; the pickle of a real one names other globals",
    "invalid literal for int": "`.storage_alignment` says nothing of where tensors are",
}

# --- the child that reads --------------------------------------------------------------------------------------------


def template(message: str) -> str:
    """A message without its particulars."""
    message = re.sub(r"[^.]*This is an internal miniz error.*", "", message.split("\n")[0])
    message = re.split(r",? not (?!there)|, but | says |(?<=type);|(?<=is no larger);|(?<=unique strings);", message)[0]
    message = re.sub(r"(?<!\w)b?('(\\.|[^'])*('|$)|\"[^\"]*\"?)", "…", message)
    return re.sub(r"\([^()]*\)|0x[0-9a-f]+|-?\d+", "#", message)[:160].strip()


def serve(connection: Any, path: Path) -> None:
    """Answers each input with what reading it gave; and, where that is arrays, with what torch says of them."""
    import resource

    import numpy as np
    import torch

    from m3jax import pickles

    torch.set_num_threads(1)
    events: list[str] | None = None

    def hook(event: str, args: tuple[Any, ...]) -> None:
        ours = event == "open" and args[0] == str(path) and args[1] in ("r", "rb")
        if events is not None and not ours and event != "mmap.__new__":
            events.append(f"{event} {args!r:.200}")

    def read() -> tuple[str, str, dict[str, Any]]:
        nonlocal events
        arrays, events, start = {}, [], time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                arrays = pickles.read(path)
            outcome, said = "returned", ""
        except ValueError as error:
            outcome, said = "refused", str(error).removeprefix(f"{path}: ").removesuffix(f". {pickles._ADVICE}")
        except BaseException as error:
            outcome, said = "failed", f"read raised {error!r}"
        seen, events = events, None
        if seen:
            return "failed", f"reading caused {seen[0]}", {}
        if time.process_time() - start > MAX_SECONDS:
            return "failed", f"reading took {time.process_time() - start} s", {}
        return outcome, template(said), arrays

    def inside(array: np.ndarray) -> bool:
        owner = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        whole = np.frombuffer(getattr(owner, "obj", b""), np.uint8)
        low, high = np.lib.array_utils.byte_bounds(array)
        return array.size == 0 or whole.ctypes.data <= low <= high <= whole.ctypes.data + whole.size

    def compare(arrays: dict[str, np.ndarray]) -> tuple[str, str]:
        if not all(type(array) is np.ndarray and inside(array) for array in arrays.values()):
            return "failed", "an array is not inside the file"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tensors = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            said = template(f"{type(error).__name__}: {error}".rsplit("WeightsUnpickler error: ")[-1].strip())
            if (found := next((known for known in LENIENT if known in said), None)) is None:
                return "failed", f"torch refuses what was read: {said}"
            return "returned, torch refuses", found
        if type(tensors) not in (dict, OrderedDict) or list(tensors) != list(arrays):
            return "failed", f"torch reads names {tensors!s:.200}"
        for title, array in arrays.items():
            tensor = tensors[title].detach()
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
            bits = flat.view(torch.uint8).numpy().tobytes()
            if (str(tensor.dtype), tuple(tensor.shape)) != (f"torch.{array.dtype}", array.shape):
                return "failed", f"{array.dtype} {array.shape} is {tensor.dtype} {tensor.shape} in torch"
            if array.tobytes() != bits:
                return "failed", "bits of a tensor differ from torch's"
        return "returned", "as torch"

    path.write_bytes(b"PK")
    read()  # what is imported once, is
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
    sys.addaudithook(hook)
    while True:
        try:
            content = connection.recv_bytes()
        except EOFError:  # the parent is done
            return
        path.unlink()  # the last one's arrays may still map it
        path.write_bytes(content)
        outcome, said, arrays = read()
        connection.send((outcome, said))
        if outcome == "returned":
            connection.send(compare(arrays))


class Reader:
    """A child process that is started again when it dies."""

    def __init__(self, path: Path) -> None:
        self.path, self.process = path, None

    def ask(self, content: bytes) -> tuple[str, str]:
        if self.process is None:
            self.connection, theirs = multiprocessing.get_context("spawn").Pipe()
            self.process = multiprocessing.get_context("spawn").Process(
                target=serve, args=(theirs, self.path), daemon=True
            )
            self.process.start()
            theirs.close()
        try:
            self.connection.send_bytes(content)
            outcome, said = self.answer()
            return self.answer() if outcome == "returned" else (outcome, said)
        except (EOFError, TimeoutError, ConnectionError) as error:
            self.process.join(5 if isinstance(error, EOFError) else 0)
            self.process.kill()
            self.process.join()
            code, self.process = self.process.exitcode, None
            return "failed", f"the process is gone ({type(error).__name__}, exit code {code})"

    def answer(self) -> tuple[str, str]:
        if not self.connection.poll(PATIENCE):
            raise TimeoutError
        return self.connection.recv()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long, after the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the smallest input of each outcome there")
    args = parser.parse_args()
    outcomes: Counter[tuple[str, str]] = Counter()
    smallest: dict[tuple[str, str], bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder, "x.pt"))
        kept = sorted(CORPUS.glob("*.pt"))
        new = inputs(args.seed, seeds(Path(folder)))
        number, start = -len(kept), time.monotonic()
        while number < 0 or time.monotonic() < start + args.seconds:
            content = kept[number].read_bytes() if number < 0 else next(new)
            outcome = reader.ask(content)
            if number < 0 and not kept[number].name.startswith(outcome[0].split(",")[0]):
                outcome = ("failed", f"{kept[number].name} is now {outcome[0]}: {outcome[1]}")
            if outcome not in outcomes and outcome[0] == "failed":
                shown = base64.b64encode(zlib.compress(content)).decode()
                print(f"input {number} of seed {args.seed}: {outcome[1]}\n  zlib, base64: {shown[:4000]}", flush=True)
            outcomes[outcome] += 1
            if outcome not in smallest or len(content) < len(smallest[outcome]):
                smallest[outcome] = content
            number += 1
            if number == 0:
                start = time.monotonic()
    for (outcome, said), count in sorted(outcomes.items()):
        print(f"{count:8} {outcome}: {said}")
    total = Counter(outcome for outcome, _ in outcomes.elements())
    print(f"{len(kept)} kept and {number} new inputs in {time.monotonic() - start:.0f} s: {dict(total)}")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        for (outcome, said), content in smallest.items():
            slug = re.sub(r"\W+", "-", f"{outcome} {said}")[:80].strip("-")
            (args.keep / f"{slug}-{zlib.crc32(said.encode()):08x}.pt").write_bytes(content)
    return int(total["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
