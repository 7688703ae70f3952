"""The contestants of encode.py: what each library computes for the same texts from the same directory of weights.

Not here: texts, rounds and tables (encode.py). Each contestant lives in a process of its own (`serve`), so that its threads,
its memory and its compiled programs are its own. Imports of libraries stand inside: those not installed are left out.
"""

import abc
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 8192
BATCH_SIZES = (1, 8, 32, 256)


class Contestant(abc.ABC):
    """Dense vectors and sparse weights of texts in host memory; with colbert, the token vectors too.

    batch_sizes: those to choose from; (0,) where the library chooses by itself. again: how many batches it computes twice.
    """

    device = "cpu"
    dtype = "float32"
    computes = "dense, sparse"
    batch_sizes = BATCH_SIZES
    again = 0

    @abc.abstractmethod
    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """The dense vectors, [texts, width]; the rest is made and dropped."""

    def run(self, texts: list[str], batch_size: int) -> tuple[float, np.ndarray]:
        """Seconds of one call, and its dense vectors."""
        start = time.perf_counter()
        dense = self.encode(texts, batch_size)
        return time.perf_counter() - start, dense

    def peak_memory(self) -> int:
        """Bytes at most so far: of the device where it has its own memory, else resident in this process, imports included."""
        if self.device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def describe(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("device", "dtype", "computes", "batch_sizes", "again")}


class M3jax(Contestant):
    computes = "dense, sparse as one CSR matrix"
    batch_sizes = (0,)

    def __init__(self, model: Path, colbert: bool, dtype: str):
        import jax

        import m3jax

        self.m3, self.colbert, self.dtype = m3jax.load(model, dtype=dtype), colbert, dtype
        self.device = jax.default_backend()
        self.computes += ", colbert" * colbert

    def encode(self, texts: list[str], batch_size: int = 0) -> np.ndarray:
        import m3jax

        return m3jax.encode(
            self.m3, texts, dense=True, sparse=True, colbert=self.colbert, max_length=LONGEST
        ).dense_vecs

    def peak_memory(self) -> int:
        import jax

        return (
            super().peak_memory()
            if self.device == "cpu"
            else jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        )

    # The two that know how m3jax works inside; they move with m3jax/batching.py and m3jax/encoding.py.

    def padding_share(self, texts: list[str], lengths: list[int]) -> float:
        """Positions that the device computes for nothing, of all that it computes, in encode's batches."""
        from m3jax import encoding, forward

        rows, groups = encoding._ROWS[forward.backend(self.m3.params)], forward.row_groups(self.m3.params)
        windows = encoding._slices(texts, encoding._WINDOW_TEXTS, encoding._WINDOW_CHARACTERS)
        batches = [batch.shape for some in windows for batch in rows.pack(lengths[some], None, groups)]
        return 1 - sum(lengths) / sum(count * length for count, length in batches)

    def host_and_device(self, texts: list[str], repeats: int) -> list[tuple[float, float, float]]:
        """Seconds of encode, of its batches alone (ready beforehand, results left on the device), of tokenising alone."""
        import jax

        from m3jax import encoding

        forward, batches = encoding.forward, []

        def recorded(*batch):
            batches.append(batch)
            return forward(*batch)

        encoding.forward = recorded
        self.encode(texts)
        encoding.forward = forward
        rounds = []
        for _ in range(repeats):
            times = [time.perf_counter()]
            self.encode(texts)
            times.append(time.perf_counter())
            jax.block_until_ready([forward(*batch) for batch in batches])
            times.append(time.perf_counter())
            self.m3.tokenizer.encode(texts, LONGEST)
            times.append(time.perf_counter())
            rounds.append(tuple(np.diff(times)))
        return rounds


class FlagEmbedding(Contestant):
    computes = "dense, sparse as one dict a text"
    again = 1

    def __init__(self, model: Path, colbert: bool):
        import torch
        from FlagEmbedding import BGEM3FlagModel

        self.colbert = colbert
        self.computes += ", colbert" * colbert
        if torch.cuda.is_available():
            self.device, self.dtype = "gpu", "float16"
        where = "cpu" if self.device == "cpu" else "cuda:0"
        self.model = BGEM3FlagModel(str(model), use_fp16=self.device == "gpu", devices=where)

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        asked = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": self.colbert}
        return self.model.encode(texts, batch_size=batch_size, max_length=LONGEST, **asked)["dense_vecs"]


