"""Words as the published filters count them: English text split at white space, then punctuation off the ends and
between letters, contractions and abbreviations as English writes them (the rules that spaCy documents for English).

A chunk between white space is split once in a process and remembered as numbers of words, so that a text costs a
look-up a chunk; what the rules ask about a word (length, letters, stop word) is remembered beside it.
"""

# ruff: noqa: RUF001, SIM905 - punctuation of many scripts; tables of words are read as words
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
LETTERS, NOT_SYMBOLS, STOP_WORD = 1, 2, 4  # of a word: holds a letter, is more than symbols, is a stop word
MAX_VOCABULARY = 1_000_000  # words remembered between batches

CURRENCY = "$£€¥฿₽﷼₴₠-₿¢"
QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉⟦⟧"
PUNCTUATION = "…,:;!?¿؟¡()\\[\\]{}<>_#*&。？！，、；：～·।،۔؛٪"
ICONS = "©®°\u2190-\u2bff\U0001f000-\U0001faff"
UNITS = (
    r"km²|km³|km|m²|m³|dm²|dm³|dm|cm²|cm³|cm|mm²|mm³|mm|ha|µm|nm|yd|in|ft|kg|g|mg|µg|t|lb|oz|m/s|km/h|kmh|mph|hPa|Pa|"
    r"mbar|mb|MB|kb|KB|gb|GB|tb|TB|T|G|M|K|%"
)
LOWER, UPPER = r"a-zß-öø-ÿа-яα-ω", r"A-ZÀ-ÖØ-ÞА-ЯΑ-Ω"
LETTER = r"[^\W\d_]"
HYPHENS = r"(?:-|–|—|--|---|——|~)"
PREFIX = re.compile(rf"(?:\.\.+|[§%=—–{PUNCTUATION}{QUOTES}{CURRENCY}{ICONS}]|\+(?![0-9]))")
SUFFIX = re.compile(
    rf"(?:\.\.+|['’][sS]|[—–{PUNCTUATION}{QUOTES}{ICONS}]|(?<=[0-9])\+|(?<=°[FfCcKk])\.|(?<=[0-9])[{CURRENCY}]|"
    rf"(?<=[0-9])(?:{UNITS})|(?<=[0-9{LOWER}%²\-+{PUNCTUATION}{QUOTES}])\.|(?<=[{UPPER}][{UPPER}])\.)$"
)
INFIX = re.compile(
    rf"\.\.+|…|[{ICONS}]|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[{LOWER}{QUOTES}])\.(?=[{UPPER}{QUOTES}])|"
    rf"(?<={LETTER}),(?={LETTER})|(?<=[^\W_]){HYPHENS}(?={LETTER})|(?<=[^\W_])[:<>=/](?={LETTER})"
)
CONTRACTION = re.compile(
    r"(?i)(?P<word>(?:ca|wo|sha|ai|are|can|could|did|does|do|had|has|have|is|might|must|need|ought|should|was|were|would))"
    r"(?P<end>n['’]?t)|(?P<pronoun>i|you|he|she|it|we|they|who|what|when|where|why|how|there|that|this)"
    r"(?P<verb>['’]?(?:ll|ve|re|m|d|s))|(?P<can>can)(?P<not>not)|(?P<first>gon|got|let)(?P<second>na|ta|['’]s)"
)
ABBREVIATIONS = frozenset(
    "a.m. p.m. Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. Co. Colo. Conn. Corp. D.C. Dec. Del. Dr. E.G. E.g. Feb. "
    "Fla. Ga. Gen. Gov. I.E. I.e. Ia. Id. Ill. Inc. Ind. Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. "
    "Messrs. Mich. Minn. Miss. Mo. Mont. Mr. Mrs. Ms. Mt. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. "
    "Okla. Ore. Pa. Ph.D. Prof. Rep. Rev. S.C. Sen. Sep. Sept. St. Tenn. Va. Wash. Wis. co. e.g. i.e. v.s. vs. 'em 'll "
    "'re 's 'd 've 'm 'cause 'til and/or".split()
)
FACES = frozenset(
    "'' ’’ (: (; (= (-: (-; ): )-: 8) 8-) :'( :( :) :* :-( :-) :-* :-/ :-] :-| :/ :0 :1 :3 :> :] :| :} :() :)) :(( :D "
    ":P :X :o :O :x :p :-D :-P :-p :-x :-X :-0 :-3 ;) ;-) ;D =( =) =/ =3 =[ =] =| =D 0.0 0_0 8D 8-D <3 </3 >.< >.> >:( "
    "<.< "
    '@_@ [: [-: [= ]= ^_^ ^__^ -_- o_o O_O o_O O_o o.o O.O o.O v.v v_v V_V V.V ._. xD XD xDD XDD \\")'.split()
)
FACE_MARKS = frozenset("'’():;=<>@[-^_.8D\\")  # every face has one
NOT_CONTRACTED = frozenset("is its ill shell shed were well hell here whom whore thisve".split())
ADDRESS = re.compile(
    r"(?:(?:https?|ftp)://|www\.)[^\s<>\"'()]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|"
    r"(?:[A-Za-z0-9](?:[\w-]*[A-Za-z0-9])?\.)+[a-z]{2,}(?::\d+)?(?:[/?#]\S*)?"
)
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
SENTENCE_ENDS = frozenset("!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᠃᠉‼‽⁇⁈⁉⸮﹒﹖﹗！．？｡。")
CONTROL = "".join(chr(code) for a, b in ((0, 32), (127, 160)) for code in range(a, b))
SYMBOLS = (
    frozenset("!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»" + CONTROL)
    | SENTENCE_ENDS
)


