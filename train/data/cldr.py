"""The quickstart's embedded data: names and facts of Unicode CLDR, which Babel carries, as training rows and evaluation sets.

Files are written in the layouts that real data has; reading, checking and tokenising them is left to the builders.
"""

import json
import math
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from babel import Locale
from babel.core import get_global
from babel.lists import format_list
from babel.numbers import format_percent, get_currency_name
from babel.units import format_unit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# 36 of CLDR's languages, each of which names nearly everything itself. Most share their script with others here, because a
# name that was never seen is understood through related names.
LANGUAGES = (
    *("ca", "cs", "de", "en", "es", "fr", "hr", "hu", "id", "it", "nb", "nl", "pl", "pt", "ro", "sv", "sw", "tr", "vi"),
    *("bg", "mk", "ru", "sr", "uk", "ar", "fa", "ur", "hi", "mr", "ne", "ja", "yue", "zh", "el", "ko", "th"),
)
PASSAGE_LANGUAGES = 4  # passages of one entry in the corpus: about 1,700 entries make more than 6,000 candidates
QUERIES = {"dev": 1000, "test": 2000, "test-unseen": 1000}
FACTS = 4  # in a passage and in a query that tells an entry by its facts: keeps texts near 12 tokens, which two cores can learn
UNSEEN_ENTRIES = 0.1
VOCABULARY = 16000
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


class Entry(NamedTuple):
    """A thing that CLDR names: `kind` says in which of its lists, `code` under which key."""

    kind: str
    code: str


class Fact(NamedTuple):
    """Something that an entry is listed with: another entry and, where CLDR measured it, the share of speakers (0 to 1)."""

    entry: Entry
    share: float | None = None


def normalise(text: str) -> str:
    """Return `text` as strings are compared here: NFKC, casefolded, white space collapsed.

    >>> normalise("  Côte\\u00a0d’Ivoire ")
    'côte d’ivoire'
    """
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def entry_names(locale: Locale) -> dict[Entry, list[str]]:
    """Return the names that `locale` itself has for each entry, the usual one first, in NFKC (what XLM-R's tokenizer reads)."""
    names: dict[Entry, list[str]] = {}

    def add(kind: str, code: str, *candidates: str | None) -> None:
        found = [" ".join(unicodedata.normalize("NFKC", name).split()) for name in candidates if name]
        found = [name for name in dict.fromkeys(found) if name != code and any(map(str.isalpha, name))]
        if found:
            names[Entry(kind, code)] = found

    for code, name in locale.territories.items():
        add("territory", code, name)
    for code, name in locale.languages.items():
        add("language", code, name)
    for code, name in locale.scripts.items():
        add("script", code, name)
    for code, name in locale.currencies.items():
        add("currency", code, name, get_currency_name(code, count=7, locale=locale))
    for code, widths in locale.unit_display_names.items():
        if "long" in widths:
            add("unit", code, widths["long"], *(format_unit(n, code, "long", locale=locale) for n in (1, 7)))
    for code, zone in locale.meta_zones.items():
        add("zone", code, *(zone.get("long", {}).get(key) for key in ("generic", "standard", "daylight")))
    return names


