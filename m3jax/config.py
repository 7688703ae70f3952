"""M3Config: the sizes of an M3 model, under the names that `config.json` of the Hugging Face hub gives them.

Not here: anything of a run (batch, learning rate, paths), which lives in configs/.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What the encoder computes and cannot compute otherwise; a config.json that says something else is refused.
_FIXED = {"model_type": "xlm-roberta", "hidden_act": "gelu", "position_embedding_type": "absolute"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class M3Config:
    """Sizes of the encoder and its heads, with the defaults of BAAI/bge-m3 (PAPER §1: XLM-RoBERTa-large, 8194 positions).

    `max_position_embeddings` counts the rows of the position table; its first two are never a token's, so 8194 rows hold
    texts of 8192 tokens (`max_length`). `colbert_dim` is the width of the colbert vectors. `pooler` says whether the
    parameters hold XLM-R's pooler, which M3 never reads but released files carry. ValueError where a field is not of its type
    or cannot be.

    >>> M3Config().max_length
    8192
    """

    vocab_size: int = 250002
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 8194
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    cls_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    unk_token_id: int = 3
    colbert_dim: int = 1024
    pooler: bool = True

    def __post_init__(self) -> None:
        if wrong := [f"{name} = {value!r}, expected {rule}" for name, value, rule in self._unlike_their_type()]:
            raise ValueError("; ".join(wrong))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.max_length < 2:
            raise ValueError(
                "max_position_embeddings must leave room for <s> and </s> after the rows up to pad_token_id, expected "
                f"at least {self.pad_token_id + 3}, got {self.max_position_embeddings}"
            )

    def _unlike_their_type(self) -> Iterator[tuple[str, Any, str]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name.endswith("_id") else 1
            if field.type is int and not (type(value) is int and value >= least):
                yield field.name, value, f"an integer of at least {least}"
            elif field.type is float and not (type(value) in (int, float) and 0 <= value < math.inf):
                yield field.name, value, "a number of at least 0"
            elif field.type is bool and type(value) is not bool:
                yield field.name, value, "true or false"

    @property
    def max_length(self) -> int:
        """Tokens of the longest text, `<s>` and `</s>` included: the position of the first token is pad_token_id + 1."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def unused_ids(self) -> tuple[int, int, int, int]:
        """Ids that give no lexical term: CLS, EOS, PAD, UNK (PAPER §1)."""
        return (self.cls_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id)

    @classmethod
    def from_file(cls, path: str | Path) -> "M3Config":
        """Read a released `config.json`; ValueError as `from_json`, naming the path, also where it is no UTF-8."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8, {error}; download or write it again") from error
        return cls.from_json(text, source=str(path))

    @classmethod
    def bge_m3(cls) -> "M3Config":
        """The sizes of BAAI/bge-m3: 568M parameters."""
        return cls()

    @classmethod
    def tiny(cls, **changes: Any) -> "M3Config":
        """Sizes for tests and demonstrations: 2 layers of width 64, 126 tokens; `changes` replace any of them."""
        sizes: dict[str, Any] = {
            "vocab_size": 1000,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 128,
        }
        sizes |= changes
        return cls(**({"colbert_dim": sizes["hidden_size"]} | sizes))

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> "M3Config":
        """Read a released `config.json` (or one that `to_json` wrote); keys that do not change the model are passed over.

        Raises ValueError, naming `source`, where it is not JSON, describes another architecture, lacks a size, or has one that
        cannot be.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: expected JSON, {error}; download or write it again") from error
        if not isinstance(given, dict):
            raise ValueError(f"{source}: expected a JSON object of sizes, got a {type(given).__name__}")
        wrong = [f"{k} = {given[k]!r}, expected {v!r}" for k, v in _FIXED.items() if given.get(k, v) != v]
        wrong += [f"{name} is missing" for name in sorted(_SIZES - given.keys())]
        if wrong:
            raise ValueError(f"{source} must describe an XLM-RoBERTa encoder: {'; '.join(wrong)}")
        names = {field.name for field in dataclasses.fields(cls)}
        known = {k: v for k, v in given.items() if k in names}
        if given.get("bos_token_id") is not None:
            known["cls_token_id"] = given["bos_token_id"]
        try:
            return cls(**({"colbert_dim": given["hidden_size"]} | known))
        except ValueError as error:
            raise ValueError(f"{source} must describe an XLM-RoBERTa encoder: {error}") from error

    def to_json(self) -> str:
        """The `config.json` that transformers, FlagEmbedding and `from_json` read."""
        sizes = dataclasses.asdict(self)
        # transformers knows <s> as bos_token_id; dropout 0.1 is what XLM-R declares for training in PyTorch.
        sizes["bos_token_id"] = sizes.pop("cls_token_id")
        extra = {
            "architectures": ["XLMRobertaModel"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_dropout_prob": 0.1,
            "use_cache": True,
            "dtype": "float32",
        }
        return json.dumps(dict(sorted((sizes | _FIXED | extra).items())), indent=2) + "\n"


_SIZES = {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
}
