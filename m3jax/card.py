"""The model card of a released directory, README.md: what the model is, what is known of its making, how to use it.

Not here: where the facts come from. What is not known is not in the card, and a licence is for people to choose.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from m3jax.config import M3Config

CARD = "README.md"

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # row of the table → test set → metric ("nDCG@10") → value


def make_card(
    config: M3Config,
    parameters: int,
    *,
    name: str | None = None,
    base_model: str | None = None,
    untrained: Sequence[str] = (),
    languages: Sequence[str] = (),
    training: Mapping[str, str] | None = None,
    measured: Scores | None = None,
    compared: Scores | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The text of README.md, which ends in a mark that `is_ours` knows it by.

    parameters: their number. base_model: a name on the hub. untrained: the functions that training left out.
    languages: ISO 639 codes. training: a table, setting → value. measured: of this model, by function; these are the results
    of the front matter too. compared: other rows of the same table (BM25, the parent). notes: lines below it. Every text is
    free: it is quoted for YAML and for Markdown, on one line.
    """
    # Imported here: who encodes does not wait for it.
    from huggingface_hub import EvalResult, ModelCardData

    measured = measured or {}
    results = [
        EvalResult(
            task_type="information-retrieval",
            # Our sets are folders. A name here would be that of a data set on the hub, so theirs is the configuration's.
            dataset_type="custom",
            dataset_config=_line(test),
            dataset_name=_line(test),
            metric_type=metric.lower().replace("@", "_at_"),
            metric_name=_line(f"{metric} ({function})"),
            metric_value=float(value),
        )
        for function, tests in measured.items()
        for test, values in tests.items()
        for metric, value in values.items()
    ]
    title = _line(name or "") or "M3-Embedding"
    front = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "m3jax"],
        base_model=base_model,
        language=list(languages) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {_plain(title)}",
        f"An [M3-Embedding](https://arxiv.org/abs/2402.03216) model: an XLM-RoBERTa encoder ({config.num_hidden_layers} layers "
        f"× {config.hidden_size}, {parameters:,} parameters, {config.vocab_size:,} token ids) that gives of a text of up to "
        f"{config.max_length:,} tokens a dense vector of {config.hidden_size} numbers, sparse (lexical) weights of its terms, "
        f"and colbert vectors, {config.colbert_dim} numbers for each token.",
    ]
    if untrained:
        parts.append(
            f"Training left out {' and '.join(untrained)}: use what these give only if the model that it started from had been "
            "trained for it."
        )
    if base_model:
        parts.append(f"Fine-tuned from [{_plain(base_model)}](https://huggingface.co/{base_model}).")
    if rows := {**measured, **(compared or {})}:
        columns = dict.fromkeys((test, metric) for tests in rows.values() for test in tests for metric in tests[test])
        body = [[row, *(_number(tests.get(t, {}).get(m)) for t, m in columns)] for row, tests in rows.items()]
        parts += ["## Results", _table(["", *(f"{test}: {metric}" for test, metric in columns)], body)]
        if notes:
            parts.append("\n".join(f"- {_plain(note)}" for note in notes))
    if training:
        parts += ["## Training", _table(["", ""], training.items())]
    return _marked("\n\n".join([*parts, _use(config)]))


def make_encoder_card(
    config: M3Config,
    parameters: int,
    *,
    name: str,
    training: Mapping[str, str],
    measured: Mapping[str, Mapping[str, float]],
) -> str:
    """The text of README.md of an encoder without heads, from stage 1. measured: a table, row → column → value."""
    columns = dict.fromkeys(column for row in measured.values() for column in row)
    parts = [
        "---\nlibrary_name: m3jax\ntags: [m3jax, feature-extraction]\n---",
        f"# {_plain(name)}",
        f"An XLM-RoBERTa encoder ({config.num_hidden_layers} layers × {config.hidden_size}, {parameters:,} parameters, "
        f"{config.vocab_size:,} token ids, texts of up to {config.max_length:,} tokens), trained by "
        "[RetroMAE](https://arxiv.org/abs/2205.12035), the first stage of [M3-Embedding](https://arxiv.org/abs/2402.03216). It "
        "is a start for contrastive training, no model to search with: it has no heads, and its vectors were not trained to be "
        "compared. `python -m train.main --config.init_from=DIR --config.heads=init` of m3jax goes on from it.",
    ]
    if measured:
        body = [[row, *(_number(of.get(column)) for column in columns)] for row, of in measured.items()]
        parts += ["## Results", _table(["", *columns], body)]
    return _marked("\n\n".join([*parts, "## Training", _table(["", ""], training.items())]))


