import json

import numpy as np
import pytest

from m3jax.tokenization import Tokenizer, cls_columns

TEXTS = [
    "the quick brown fox jumps over a lazy dog",
    "東京は日本の首都です。Москва — столица России",
    "",
    "  ",
    "the  fox\tand\nthe dog",
    "a <mask> b </s> c <s><pad> d",
    "unknown: ЖЖ ☃ 😀",
    "ﬁne １２３ ｶﾅ",  # NFKC changes these
    "e\u0301 \u200b x",
    "fox " * 300,
]


def test_special_ids(tiny_tokenizer):
    t = tiny_tokenizer
    assert (t.cls_id, t.pad_id, t.eos_id, t.unk_id) == (0, 1, 2, 3)
    assert t.mask_id == t.vocab_size - 1
    assert t.unused_ids == {0, 1, 2, 3}
    assert t.pieces([0, 1, 2, 3, t.mask_id]) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def test_same_ids_as_transformers(tiny_tokenizer, tiny_tokenizer_json, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer_json, encoding="utf-8")
    names = dict(cls_token="<s>", bos_token="<s>", pad_token="<pad>", eos_token="</s>", sep_token="</s>")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), unk_token="<unk>", mask_token="<mask>", **names
    )
    for max_length in (None, 2, 3, 7, 64):
        ours, cut = tiny_tokenizer.encode(TEXTS, max_length)
        theirs = reference(TEXTS, truncation=max_length is not None, max_length=max_length)["input_ids"]
        assert [row.tolist() for row in ours] == theirs
        assert all(row.dtype == np.int32 for row in ours)
        whole = reference(TEXTS)["input_ids"]
        assert cut == (0 if max_length is None else sum(len(row) > max_length for row in whole))


def test_mcls_token_by_token(tiny_tokenizer):
    """A CLS before each 256 tokens, all within max_length; no run is empty (PAPER §5)."""
    (word,), _ = tiny_tokenizer.encode(["a"])
    assert len(word) == 3
    counts = [0, 1, 2, 255, 256, 257, 258, 511, 512, 513, 514, 768, 769, 1100]
    for max_length in (None, 2, 3, 4, 257, 258, 259, 260, 261, 514, 515, 516, 517, 518, 519, 773, 8192):
        expected, cut = [], 0
        for count in counts:
            row = [0]
            for token in range(count):
                new_run = [0] * (token > 0 and token % 256 == 0)
                if max_length and len(row) + len(new_run) + 2 > max_length:
                    cut += 1
                    break
                row += [*new_run, word[1]]
            expected.append([*row, 2])
        got = tiny_tokenizer.encode(["a " * count for count in counts], max_length, mcls=True)
        assert ([row.tolist() for row in got[0]], got[1]) == (expected, cut)
        for row in expected:
            assert list(cls_columns(len(row), mcls=True)) == [column for column, id in enumerate(row) if id == 0]
            assert list(cls_columns(len(row), mcls=False)) == [0]


def test_mcls_leaves_a_literal_cls_alone(tiny_tokenizer):
    (row,), _ = tiny_tokenizer.encode(["<s> " * 300], mcls=True)
    assert row.tolist() == [0] * 302 + [2] and list(cls_columns(len(row), mcls=True)) == [0, 257]


def test_empty_text_and_no_texts(tiny_tokenizer):
    assert tiny_tokenizer.encode([""])[0][0].tolist() == [0, 2]
    assert tiny_tokenizer.encode([]) == ([], 0)


def test_pieces_keep_word_starts_apart(tiny_tokenizer):
    (ids,), _ = tiny_tokenizer.encode(["fox zfox"])
    pieces = tiny_tokenizer.pieces(ids)
    assert pieces[0] == "<s>" and pieces[-1] == "</s>" and pieces[1].startswith("▁")
    start, inside = tiny_tokenizer._inner.token_to_id("▁a"), tiny_tokenizer._inner.token_to_id("a")
    assert start != inside and tiny_tokenizer.pieces(np.array([start, inside])) == ["▁a", "a"]
    for id in (-1, tiny_tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {id} has no piece"):
            tiny_tokenizer.pieces([id])


def test_stored_truncation_and_padding_are_switched_off(tiny_tokenizer, tiny_tokenizer_json):
    data = json.loads(tiny_tokenizer_json)
    data["truncation"] = dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
    data["padding"] = dict(
        strategy={"Fixed": 9}, direction="Right", pad_to_multiple_of=None, pad_id=1, pad_type_id=0, pad_token="<pad>"
    )
    stored = Tokenizer.from_json(json.dumps(data))
    texts = ["fox", "the quick brown fox jumps over a lazy dog"]
    for ours, plain in zip(stored.encode(texts)[0], tiny_tokenizer.encode(texts)[0], strict=True):
        assert ours.tolist() == plain.tolist()


def test_json_is_kept_byte_for_byte(tiny_tokenizer_json, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tiny_tokenizer_json.replace("{", "{\r\n", 1).encode("utf-8"))
    assert Tokenizer.from_file(path).json.encode("utf-8") == path.read_bytes()


def test_bad_files(tiny_tokenizer_json, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json: expected the text of a tokenizer\.json"):
        Tokenizer.from_file(path)
    renamed = tiny_tokenizer_json.replace('"<pad>"', '"[PAD]"').replace('"<unk>"', '"[UNK]"')
    with pytest.raises(ValueError, match="missing: <pad> <unk>"):
        Tokenizer.from_json(renamed)
    data = json.loads(tiny_tokenizer_json)
    data["post_processor"] = None
    with pytest.raises(ValueError, match="the empty text must become <s> </s>"):
        Tokenizer.from_json(json.dumps(data))
    unmasked = tiny_tokenizer_json.replace('"<mask>"', '"<other>"')
    assert Tokenizer.from_json(unmasked).mask_id is None


def test_bad_texts(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"texts\[1\] must be a str; int came: 3"):
        tiny_tokenizer.encode(["a", 3])
    with pytest.raises(ValueError, match=r"texts\[0\] must be a str; tuple came"):
        tiny_tokenizer.encode([("a", "b")])
    with pytest.raises(ValueError, match="one str came"):
        tiny_tokenizer.encode("fox")
    with pytest.raises(ValueError, match=r"texts\[2\] is not valid Unicode: lone surrogate '\\ud83d' at character 4"):
        tiny_tokenizer.encode(["a", "b", "fox \ud83d"])
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tiny_tokenizer.encode(["a"], max_length=1)
