"""Rows, evaluation folders and settings of training runs that take seconds, for the tests of whole runs."""

import json

import numpy as np

import m3jax
from configs import base

WORDS = (
    "quick",
    "brown",
    "fox",
    "jumps",
    "lazy",
    "small",
    "cat",
    "house",
    "river",
    "forest",
    "stories",
    "ville",
    "paris",
)
FUNCTIONS = ("dense", "sparse", "colbert", "dense+sparse", "all")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 34,
}
# All texts of a kind fall into one bucket of lengths and all runs train alike, so that XLA compiles each function once.
TRAINING = {
    "query_max_length": 8,
    "passage_max_length": 16,
    "length_groups": ((16, 4),),
    "group_size": 2,
    "steps": 4,
    "warmup": 0.0,
    "learning_rate": 1e-2,
    "adam_b2": 0.98,
    "temperature": 0.05,
    "distill_start": 2,
    "remat": "elements",
    "log_every": 1,
    "evaluate_every": 2,
    "save_every": 2,
    "keep_checkpoints": 2,
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_set(directory, tokenizer_json):
    """Twelve rows, three evaluation folders and a tokenizer, laid out as the demo set is."""
    random, tokenizer = np.random.default_rng(0), m3jax.Tokenizer.from_json(tokenizer_json)

    def text(words, shortest, longest):
        while True:
            drawn = " ".join(random.choice(WORDS, words, replace=False))
            if shortest <= len(tokenizer.encode([drawn])[0][0]) <= longest:
                return drawn

    def passage():
        return text(3, 9, 16)

    rows = [{"query": text(1, 3, 8), "pos": [passage()], "neg": [passage()]} for _ in range(12)]
    write(directory / "train.jsonl", rows)
    (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    corpus = [{"id": f"p{i}", "title": "", "text": passage()} for i in range(8)]
    queries = [{"id": f"q{i}.{'sw' if i == 2 else 'de'}.0", "text": text(1, 3, 8)} for i in range(4)]
    for name in ("dev", "test", "test-unseen"):
        write(directory / name / "corpus.jsonl", corpus)
        write(directory / name / "test_queries.jsonl", queries)
        judged = [{"qid": query["id"], "docid": f"p{i}", "relevance": 1} for i, query in enumerate(queries)]
        write(directory / name / "test_qrels.jsonl", judged)


def small_config(data, output, **changes):
    """base.py at the sizes above on the folder `data`, which `write_set` has written."""
    config = base.get_config()
    config.name, config.output = "tiny", str(output)
    config.model.update(SIZES)
    config.tokenizer = str(data / "tokenizer.json")
    config.data.update(
        train=str(data / "train.jsonl"), dev=str(data / "dev"), test=f"{data / 'test'},{data / 'test-unseen'}"
    )
    config.data.folder = str(data / "prepared")
    config.update(TRAINING)
    config.example.update(query="*.sw.*", language="Swahili")
    config.update_from_flattened_dict(changes)
    return config
