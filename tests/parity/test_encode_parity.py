"""What `encode` gives equals what PyTorch gives: the three heads in plain PyTorch always, and FlagEmbedding where installed.

Not here: hidden states alone (test_xlm_roberta_parity.py) and training (test_training_parity.py).
"""

import contextlib
import json
import shutil

import numpy as np
import pytest

import m3jax
from m3jax.tokenization import Tokenizer

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch (the `test` extra)")
transformers = pytest.importorskip("transformers", reason="parity needs transformers (the `test` extra)")

SENTENCES = {
    "ar": "يشرب القط الحليب قرب النافذة كل صباح",
    "bn": "নদীর ধারে একটি পুরোনো নৌকা বাঁধা আছে",
    "de": "Die alte Brücke über den Fluss wird im Frühling erneuert.",
    "el": "Το τρένο φεύγει από τον σταθμό στις επτά το πρωί.",
    "en": "A letter from the lighthouse keeper arrived after the storm.",
    "es": "¿Cuántos años tarda un olivo en dar aceitunas?",
    "fa": "باغبان پیر درخت انار را آبیاری می‌کند",
    "fi": "Järven jää kestää kävelijän vasta joulukuussa.",
    "fr": "L’horloger répare une montre qui n’a plus sonné depuis dix ans.",
    "hi": "बाज़ार में आज ताज़ा आम और केले मिलते हैं",
    "id": "Nelayan itu pulang membawa tiga ekor ikan besar.",
    "ja": "祖母の庭には赤い椿が咲いている。",
    "ko": "도서관은 일요일에 문을 닫습니다.",
    "ru": "Зимой северное сияние видно почти каждую ночь.",
    "sw": "Mvua ilinyesha usiku kucha na mto ukafurika.",
    "te": "పాత కోట గోడల మీద పావురాలు గూడు కట్టాయి",
    "th": "แม่ค้าขายข้าวเหนียวมะม่วงที่ริมคลอง",
    "tr": "Çömlekçi çamuru döndürürken eski bir türkü söylüyor.",
    "vi": "Con đường làng ngập nắng và tiếng ve mùa hè.",
    "zh": "山上的茶园在清晨被雾笼罩。",
}

SHORT = [
    *SENTENCES.values(),
    "",
    "storm",
    "the storm after the storm after The storm",  # a term that comes back keeps its largest weight
    "a <pad> b <mask> c </s> d",  # special tokens written out; <mask> is a term
    "☃ 🙂 letter",  # no piece: <unk>
]
LONG = [" ".join([*SENTENCES.values()] * times) for times in (1, 20)]

# width, layers, heads, rows of the position table; the first also reads long texts.
GEOMETRIES = [(64, 2, 4, 8194), (256, 4, 4, 130), (128, 24, 8, 130), (1024, 2, 16, 130)]


def _name(geometry):
    return f"{geometry[0]}x{geometry[1]}"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_json):
    """The tiny tokenizer with every word and character of SENTENCES added to its vocabulary."""
    content = json.loads(tiny_tokenizer_json)
    vocabulary = content["model"]["vocab"]
    words = " ".join(SENTENCES.values()).split()
    known = {piece for piece, _ in vocabulary}
    # Whole words that begin with an even code point are likelier than their characters, the others less likely.
    scores = {c: -9.0 for word in words for c in word} | {f"▁{w}": -90.0 if ord(w[0]) % 2 else -9.0 for w in words}
    vocabulary += [[piece, score] for piece, score in scores.items() if piece not in known]
    mask = next(token for token in content["added_tokens"] if token["content"] == "<mask>")
    mask["id"] = len(vocabulary)
    return Tokenizer.from_json(json.dumps(content))