def entry_facts() -> dict[Entry, list[Fact]]:
    """Return all that CLDR knows of each entry, the same in all languages, most important first.

    Territories: their widest spoken official languages and the currencies in use. Languages: script and where they are
    official, else where they are most at home. Currencies and time zones: where they are used. Scripts: who writes them.
    """
    facts: dict[Entry, list[Fact]] = defaultdict(list)
    home: dict[Entry, list[tuple[float, str]]] = defaultdict(list)
    for territory, currencies in get_global("territory_currencies").items():
        for code, _, end, tender in currencies:
            if end is None and tender:
                facts[Entry("territory", territory)].append(Fact(Entry("currency", code)))
                facts[Entry("currency", code)].append(Fact(Entry("territory", territory)))
    for territory, spoken in get_global("territory_languages").items():
        official = []
        for code, info in spoken.items():
            if info["official_status"] in ("official", "de_facto_official"):
                official.append(Fact(Entry("language", code), info["population_percent"] / 100))
                home[Entry("language", code)].append((-info["population_percent"], territory))
        official.sort(key=lambda fact: (-(fact.share or 0), fact.entry))
        used = facts[Entry("territory", territory)]
        facts[Entry("territory", territory)] = official[:3] + used + official[3:]
    for code, likely in get_global("likely_subtags").items():
        language, script, territory = (*likely.split("_"), "", "")[:3]
        if code == f"und_{script}":
            facts[Entry("script", script)] += [Fact(Entry("language", language)), Fact(Entry("territory", territory))]
        elif code == language:
            places = [place for _, place in sorted(home[Entry("language", code)])] or [territory]
            facts[Entry("language", code)].append(Fact(Entry("script", script)))
            facts[Entry("language", code)] += [Fact(Entry("territory", place)) for place in places]
    for zone, territory in get_global("zone_territories").items():
        if metazone := get_global("meta_zones").get(zone):
            facts[Entry("zone", metazone)].append(Fact(Entry("territory", territory)))
    return {entry: list(dict.fromkeys(found)) for entry, found in facts.items()}


def passage(entry: Entry, facts: Sequence[Fact], names: Mapping[Entry, Sequence[str]], locale: Locale) -> str | None:
    """Return what is known of `entry` in one language, or None where that language has no name or no fact for it.

    It lists the entry's other names and the first `FACTS` of `facts`.
    """
    if entry not in names:
        return None
    name, *others = names[entry]
    listed = list(others)
    for fact in facts[:FACTS]:
        if fact.entry in names:
            share = "" if fact.share is None else f" ({format_percent(fact.share, locale=locale)})"
            listed.append(names[fact.entry][0] + share)
    return f"{name}: {format_list(listed, locale=locale)}" if listed else None


