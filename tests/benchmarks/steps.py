"""Who competes in train.py: a training step's loss and gradient of any stage, ours and FlagEmbedding's, on the same rows.

Each is made and runs in a process of its own (`serve`). Not here: what is measured and printed (train.py).
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

MASKED = 0.3  # of a text, in the encoder of stage 1; PAPER §3
TEMPERATURE = 0.02
VOCABULARY = 250_002


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed: the stage, the released directory, rows × length of queries (none in stage 1) and passages, and how."""

    stage: str
    model: Path
    queries: tuple[int, int]
    passages: tuple[int, int]
    dtype: str
    sub_batch_tokens: int
    remat: str

    def ids(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        given = []
        for shape in (self.queries, self.passages):
            ids = random.integers(4, 250_000, shape).astype(np.int32)
            ids[:, 0], ids[:, -1] = 0, 2
            given.append(ids)
        return given[0], given[1]

    @property
    def tokens(self) -> int:
        return sum(rows * length for rows, length in (self.queries, self.passages))

    def flops(self, layers: int, width: int) -> tuple[float, float]:
        """Of a step: those whose share of the peak is told, and what colbert's scores add."""
        (q, i), (p, j) = self.queries, self.passages
        layers += self.stage == "retromae"
        counted = 3 * layers * sum(rows * (24 * n * width**2 + 4 * n**2 * width) for rows, n in ((q, i), (p, j)))
        if self.stage == "retromae":
            content = j - 2
            counted += 3 * 2 * width * (width + VOCABULARY) * p * (content + round(MASKED * content))
        return counted, 6 * q * p * i * j * width if self.stage == "unified" else 0


class Ours:
    """The stage's loss_and_parts and its gradient; the optimiser's update, which the peer does not have here, is left out."""

    def __init__(self, case: Case):
        import jax

        import m3jax
        from train.sub_batch import SubBatches, sub_batches_of

        m3 = m3jax.load(case.model, dtype="float32")
        params = m3.params
        sides = {"queries": case.queries, "passages": case.passages}
        if case.stage == "retromae":
            params, sides = for_reconstruction(m3.config, m3.params["encoder"]), {"texts": case.passages}
        tokens = case.sub_batch_tokens
        parts = SubBatches(**{name: sub_batches_of(tokens, *side) if tokens else 1 for name, side in sides.items()})
        self._given = (
            jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.devices()[0]), params),
            batch_of(case.stage, *case.ids()),
        )
        start = time.perf_counter()
        self._step = gradient_of(m3.config, case, parts).lower(*self._given).compile()
        self.compiling = time.perf_counter() - start

    def step(self) -> tuple[float, float]:
        import jax

        start = time.perf_counter()
        (loss, _), gradients = jax.block_until_ready(self._step(*self._given))
        del gradients
        return time.perf_counter() - start, float(loss)

    def peak(self) -> int:
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or resident()


class Peer:
    """FlagEmbedding's EncoderOnlyEmbedderM3Model with its loss."""

    compiling = 0.0

    def __init__(self, case: Case):
        from types import SimpleNamespace

        import torch
        from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
        from transformers import XLMRobertaModel

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = XLMRobertaModel.from_pretrained(case.model, **without)
        modules: dict[str, Any] = {"model": model}
        for head, width in (("sparse_linear", 1), ("colbert_linear", model.config.hidden_size)):
            modules[head] = torch.nn.Linear(model.config.hidden_size, width)
            modules[head].load_state_dict(torch.load(case.model / f"{head}.pt", weights_only=True))
        self._model = EncoderOnlyEmbedderM3Model(
            modules,
            tokenizer=SimpleNamespace(cls_token_id=0, pad_token_id=1, eos_token_id=2, unk_token_id=3),
            temperature=TEMPERATURE,
            normalize_embeddings=True,
            unified_finetuning=case.stage == "unified",
            use_self_distill=case.stage == "unified",
            self_distill_start_step=-1,
        )
        self._model.to(self._device).train()
        self._autocast = torch.autocast(self._device, torch.bfloat16, enabled=case.dtype == "bfloat16")
        ids = [torch.tensor(x, dtype=torch.long, device=self._device) for x in case.ids()]
        self._given = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]

    def step(self) -> tuple[float, float]:
        self._model.zero_grad()
        start = time.perf_counter()
        with self._autocast:
            loss = self._model(*self._given).loss
        loss.backward()
        value = loss.item()  # waits for the device's forward pass; the gradients below
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter() - start, value

    def peak(self) -> int:
        if self._device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return resident()


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def batch_of(stage: str, queries: Any, passages: Any) -> Any:
    """Full rows, no two passages equal."""
    from train.data.pipeline import Batch
    from train.data.texts import TextBatch

    if stage == "retromae":
        return TextBatch(passages, np.ones(passages.shape, bool))
    columns = np.arange(len(passages), dtype=np.uint32)
    identity = np.stack([columns, columns], axis=1)
    known = identity[:: len(passages) // len(queries), None]
    group = len(passages) // len(queries)
    return Batch(
        *(queries, np.ones(queries.shape, bool), passages, np.ones(passages.shape, bool), identity, known),
        passage_present=np.ones(len(passages), bool),
        own_group=np.zeros(len(queries), bool),
        teacher_scores=np.full((len(queries), group), -np.inf, np.float32),
    )


def for_reconstruction(model: Any, encoder: Any) -> Any:
    """An encoder's parameters with a random head and decoder."""
    import jax

    from m3jax import retromae

    # Of one layer: what is drawn is the head and the decoder, whatever the encoder's depth.
    drawn = retromae.init(dataclasses.replace(model, num_hidden_layers=1), jax.random.key(0))
    return {**drawn, "encoder": encoder}


def gradient_of(model: Any, case: Case, parts: Any) -> Any:
    """The jitted loss, its parts and its gradient, as the training step of the stage computes them."""
    import jax
    import jax.numpy as jnp

    from configs import base
    from train import reconstruction, step

    config = base.get_config()
    config.update(dtype=case.dtype, remat=case.remat, temperature=TEMPERATURE, dropout=0.0, encoder_mask=MASKED)
    if case.stage == "dense":
        config.functions = ("dense",)

    def loss(params: Any, batch: Any) -> Any:
        key = jax.random.key(0)
        if case.stage == "retromae":
            mask_id = VOCABULARY - 1  # as XLM-R has it
            return reconstruction.loss_and_parts(model, mask_id, config, params, batch, key, parts)
        return step.loss_and_parts(model, config, params, batch, jnp.float32(1), key, parts)

    def run(params: Any, batch: Any) -> Any:
        with jax.default_matmul_precision(step.precision(case.dtype)):
            return jax.value_and_grad(loss, has_aux=True)(params, batch)

    return jax.jit(run)


def serve(connection: Any, make: Any, case: Case) -> None:
    """Make a contestant, then take a step for each message until None comes."""
    try:
        contestant = make(case)
        contestant.step()
        connection.send(contestant.compiling)
        while connection.recv() is not None:
            connection.send((*contestant.step(), contestant.peak()))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def make_full_vocabulary(model: Path, tokenizer: Path, layers: int, width: int) -> None:
    """A released directory of random weights with XLM-R's number of terms, whatever the tokenizer has."""
    import jax

    import m3jax
    from m3jax.config import M3Config
    from m3jax.model import init

    config = M3Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        colbert_dim=width,
    )
    m3jax.save(m3jax.M3(config, init(config, jax.random.key(0)), m3jax.Tokenizer.from_file(tokenizer)), model)