@pytest.fixture(scope="module", params=GEOMETRIES, ids=_name)
def written(request, geometry, torch_encoder, torch_heads, tokenizer, tmp_path_factory):
    """(directory that PyTorch wrote, the M3 that m3jax read from it, the directory that m3jax wrote)."""
    width, layers, heads, positions = request.param
    config = geometry(
        width,
        layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        vocab_size=tokenizer.vocab_size + 3,
    )
    model, heads = torch_encoder(config, 7), torch_heads(config, 8)
    # relu lets half of the token weights through, whatever the random numbers are.
    with torch.no_grad():
        hidden = model(torch.tensor(np.concatenate(tokenizer.encode(SHORT[:3])[0]))[None].long()).last_hidden_state
        heads["sparse_linear"].bias -= heads["sparse_linear"](hidden).median()
    source = tmp_path_factory.mktemp("torch")
    if layers == 24:  # as BAAI/bge-m3 is released: pickles only, heads in half precision
        model.config.save_pretrained(source)
        torch.save(model.state_dict(), source / "pytorch_model.bin")
        heads = {name: head.half() for name, head in heads.items()}
    else:
        model.save_pretrained(source)
    for name, head in heads.items():
        torch.save(head.state_dict(), source / f"{name}.pt")
    (source / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    m3 = m3jax.load(source)
    target = tmp_path_factory.mktemp("m3jax") / "model"
    m3jax.save(m3, target)
    return source, m3, target


@pytest.fixture(scope="module")
def ours(written):
    _, m3, _ = written
    long = m3.config.max_length == 8192
    with pytest.warns(UserWarning, match="^1 of 27 texts") if long else contextlib.nullcontext():
        return m3jax.encode(m3, _texts(m3), colbert=True)


def test_directory_keeps_every_tensor(written):
    """transformers reads from our directory, bit for bit, what it wrote to its own."""
    source, _, target = written
    before, after = (transformers.XLMRobertaModel.from_pretrained(d).state_dict() for d in (source, target))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        before, after = (torch.load(d / name, weights_only=True) for d in (source, target))
        assert before.keys() == after.keys() and all(torch.equal(before[k].float(), after[k]) for k in before)


def test_auto_tokenizer_gives_the_same_ids(written):
    _, m3, target = written
    ids, _ = m3.tokenizer.encode([*SHORT, *LONG])
    theirs = transformers.AutoTokenizer.from_pretrained(target)([*SHORT, *LONG])["input_ids"]
    assert [text.tolist() for text in ids] == theirs


def test_encode_equals_plain_torch(written, ours):
    _, m3, target = written
    _compare(ours, _plain_encode(target, m3, _texts(m3)))


def test_encode_equals_flag_embedding(written, ours, flag_embedding):
    _, m3, target = written
    peer = flag_embedding("inference.embedder.encoder_only.m3").M3Embedder(str(target), use_fp16=False, devices="cpu")
    answers = [
        peer.encode(
            batch,
            max_length=m3.config.max_length,
            return_dense=True,
            return_sparse=True,
            return_colbert_vecs=True,
        )
        for batch in _batches(_texts(m3))
    ]
    _compare(ours, {name: [x for answer in answers for x in answer[name]] for name in answers[0]})


@pytest.mark.parametrize("written", GEOMETRIES[:1], indirect=True, ids=_name)
def test_score_equals_flag_embedding(written, ours, flag_embedding):
    """One pair at a time: padding changes the peer's colbert scores (test_training_parity.py). Its mixtures are means."""
    _, m3, target = written
    peer = flag_embedding("inference.embedder.encoder_only.m3").M3Embedder(str(target), use_fp16=False, devices="cpu")
    queries, passages = SHORT[:6], SHORT[6:12]
    theirs = peer.compute_score(
        list(zip(queries, passages, strict=True)), batch_size=1, weights_for_different_modes=[1.0, 0.3, 1.0]
    )
    given = m3jax.score(
        m3jax.encode(m3, queries, colbert=True), m3jax.encode(m3, passages, colbert=True), pairwise=True
    )
    assert any(score > 0 for score in theirs["sparse"])
    for name in ("dense", "sparse", "colbert"):
        np.testing.assert_allclose(getattr(given, name), theirs[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(given.hybrid / 2.3, theirs["colbert+sparse+dense"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("written", GEOMETRIES[:1], indirect=True, ids=_name)
def test_missing_heads_are_an_error(written, tmp_path):
    """Where the peer is wrong (PEER §2.4): see test_missing_heads_are_random_in_flag_embedding."""
    _headless(written, tmp_path)
    with pytest.raises(ValueError, match=r"sparse_linear\.pt and colbert_linear\.pt"):
        m3jax.load(tmp_path)


@pytest.mark.parametrize("written", GEOMETRIES[:1], indirect=True, ids=_name)
def test_missing_heads_are_random_in_flag_embedding(written, tmp_path, flag_embedding):
    """Two loads of one directory give two models, without a word: its lexical weights and colbert vectors mean nothing."""
    _headless(written, tmp_path)
    runner = flag_embedding("finetune.embedder.encoder_only.m3.runner").EncoderOnlyEmbedderM3Runner
    first, second = (runner.get_model(str(tmp_path))["sparse_linear"].weight for _ in range(2))
    assert not torch.equal(first, second)


def _headless(written, directory):
    _, _, target = written
    shutil.copytree(target, directory, dirs_exist_ok=True)
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        (directory / name).unlink()


def _texts(m3):
    """Short texts, and the long ones where the position table holds them: the last fills it and is cut."""
    return SHORT + (LONG if m3.config.max_length > 1000 else [])


def _batches(texts):
    """Texts of like lengths, and the long ones one by one: in a reference, padding costs as much as tokens."""
    return [texts[: len(SHORT)], *([text] for text in texts[len(SHORT) :])]


def _plain_encode(directory, m3, texts):
    """The heads as PAPER.md states them, a loop over tokens, with transformers' tokenizer and encoder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.XLMRobertaModel.from_pretrained(directory).eval()
    heads = {h: torch.load(directory / f"{h}_linear.pt", weights_only=True) for h in ("sparse", "colbert")}
    result = {"dense_vecs": [], "lexical_weights": [], "colbert_vecs": []}
    for batch in _batches(texts):
        inputs = tokenizer(batch, truncation=True, max_length=m3.config.max_length, padding=True, return_tensors="pt")
        with torch.no_grad():
            batch_hidden = model(**inputs).last_hidden_state
        for padded, ids, mask in zip(batch_hidden, inputs["input_ids"], inputs["attention_mask"], strict=True):
            hidden = padded[mask == 1]
            weights = torch.relu(hidden @ heads["sparse"]["weight"][0] + heads["sparse"]["bias"])
            vectors = hidden[1:] @ heads["colbert"]["weight"].T + heads["colbert"]["bias"]
            terms = {}
            for term, weight in zip(ids[mask == 1].tolist(), weights.tolist(), strict=True):
                if term > 3 and weight > 0:
                    terms[str(term)] = max(weight, terms.get(str(term), 0.0))
            result["dense_vecs"].append((hidden[0] / hidden[0].norm()).numpy())
            result["lexical_weights"].append(terms)
            result["colbert_vecs"].append((vectors / vectors.norm(dim=1, keepdim=True)).numpy())
    return result


def _compare(ours, theirs):
    assert len(ours.dense_vecs) == len(theirs["dense_vecs"])
    assert sum(map(len, theirs["lexical_weights"])) > 5 * len(SENTENCES)
    for text, dense in enumerate(theirs["dense_vecs"]):
        assert _cosine(ours.dense_vecs[text], dense) >= 0.999999
        assert ours.colbert_vecs[text].shape == theirs["colbert_vecs"][text].shape
        assert _cosine(ours.colbert_vecs[text], theirs["colbert_vecs"][text]).min() >= 0.999999
        assert _weight_error(ours.lexical_weights[text], theirs["lexical_weights"][text]) <= 1e-5


def _cosine(ours, theirs):
    assert np.abs(np.linalg.norm(ours, axis=-1) - 1).max() < 1e-6
    ours, theirs = np.float64(ours), np.float64(theirs)
    return (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)


def _weight_error(ours, theirs):
    """Largest difference of a term's weight; a term that only one side has weighs 0 on the other."""
    return max((abs(ours.get(term, 0.0) - theirs.get(term, 0.0)) for term in ours.keys() | theirs.keys()), default=0.0)