class Transformers(Contestant):
    """XLMRobertaModel on batches of texts sorted by length, and the heads as plain products."""

    computes = "dense, sparse as weights by position"

    def __init__(self, model: Path, colbert: bool, dtype: str):
        import torch
        from transformers import AutoTokenizer

        self.dtype = dtype
        self.computes += ", colbert" * colbert
        where = "cpu"
        if torch.cuda.is_available():
            self.device, where = "gpu", "cuda"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.module = with_heads(model, getattr(torch, dtype), colbert).to(where)

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        import torch

        def compute(batch):
            with torch.inference_mode():
                return [x.float().cpu().numpy() for x in self.module(**batch.to(self.module.device))]

        return by_length(self.tokenizer, texts, batch_size, "pt", compute)


class SentenceTransformers(Contestant):
    computes = "dense"

    def __init__(self, model: Path, colbert: bool):
        import torch
        from sentence_transformers import SentenceTransformer

        how: dict[str, Any] = {"device": "cpu"}
        if torch.cuda.is_available():
            self.device, self.dtype = "gpu", "bfloat16"
            how = {"device": "cuda", "model_kwargs": {"dtype": torch.bfloat16}}
        self.model = SentenceTransformer(str(model), **how)

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        return self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)


class OnnxRuntime(Contestant):
    """The same module as Transformers', exported by torch in a process of its own, with ONNX Runtime's own optimisations."""

    computes = "dense, sparse as weights by position"

    def __init__(self, model: Path, colbert: bool):
        import onnxruntime
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.session = onnxruntime.InferenceSession(onnx_path(model), providers=["CPUExecutionProvider"])

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        return by_length(self.tokenizer, texts, batch_size, "np", lambda batch: self.session.run(None, dict(batch)))


# Seconds that a matrix product runs on.
SUSTAINED = 5.0


class MatrixProduct:
    """The matrix peak of jax: [rows, width] × [width, 4 · width] accumulated in float32, as precise as encode's."""

    def __init__(self, model: Path, colbert: bool, dtype: str):
        self.dtype = dtype

    def rate(self, width: int) -> float:
        """FLOP/s, sustained for some seconds; the better of a result in float32 and one in the dtype."""
        import jax
        import jax.numpy as jnp

        # An accelerator gets so many rows and calls that starting them takes no share.
        rows, calls = (2048, 3) if jax.default_backend() == "cpu" else (32768, 20)
        x, y = (jax.random.normal(jax.random.key(0), s).astype(self.dtype) for s in ((rows, width), (width, 4 * width)))
        rates = []
        for result in dict.fromkeys(("float32", self.dtype)):
            product = jax.jit(partial(jnp.matmul, preferred_element_type=result, precision="highest"))
            product(x, y).block_until_ready()
            # As long as a contestant's turn takes or nearly: processors that are lent, or that get hot, are fast for a second.
            done, start = 0, time.perf_counter()
            while time.perf_counter() - start < SUSTAINED:
                jax.block_until_ready([product(x, y) for _ in range(calls)])
                done += calls
            rates.append(done * 2 * rows * width * 4 * width / (time.perf_counter() - start))
        return max(rates)

    def describe(self) -> dict[str, Any]:
        return {"dtype": self.dtype}


# The module that must be installed, and the contestant's maker.
CONTESTANTS = {
    "m3jax float32": ("m3jax", partial(M3jax, dtype="float32")),
    "m3jax bfloat16": ("m3jax", partial(M3jax, dtype="bfloat16")),
    "FlagEmbedding": ("FlagEmbedding", FlagEmbedding),
    "transformers float32": ("transformers", partial(Transformers, dtype="float32")),
    "transformers bfloat16": ("transformers", partial(Transformers, dtype="bfloat16")),
    "sentence-transformers": ("sentence_transformers", SentenceTransformers),
    "ONNX Runtime": ("onnxruntime", OnnxRuntime),
}
MATRIX = {f"matrix product {dtype}": ("jax", partial(MatrixProduct, dtype=dtype)) for dtype in ("float32", "bfloat16")}


