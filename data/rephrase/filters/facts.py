"""Numbers, names and code: none that the source lacks, and not too few of its own.

Numbers count by value, in digits or words; names are capitalised words that do not begin a sentence, or do so in the
place of a name of the source that is missing. Results of equations that hold may be new. Case, possessives and endings
are no difference (Java, Javanese); identifiers of code, with ``()`` or an underscore, stand in the source as they are.
"""

# ruff: noqa: SIM905 - tables of words are read as words
import re

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.arithmetic import equations, number
from data.rephrase.filters.kind import CODE, Output
from data.rephrase.quality import FUNCTION_WORDS

REASONS = ("new_number", "new_name", "lost_numbers", "lost_names")
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {word: float(value) for value, word in enumerate(UNITS.split())}
VALUES |= {word: 10.0 * value for value, word in enumerate(TENS.split(), 2)}
VALUES |= {"dozen": 12.0, "hundred": 100.0, "thousand": 1000.0, "million": 1e6, "billion": 1e9}
ALIASES = {
    "both": 2.0,
    "twice": 2.0,
    "pair": 2.0,
    "double": 2.0,
    "doubles": 2.0,
    "half": 2.0,
    "second": 2.0,
    "third": 3.0,
}
ALIASES |= {"triple": 3.0, "fourth": 4.0, "quarter": 4.0, "fifth": 5.0, "sixth": 6.0, "seventh": 7.0, "eighth": 8.0}
DIGITS = re.compile(r"(?<![\w.])(?:[$\u20ac\u00a3#]|[A-Z]{1,3}-?)?(\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)")
WORDS = re.compile(rf"(?i)\b({'|'.join([*VALUES, *ALIASES])})\b")
ENUMERATION = re.compile(
    r"(?im)^[ \t]*(?:[|*#-]+[ \t]*)?(?:(?:step|question|answer|q|a|problem|part|row)?[ \t]*\d{1,2}[.):|])(?=\s|\*|$)"
)
STEPS = re.compile(r"(?i)\bsteps? \d{1,2}(?:(?: and |[-\u2013]| to )\d{1,2})?\b")
INSIDE = re.compile(r"(?<=[a-z0-9,;)'\u2019\"] )(?<![.!?][)'\u2019\"] )(?:the )?[\"(]?([A-Z][\w\u2019'-]+)")
SMALL = r"[a-z\u00c0-\u024f]"
PAIRS = re.compile(rf"\b([A-Z]{SMALL}+)(?:['\u2019]s\b| (?:and )?(?=[A-Z]{SMALL})| (?=\d+\.\d))")
VERB = "|".join(  # of one person or thing, as it follows a subject
    (
        "is was has does [a-z]{2,}ed began brought built came chose found gave held kept knew led left lost made met "
        "paid put ran said saw sold spoke stood taught thought told took went won wrote became believes claims gives "
        "hopes keeps knows leads lives makes owns plans runs says shows takes thinks wants works writes"
    ).split()
)
SUBJECT = re.compile(rf"(?:^|[.!?:|]['\"\u201d)]*\s+|\n[\s|*#-]*)([A-Z]{SMALL}+) (?=(?:{VERB})\b)")
NOUN = re.compile(r"(?:ing|ion|ment|ness|ity|ance|ence|age|ure|ism|ship|hood|th|ers?|s)$")  # no name as a rule
LABELS = frozenset("question answer problem solution step table markdown faq i".split())
COUNTED = 3.0  # spelled out, up to this an output may have counted for itself ("the two armies")
OPENERS = frozenset(
    "according after almost along although among another approximately around because before behind below beneath "
    "beside besides between beyond both built called children despite during each early even every exactly finally "
    "first following founded further given here however inside just known later led let like located many mayor men "
    "mount named near nearly next once opened originally outside over past people per perhaps roughly several since "
    "sometimes still then there therefore though through throughout today together toward towards under unlike until "
    "upon using usually via when whenever where whereas whether while why within without women yes yet".split()
)  # may stand before a name where a sentence begins
STEM = 4  # letters in which a name and a word of the source agree where both are longer
Numbers = set[float]


def numbers(text: str) -> Numbers:
    """Values of the numbers in digits."""
    return {number(found) for found in DIGITS.findall(STEPS.sub(" ", ENUMERATION.sub(" ", text)))}


def spelled(text: str) -> Numbers:
    """Values of the numbers in words; ``one`` is a pronoun more often."""
    return {VALUES[word.lower()] for word in WORDS.findall(text) if word.lower() in VALUES} - {0.0, 1.0}


def known_values(text: str) -> Numbers:
    """All values that an output may take from a source."""
    return (
        numbers(text)
        | spelled(text)
        | {ALIASES[w.lower()] for w in WORDS.findall(text) if w.lower() in ALIASES}
        | {0.0, 1.0}
    )


def names(text: str) -> set[str]:
    """Names of a text in lower case, without possessive."""
    found = {*INSIDE.findall(text), *PAIRS.findall(text)}
    plain = {re.sub(r"['\u2019]s?$", "", name).lower() for name in found}
    return {name for name in plain - FUNCTION_WORDS - OPENERS - LABELS if len(name) > 1}


def subjects(text: str) -> set[str]:
    """Single capitalised words that begin a sentence, before a verb: names, or nouns without an article."""
    found = {word.lower() for word in SUBJECT.findall(text)}
    return {word for word in found - FUNCTION_WORDS - OPENERS - LABELS if not NOUN.search(word)}


def _in(name: str, words: list[str]) -> bool:
    """Whether all parts of a name are among words, endings aside."""
    stems = {word[:STEM] for word in words if len(word) >= STEM}
    return all(part in words or part[:STEM] in stems for part in re.split(r"\W+", name) if part)


def judge(output: Output, limits: OutputFilterConfig) -> str:
    text, source = output.text, output.source
    known = known_values(source)
    if output.style.form == "problem":
        known |= {result for result, holds in equations(text) if holds}
    written = numbers(text) | spelled(text)
    if (numbers(text) | {value for value in spelled(text) if value > COUNTED}) - known:
        return "new_number"
    if not all(_in(name, output.source_words) for name in names(text)):
        return "new_name"
    if not all(output.source_says(name) for name in CODE.findall(text)):
        return "new_name"
    named = names(source)
    lost = [name for name in named if not _in(name, output.words)]
    if lost and not all(_in(name, output.source_words) for name in subjects(text)):
        return "new_name"  # one name went and an unknown word has its place
    least, share = limits.min_source_facts, output.style.keep_facts
    wanted = numbers(source)
    if len(wanted) >= least and len(wanted & written) < share * len(wanted):
        return "lost_numbers"
    kept = len(named) - len(lost)
    return "lost_names" if len(named) >= least and kept < share * len(named) else ""