def write_demo(directory: Path, *, seed: int) -> None:
    """Write train.jsonl, tokenizer.json and the evaluation folders dev, test and test-unseen into `directory`.

    A query is a name, or the list of the facts, of one entry; relevant are all passages of that entry, all in other
    languages than the query. A string that names several entries, or facts that hold of several, are no query at all.
    No training text contains the string of an evaluation query, nor does one of its relevant passages (strings as in
    `normalise`); the entries of test-unseen have no row in training (their names may
    stand there as facts of others). The three folders share one corpus. The same seed
    and version of Babel give the same files. ValueError if CLDR gives fewer than `QUERIES` such queries.
    """
    rng = random.Random(seed)
    locales = {code: Locale.parse(code) for code in LANGUAGES}
    names = {code: entry_names(locale) for code, locale in locales.items()}
    facts = entry_facts()

    passages: dict[Entry, dict[str, str]] = {}
    for entry in sorted({entry for known in names.values() for entry in known}):
        written: dict[str, str] = {}
        for code in rng.sample(LANGUAGES, len(LANGUAGES)):
            text = passage(entry, facts.get(entry, ()), names[code], locales[code])
            if text and len(written) < PASSAGE_LANGUAGES:
                written[code] = unicodedata.normalize("NFKC", text)
        if len(written) == PASSAGE_LANGUAGES:
            passages[entry] = written

    holders: dict[Entry, set[Entry]] = defaultdict(set)
    for entry, known in facts.items():
        for fact in known:
            holders[fact.entry].add(entry)
    texts: dict[tuple[Entry, str], list[str]] = {}  # entry, language → what asks for it
    meanings: dict[str, set[Entry]] = defaultdict(set)
    for code, known in names.items():
        for entry, found in known.items():
            texts[entry, code] = list(found)
            told = [fact.entry for fact in facts.get(entry, ())[:FACTS]]
            if len(told) > 1 and known.keys() >= set(told) and set.intersection(*(holders[e] for e in told)) == {entry}:
                texts[entry, code].append(format_list([known[e][0] for e in told], locale=locales[code]))
            for text in texts[entry, code]:
                meanings[normalise(text)].add(entry)
    queries: dict[str, tuple[Entry, str, str]] = {}  # normalised string → entry, language, string
    for entry, written in passages.items():
        for code in LANGUAGES:
            for text in texts.get((entry, code), ()):
                if code not in written and meanings[normalise(text)] == {entry}:
                    queries.setdefault(normalise(text), (entry, code, text))

    entries = sorted(passages)
    unseen = set(rng.sample(entries, round(UNSEEN_ENTRIES * len(entries))))
    seen_keys = [key for key, (entry, _, _) in queries.items() if entry not in unseen]
    unseen_keys = [key for key, (entry, _, _) in queries.items() if entry in unseen]
    rng.shuffle(seen_keys)
    rng.shuffle(unseen_keys)
    held = seen_keys[: 2 * (QUERIES["dev"] + QUERIES["test"])]
    rows = [queries[key] for key in seen_keys[len(held) :]]
    learnt = [text for _, _, text in rows]
    learnt += [text for entry in entries if entry not in unseen for text in passages[entry].values()]
    training = "\n".join(map(normalise, learnt))

    def told_nowhere(key: str) -> bool:
        own = passages[queries[key][0]].values()
        return key not in training and not any(key in normalise(text) for text in own)

    asked = {
        name: list(islice(filter(told_nowhere, pool), QUERIES[name]))
        for name, pool in zip(QUERIES, (held[: len(held) // 3], held[len(held) // 3 :], unseen_keys), strict=True)
    }
    for name, keys in asked.items():
        if len(keys) < QUERIES[name]:
            raise ValueError(
                f"{name} needs {QUERIES[name]} queries that stand in no training text; CLDR gave {len(keys)}: lower QUERIES"
            )

    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "train.jsonl", ({"query": t, "pos": list(passages[e].values()), "neg": []} for e, _, t in rows))
    train_tokenizer(learnt).save(str(directory / "tokenizer.json"))
    for name, keys in asked.items():
        folder = directory / name
        folder.mkdir(exist_ok=True)
        _write(
            folder / "corpus.jsonl",
            ({"id": f"{e.kind}.{e.code}.{c}", "title": "", "text": t} for e in entries for c, t in passages[e].items()),
        )
        numbered = [(f"{e.kind}.{e.code}.{c}.{i}", e, t) for i, (e, c, t) in enumerate(queries[key] for key in keys)]
        _write(folder / "test_queries.jsonl", ({"id": qid, "text": text} for qid, _, text in numbered))
        relevant = (
            (qid, f"{entry.kind}.{entry.code}.{code}") for qid, entry, _ in numbered for code in passages[entry]
        )
        _write(folder / "test_qrels.jsonl", ({"qid": qid, "docid": doc, "relevance": 1} for qid, doc in relevant))


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a Unigram tokenizer of XLM-R's layout for `texts`: ids 0 to 3 special, `<mask>` last.

    Pieces come from byte-pair merges and their log probabilities from counts, because the Unigram trainer of `tokenizers` sums
    in the order of a randomly seeded hash map: the same texts give another vocabulary each time. Everything but the vocabulary
    is what transformers' XLMRobertaTokenizer builds itself, whatever a tokenizer.json says.
    """
    spaces = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    merged = Tokenizer(models.BPE())
    merged.pre_tokenizer = spaces  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 1, special_tokens=list(SPECIAL), show_progress=False)
    merged.train_from_iterator(texts, trainer)
    counts = Counter(piece for encoding in merged.encode_batch(texts) for piece in encoding.ids)
    pieces = [merged.id_to_token(i) or "" for i in range(len(SPECIAL), merged.get_vocab_size())]
    scores = [math.log((counts[i] + 0.1) / counts.total()) for i in range(len(SPECIAL), merged.get_vocab_size())]
    vocabulary = [(piece, 0.0) for piece in SPECIAL] + list(zip(pieces, scores, strict=True)) + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, SPECIAL.index("<unk>"), False))
    tokenizer.pre_tokenizer = spaces  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([*SPECIAL, "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def _write(path: Path, rows: Iterable[object]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