def is_ours(text: str) -> bool:
    """Whether a card is as `make_card` made it: one that a person has changed, or written, is not.

    >>> card = make_card(M3Config.tiny(), 1000)
    >>> is_ours(card), is_ours(card.replace("# M3", "# My M3")), is_ours("# My model")
    (True, False, False)
    """
    return text == _marked(text.rpartition("\n\n<!-- ")[0])


def _marked(text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{text}\n\n<!-- m3jax {digest}: as long as nothing above is changed, a save replaces this card. -->\n"


def _line(text: str) -> str:
    """The text on one line: tables need that, and PyYAML writes some of Unicode's line ends such that they read as others."""
    return " ".join(text.split())


def _plain(text: str) -> str:
    """Markdown that shows the text as it is, in a table too."""
    return re.sub(r"[\\`*\[<>|~&#$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", _line(text))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [map(_plain, head), ["---"] * len(head), *(map(_plain, row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _use(config: M3Config) -> str:
    # FlagEmbedding takes the width of colbert vectors from an argument, vLLM knows that of the hidden states only.
    square = config.colbert_dim == config.hidden_size
    colbert_dim = "" if square else f", colbert_dim={config.colbert_dim}"
    return _USE.format(max_length=config.max_length, colbert_dim=colbert_dim) + (_VLLM if square else "")


_USE = """\
## Use

`DIR` is this directory, or its name on the Hugging Face hub. With m3jax (JAX), all three:

```python
import m3jax

m3 = m3jax.load("DIR")
queries = m3jax.encode(m3, ["What is M3?"], colbert=True)
passages = m3jax.encode(m3, ["M3 is one model for dense, lexical and multi-vector retrieval."], colbert=True)
print(m3jax.score(queries, passages).hybrid)  # also .dense, .sparse and .colbert
```

With FlagEmbedding (PyTorch), all three:

```python
from FlagEmbedding import BGEM3FlagModel

model = BGEM3FlagModel("DIR", use_fp16=False{colbert_dim})
print(model.encode(["What is M3?"], max_length={max_length}, return_dense=True, return_sparse=True, return_colbert_vecs=True))
```

With sentence-transformers (PyTorch), dense:

```python
from sentence_transformers import SentenceTransformer

print(SentenceTransformer("DIR").encode(["What is M3?"]))
```"""

# A server has one task; where none is named it answers none of these calls (vLLM's issue 51801).
_VLLM = """

With vLLM from 0.21 on, a server for each, `TASK` being `embed` (dense), `token_classify` (sparse) or `token_embed` (colbert):

```sh
vllm serve DIR --runner pooling --hf-overrides '{"architectures": ["BgeM3EmbeddingModel"]}' --pooler-config.task TASK
```

```sh
H="Content-Type: application/json"
curl -s http://localhost:8000/v1/embeddings -H "$H" -d '{"model": "DIR", "input": ["What is M3?"]}'  # dense
curl -s http://localhost:8000/pooling -H "$H" -d '{"model": "DIR", "input": ["What is M3?"], "task": "TASK"}'  # the others
curl -s http://localhost:8000/tokenize -H "$H" -d '{"model": "DIR", "prompt": "What is M3?"}'
```

Sparse weights come one for each token but `<s>` and `</s>`, whose ids `/tokenize` gives; of equal ids the largest weight
counts. Colbert vectors come one for each token but `<s>`."""
