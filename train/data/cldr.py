"""The quickstart's embedded data: names and facts of Unicode CLDR, which Babel carries, as training rows and evaluation sets.

Files are written in the layouts that real data has; reading, checking and tokenising them is left to the builders.
"""

import math
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from babel import Locale
from babel.core import get_global
from babel.lists import format_list
from babel.numbers import get_currency_name
from babel.units import format_unit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from train.files import write_lines
from train.tasks import write_task

# 36 of CLDR's languages, each of which names nearly everything itself. Most share their script with others here, because a
# name that was never seen is understood through related names.
LANGUAGES = (
    *("ca", "cs", "de", "en", "es", "fr", "hr", "hu", "id", "it", "nb", "nl", "pl", "pt", "ro", "sv", "sw", "tr", "vi"),
    *("bg", "mk", "ru", "sr", "uk", "ar", "fa", "ur", "hi", "mr", "ne", "ja", "yue", "zh", "el", "ko", "th"),
)
PASSAGE_LANGUAGES = 4  # passages of one entry in the corpus: about 1,700 entries make more than 6,000 candidates
QUERIES = {"dev": 1000, "test": 2000, "test-unseen": 1000}
FACTS = 3  # in a passage, and in a query that tells an entry by its facts
# Characters of a text; longer ones are left out, because the cost of a step grows with the product of both lengths.
QUERY_LENGTH, PASSAGE_LENGTH = 30, 48
UNSEEN_ENTRIES = 0.1
VOCABULARY = 6000  # small: a new name is understood by pieces that it shares with known ones (RESULTS.md)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


class Entry(NamedTuple):
    """A thing that CLDR names: `kind` says in which of its lists, `code` under which key."""

    kind: str
    code: str


class Query(NamedTuple):
    """A text in one language that asks for `entry`: its name, or a list of the entries `told`, which are its facts."""

    entry: Entry
    language: str
    text: str
    told: tuple[Entry, ...] = ()


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


def entry_facts() -> dict[Entry, list[Entry]]:
    """Return the entries that CLDR lists each entry with, the same in all languages, most important first.

    Territories: their widest spoken official languages and the currencies in use. Languages: script and where they are
    official, else where they are most at home. Currencies and time zones: where they are used. Scripts: who writes them.
    """
    facts: dict[Entry, list[Entry]] = defaultdict(list)
    home: dict[Entry, list[tuple[float, str]]] = defaultdict(list)
    for territory, currencies in get_global("territory_currencies").items():
        for code, _, end, tender in currencies:
            if end is None and tender:
                facts[Entry("territory", territory)].append(Entry("currency", code))
                facts[Entry("currency", code)].append(Entry("territory", territory))
    for territory, spoken in get_global("territory_languages").items():
        official = []
        for code, info in spoken.items():
            if info["official_status"] in ("official", "de_facto_official"):
                official.append((-info["population_percent"], Entry("language", code)))
                home[Entry("language", code)].append((-info["population_percent"], territory))
        widest = [language for _, language in sorted(official)]
        used = facts[Entry("territory", territory)]
        facts[Entry("territory", territory)] = widest[:3] + used + widest[3:]
    for code, likely in get_global("likely_subtags").items():
        language, script, territory = (*likely.split("_"), "", "")[:3]
        if code == f"und_{script}":
            facts[Entry("script", script)] += [Entry("language", language), Entry("territory", territory)]
        elif code == language:
            places = [place for _, place in sorted(home[Entry("language", code)])] or [territory]
            facts[Entry("language", code)].append(Entry("script", script))
            facts[Entry("language", code)] += [Entry("territory", place) for place in places]
    for zone, territory in get_global("zone_territories").items():
        if metazone := get_global("meta_zones").get(zone):
            facts[Entry("zone", metazone)].append(Entry("territory", territory))
    return {entry: list(dict.fromkeys(found)) for entry, found in facts.items()}


def passage(entry: Entry, facts: Sequence[Entry], names: Mapping[Entry, Sequence[str]], locale: Locale) -> str | None:
    """Return what is known of `entry` in one language, or None where that language has no name or no fact for it.

    It lists the entry's other names and the first `FACTS` of `facts`.
    """
    if entry not in names:
        return None
    name, *others = names[entry]
    listed = [*others, *(names[fact][0] for fact in facts[:FACTS] if fact in names)]
    return unicodedata.normalize("NFKC", f"{name}: {format_list(listed, locale=locale)}") if listed else None


