"""The texts that `verify` encodes where none are given: short ones in 24 languages, odd ones, long ones of any length.

Not here: what is done with them (verify.py). All were written for this file.
"""

SENTENCES = (
    "The ferry leaves at dawn, but only if the fog has lifted.",
    "Der Bäcker an der Ecke verkauft im Winter auch heißen Apfelsaft.",
    "La bibliothécaire range les cartes marines par ordre de profondeur.",
    "El río cambió de cauce después de las lluvias de abril.",
    "O pescador remenda a rede enquanto espera a maré.",
    "Il treno notturno attraversa le Alpi senza fermarsi.",
    "De molen op de dijk maalt weer graan sinds vorig jaar.",
    "Kartograf zaznaczył na mapie trzy nieznane jeziora.",
    "Мельник открыл шлюз, и вода пошла к колесу.",
    "Коваль підковує коней біля старого мосту.",
    "Ο μελισσοκόμος μετρά τις κυψέλες πριν από τον χειμώνα.",
    "Saatçi, kulenin saatini her pazartesi kurar.",
    "يقرأ الحارس النجوم ليعرف موعد هبوب الرياح.",
    "نویسنده نامه‌ها را به ترتیب تاریخ در جعبه چید.",
    "השען תיקן את המטוטלת לפני החג.",
    "किसान ने कुएँ के पास नीम का पेड़ लगाया।",
    "মাঝি সন্ধ্যায় নৌকা ঘাটে বেঁধে রাখে।",
    "தச்சர் பழைய கதவுக்குப் புதிய பூட்டு செய்தார்.",
    "ชาวสวนเก็บมะม่วงก่อนฝนจะมา",
    "Người thợ gốm phơi bình ngoài sân trước khi nung.",
    "Mlinzi wa bustani humwagilia miche kila asubuhi.",
    "灯台守は毎晩、同じ時刻に火をともす。",
    "우체부는 눈이 와도 산속 마을까지 편지를 나른다.",
    "木匠把旧船板做成了一张长桌。",
)

ODD = (
    "",
    "?",
    "tide tide tide, Tide and the tide",  # a term that comes back keeps its largest weight
    "12,450.75 m² at 3.5 % is 435.78 m²; see §4(b)",
    "if (x[i] != null) { return f(x[i]); }",
    "a <mask> b </s> c <pad> d",  # special tokens written out
    "🛶🌫️ ☂ ꙮ",
)


def default_texts(max_length: int) -> list[str]:
    """The sentences, the odd ones, and six texts of an eighth, half and all of max_length words.

    A word is a token at least: the longest fill max_length tokens under any tokenizer, and are cut there.
    """
    words = " ".join(SENTENCES).split()
    long = []
    for place, length in enumerate([max_length // 8, max_length // 2, max_length] * 2):
        start = 31 * place + 5  # within a sentence
        turned = words[start:] + words[:start]
        long.append(" ".join((turned * (length // len(turned) + 1))[:length]))
    return [*SENTENCES, *ODD, *long]