def _special(chunk: str) -> list[str] | None:
    """The words of a contraction or an abbreviation, else None."""
    if chunk in ABBREVIATIONS or chunk in FACES or (len(chunk) == 2 and chunk[1] == "." and chunk[0].islower()):
        return [chunk]
    if (
        chunk[1:].islower()
        and chunk.lower() not in NOT_CONTRACTED
        and (found := CONTRACTION.fullmatch(chunk)) is not None
    ):
        return [group for group in found.groups() if group]
    return None


def split_chunk(chunk: str) -> list[str]:
    """Words of a chunk without white space: the ends first, then what is between them."""
    if chunk.isalpha():
        return _special(chunk) or [chunk]
    before: list[str] = []
    after: list[str] = []
    while chunk and (words := _special(chunk)) is None:
        prefix = PREFIX.match(chunk)
        if prefix is not None and _special(chunk[prefix.end() :]) is not None:
            before.append(prefix.group())
            chunk = chunk[prefix.end() :]
            continue
        start = prefix.end() if prefix is not None else 0
        suffix = SUFFIX.search(chunk, start)
        if prefix is None and suffix is None:
            break
        if prefix is not None:
            before.append(prefix.group())
        if suffix is not None:
            after.append(suffix.group())
        chunk = chunk[start : suffix.start() if suffix is not None else len(chunk)]
    words = _special(chunk) if chunk else []
    if words is None:
        words = [chunk] if ADDRESS.fullmatch(chunk) else _infixes(chunk)
    return _faces([*before, *words, *reversed(after)])


def _faces(words: list[str]) -> list[str]:
    """The words with marks that form a face, or a pair of quotes, put together again."""
    if len(words) < 2 or FACE_MARKS.isdisjoint("".join(words)):
        return words
    merged: list[str] = []
    while words:
        size = next((n for n in (4, 3, 2) if len(words) >= n and "".join(words[:n]) in FACES), 1)
        merged.append("".join(words[:size]))
        words = words[size:]
    return merged


def _infixes(chunk: str) -> list[str]:
    pieces, place = [], 0
    for found in INFIX.finditer(chunk):
        pieces += [chunk[place : found.start()], found.group()]
        place = found.end()
    return [piece for piece in [*pieces, chunk[place:]] if piece]


class Vocabulary(dict[str, bytes]):
    """Chunks and words seen by this process: a chunk's words as numbers of 4 bytes, and what is asked about each."""

    def __init__(self) -> None:
        super().__init__()
        self.sentences: dict[str, tuple[int, int, int, int]] = {}
        self.words: dict[str, int] = {}
        self.lengths: list[int] = []
        self.flags: list[int] = []

    def __missing__(self, chunk: str) -> bytes:
        numbers, words = [], split_chunk(chunk)
        self.sentences[chunk] = (*_sentences(words, 0), *_sentences(words, 1))
        for word in words:
            number = self.words.get(word)
            if number is None:
                number = self.words[word] = len(self.lengths)
                self.lengths.append(len(word))
                letter, symbols = any(map(str.isalpha, word)), all(char in SYMBOLS for char in word)
                self.flags.append(LETTERS * letter + NOT_SYMBOLS * (not symbols) + STOP_WORD * (word in STOP_WORDS))
            numbers.append(number)
        found = self[chunk] = np.array(numbers, dtype=np.int32).tobytes()
        return found

    def shrink(self) -> None:
        """Forgets all where there is too much; numbers of words that were given before mean nothing any more."""
        if len(self) > MAX_VOCABULARY:
            self.clear()
            self.__init__()


class Words:
    """The words of a batch of texts: ``numbers`` of all of them, text ``i`` from ``offsets[i]`` to ``offsets[i + 1]``.

    ``lengths`` (characters) and ``flags`` (of ``Vocabulary``) are by word number.
    """

    def __init__(self, numbers: Ints, offsets: Ints, vocabulary: Vocabulary) -> None:
        self.numbers, self.offsets = numbers, offsets
        self.lengths = np.array(vocabulary.lengths, dtype=np.int64)
        self.flags = np.array(vocabulary.flags, dtype=np.uint8)


VOCABULARY = Vocabulary()


def split_words(texts: Sequence[str]) -> Words:
    """The words of each text. Time is linear in the texts; a new chunk costs its rules once."""
    VOCABULARY.shrink()
    rows = [b"".join(map(VOCABULARY.__getitem__, text.split())) for text in texts]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(row) // 4 for row in rows], dtype=np.int64)])
    return Words(np.frombuffer(b"".join(rows), dtype=np.int32).astype(np.int64), offsets, VOCABULARY)


def count_words(text: str) -> int:
    """How many words a text has."""
    return sum(map(len, map(VOCABULARY.__getitem__, text.split()))) // 4


def count_sentences(chunks: Sequence[str]) -> int:
    """Sentences of a line that is given as its chunks: a new one starts at the first word behind an end mark."""
    sentences, ended = 1, 0
    known = VOCABULARY.sentences
    for chunk in chunks:
        row = known.get(chunk)
        if row is None:
            VOCABULARY[chunk]  # learns it
            row = known[chunk]
        sentences += row[2 * ended]
        ended = row[2 * ended + 1]
    return sentences


def _sentences(words: Sequence[str], ended: int) -> tuple[int, int]:
    """Sentences that begin inside a chunk of these words, and whether an end mark is open behind it."""
    begun = 0
    for word in words:
        if word in SENTENCE_ENDS:
            ended = 1
        elif ended and not all(char in SYMBOLS and char not in "$+<=>^`|~" for char in word):
            begun, ended = begun + 1, 0
    return begun, ended