def by_length(tokenizer: Any, texts: list[str], batch_size: int, tensors: str, compute: Any) -> np.ndarray:
    """Dense vectors in the order of the texts; batches are padded to their longest text, longest texts first."""
    ids = tokenizer(texts, truncation=True, max_length=LONGEST, return_attention_mask=False)["input_ids"]
    order = np.argsort([-len(one) for one in ids], kind="stable")
    dense, others = [], []
    for start in range(0, len(ids), batch_size):
        rows = [ids[i] for i in order[start : start + batch_size]]
        first, *rest = compute(tokenizer.pad({"input_ids": rows}, return_tensors=tensors))
        dense.append(first)
        others.append(rest)
    return np.concatenate(dense)[np.argsort(order)]


def with_heads(model: Path, dtype: Any, colbert: bool, **how: Any) -> Any:
    """A torch module: ids and mask to the normalised CLS vector, relu(sparse_linear), and with colbert its unit vectors."""
    import torch
    from torch.nn.functional import linear, normalize, relu
    from transformers import AutoModel

    class WithHeads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = AutoModel.from_pretrained(model, dtype=dtype, add_pooling_layer=False, **how)
            for name in ("sparse_linear", "colbert_linear"):
                for kind, tensor in torch.load(model / f"{name}.pt", weights_only=True).items():
                    self.register_buffer(f"{name}_{kind}", tensor.to(dtype))

        @property
        def device(self):
            return self.encoder.device

        def forward(self, input_ids, attention_mask):
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            results = [normalize(hidden[:, 0], dim=-1)]
            results.append(relu(linear(hidden, self.sparse_linear_weight, self.sparse_linear_bias))[..., 0])
            if colbert:
                results.append(normalize(linear(hidden, self.colbert_linear_weight, self.colbert_linear_bias), dim=-1))
            return tuple(results)

    return WithHeads().eval()


def onnx_path(model: Path) -> Path:
    return model.parent / "onnx" / "model.onnx"


def export_onnx(model: Path) -> None:
    """The encoder with its dense and sparse heads as an ONNX file; the `onnx` package must be there."""
    import torch
    import transformers

    warnings.simplefilter("ignore")  # the tracer's, of branches that both ways end alike here: the vectors are compared
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    onnx_path(model).parent.mkdir(exist_ok=True)
    ids = torch.full((2, 7), 5)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    axes = {0: "texts", 1: "tokens"}
    torch.onnx.export(
        with_heads(model, torch.float32, False, attn_implementation="sdpa"),
        (ids, mask),
        str(onnx_path(model)),
        dynamo=False,  # the other exporter needs onnxscript too
        opset_version=17,
        input_names=["input_ids", "attention_mask"],
        output_names=["dense", "token_weights"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "dense": {0: "texts"}, "token_weights": axes},
    )


def make_model(model: Path, tokenizer: Path, layers: int, width: int) -> None:
    """A released directory of random weights."""
    import m3jax
    from tests.random_model import random_model

    m3 = random_model(
        m3jax.Tokenizer.from_file(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        colbert_dim=width,
    )
    m3jax.save(m3, model)


def backend() -> tuple[str, str]:
    """jax's backend and the name of its first device."""
    import jax

    return jax.default_backend(), jax.devices()[0].device_kind


def serve(connection: Any, name: str, model: Path, colbert: bool, environment: dict[str, str], log: Path) -> None:
    """Make a contestant, then answer (method, arguments) until None comes; an error is answered as itself, in one line."""
    os.environ.update(environment)
    sink = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        _, make = (CONTESTANTS | MATRIX)[name]
        contestant = make(model, colbert)
        connection.send(contestant.describe())
        while (call := connection.recv()) is not None:
            method, arguments = call
            connection.send(getattr(contestant, method)(*arguments))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        connection.send(RuntimeError(f"{type(error).__name__}: {first}"))
        raise