def write_demo(directory: Path, *, seed: int) -> None:
    """Write train.jsonl, texts.jsonl, tokenizer.json and the evaluation folders dev, test and test-unseen into `directory`.

    texts.jsonl has the passages of training, for stage 1, and so nothing of the entries of test-unseen.

    A query is a name, or the list of the facts, of one entry; relevant are all passages of that entry, all in other
    languages than the query. A string that names several entries, or facts that hold of several, are no query at all.
    No training text contains the string of an evaluation query, nor does one of its relevant passages (strings as in
    `normalise`). The entries of test-unseen are told nowhere in training: no row asks for one, and where one is a fact of
    another entry, training has that entry's passages without the fact and no query that tells it. The three folders
    share one corpus. The same seed and version of Babel give the same files. ValueError if CLDR gives fewer than
    `QUERIES` such queries.
    """
    rng = random.Random(seed)
    locales = {code: Locale.parse(code) for code in LANGUAGES}
    names = {code: entry_names(locale) for code, locale in locales.items()}
    facts = entry_facts()

    passages: dict[Entry, dict[str, str]] = {}
    told: set[str] = set()
    for entry in sorted({entry for known in names.values() for entry in known}):
        written: dict[str, str] = {}
        for code in rng.sample(LANGUAGES, len(LANGUAGES)):
            text = passage(entry, facts.get(entry, ()), names[code], locales[code])
            if text and len(text) <= PASSAGE_LENGTH and len(written) < PASSAGE_LANGUAGES:
                written[code] = text
        # Of entries that one text tells of (units under two codes, from Babel 2.19 on) the first stays: of the others that text
        # would be a wrong answer, and training could tell of one that it is not to see.
        if len(written) == PASSAGE_LANGUAGES and told.isdisjoint(written.values()):
            passages[entry] = written
            told.update(written.values())
    queries = _queries(passages, facts, names, locales)

    entries = sorted(passages)
    unseen = set(rng.sample(entries, round(UNSEEN_ENTRIES * len(entries))))
    seen_keys = [key for key, query in queries.items() if unseen.isdisjoint((query.entry, *query.told))]
    unseen_keys = [key for key, query in queries.items() if query.entry in unseen]
    rng.shuffle(seen_keys)
    rng.shuffle(unseen_keys)
    held = seen_keys[: 2 * (QUERIES["dev"] + QUERIES["test"])]

    learnt: dict[Entry, list[str]] = {}  # entry → its passages as training has them
    for entry in entries:
        if entry not in unseen:
            known = [fact for fact in facts.get(entry, ()) if fact not in unseen]
            texts = (passage(entry, known, names[code], locales[code]) for code in passages[entry])
            learnt[entry] = [text for text in texts if text]
    rows = [query for query in (queries[key] for key in seen_keys[len(held) :]) if learnt[query.entry]]
    corpus = [query.text for query in rows] + [text for texts in learnt.values() for text in texts]
    training = "\n".join(map(normalise, corpus))

    def told_nowhere(key: str) -> bool:
        own = passages[queries[key].entry].values()
        return key not in training and not any(key in normalise(text) for text in own)

    asked = {
        name: [queries[key] for key in islice(filter(told_nowhere, pool), QUERIES[name])]
        for name, pool in zip(QUERIES, (held[: len(held) // 3], held[len(held) // 3 :], unseen_keys), strict=True)
    }
    for name, found in asked.items():
        if len(found) < QUERIES[name]:
            raise ValueError(
                f"{name} needs {QUERIES[name]} queries that stand in no training text; CLDR gave {len(found)}: lower QUERIES"
            )

    directory.mkdir(parents=True, exist_ok=True)
    write_lines(directory / "train.jsonl", ({"query": row.text, "pos": learnt[row.entry], "neg": []} for row in rows))
    write_lines(directory / "texts.jsonl", ({"text": text} for texts in learnt.values() for text in texts))
    train_tokenizer(corpus).save(str(directory / "tokenizer.json"))
    written = {f"{e.kind}.{e.code}.{c}": text for e in entries for c, text in passages[e].items()}
    for name, found in asked.items():
        numbered = {f"{q.entry.kind}.{q.entry.code}.{q.language}.{i}": q for i, q in enumerate(found)}
        relevant = {
            id: {f"{query.entry.kind}.{query.entry.code}.{code}": 1 for code in passages[query.entry]}
            for id, query in numbered.items()
        }
        write_task(directory / name, written, {id: query.text for id, query in numbered.items()}, relevant)


def _queries(
    passages: Mapping[Entry, Mapping[str, str]],
    facts: Mapping[Entry, Sequence[Entry]],
    names: Mapping[str, Mapping[Entry, Sequence[str]]],
    locales: Mapping[str, Locale],
) -> dict[str, Query]:
    """Normalised string → the query that it is: all that mean one entry alone, in languages that its passages are not in."""
    holders: dict[Entry, set[Entry]] = defaultdict(set)
    for entry, known in facts.items():
        for fact in known:
            holders[fact].add(entry)
    meanings: dict[str, set[Entry]] = defaultdict(set)
    found: list[Query] = []
    for code, known in names.items():
        for entry, own in known.items():
            asking = [Query(entry, code, name) for name in own]
            told = tuple(facts.get(entry, ())[:FACTS])
            if len(told) > 1 and known.keys() >= set(told) and set.intersection(*(holders[e] for e in told)) == {entry}:
                listed = format_list([known[e][0] for e in told], locale=locales[code])
                asking.append(Query(entry, code, listed, told))
            for query in asking:
                meanings[normalise(query.text)].add(entry)
            found += asking
    queries: dict[str, Query] = {}
    for query in sorted(found, key=lambda query: query.entry):
        key = normalise(query.text)
        elsewhere = query.entry in passages and query.language not in passages[query.entry]
        if elsewhere and len(query.text) <= QUERY_LENGTH and meanings[key] == {query.entry}:
            queries.setdefault(key, query)
    return queries


def train_tokenizer(texts: Sequence[str], size: int = VOCABULARY) -> Tokenizer:
    """Return a Unigram tokenizer of XLM-R's layout with `size` pieces for `texts`: ids 0 to 3 special, `<mask>` last.

    Pieces come from byte-pair merges and their log probabilities from counts, because the Unigram trainer of `tokenizers` sums
    in the order of a randomly seeded hash map: the same texts give another vocabulary each time. Everything but the vocabulary
    is what transformers' XLMRobertaTokenizer builds itself, whatever a tokenizer.json says.
    """
    spaces = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    merged = Tokenizer(models.BPE())
    merged.pre_tokenizer = spaces  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=list(SPECIAL), show_progress=False)
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
