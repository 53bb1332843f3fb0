"""How well a text is written, as a number: the built-in rating, or a scorer of PreSelect by its folder.

The rating needs no model and says no more than it measures: the product, from 0 to 1, of the shares of complete
sentences, of function words (against 0.3), of letters and of lower case, of how usual the length of sentences is, and
of how few words repeat. It tells prose from lists, fragments, shouting and strings of nouns; it knows nothing of truth.
"""

# ruff: noqa: SIM905 - tables of words are read as words
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data.preselect.linear import load_linear
from data.rephrase.chunks import sentences

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")
TABLE_ROW = re.compile(r"(?m)^\s*\|.*\|\s*$\n?")
COMPLETE = re.compile(
    r"(?:[\"'(\[*\u201c\u2018\d]*[^\W\d_a-z]|[\"'(\[*\u201c\u2018]\S).*[.!?\u2026:\u3002][\"')\]\u201d\u2019]*$|[-*\d].*[.!?:]$",
    re.DOTALL,
)
FUNCTION_WORDS = frozenset(
    "a about after all also an and any are as at be because been before but by can could did do does for from had has "
    "have he her him his how i if in into is it its may more most must no not of on one only or other our out over she "
    "should so some such than that the their them then there these they this those to under up was we were what when "
    "where which while who will with would you your".split()
)
USUAL_FUNCTION_SHARE = 0.3
SHORT, LONG = 5.0, 40.0  # words of a sentence, outside of which it is unusual


def rating(text: str) -> float:
    """From 0 (no prose) to 1; rows of tables are left out, and a text of nothing else is rated 1."""
    prose = TABLE_ROW.sub("", text).strip()
    if not prose and text.strip():
        return 1.0
    words = [word.lower() for word in WORD.findall(prose)]
    visible = sum(not char.isspace() for char in prose)
    if len(words) < 2 or not visible:
        return 0.0
    found = [prose[start:end] for start, end in sentences(prose)]
    weight = [len(sentence) for sentence in found]
    complete = sum(w for w, sentence in zip(weight, found, strict=True) if COMPLETE.match(sentence)) / sum(weight)
    length = len(words) / len(found)
    usual = min(1.0, length / SHORT, LONG / length)
    functions = min(1.0, sum(word in FUNCTION_WORDS for word in words) / len(words) / USUAL_FUNCTION_SHARE)
    letters = min(1.0, sum(map(str.isalpha, prose)) / visible / 0.9)
    most = Counter(word for word in words if word not in FUNCTION_WORDS).most_common(1)
    varied = 1.0 - (most[0][1] / len(words) if most and len(words) >= 20 else 0.0)
    calm = min(1.0, sum(map(str.islower, prose)) / max(1, sum(map(str.isalpha, prose))) / 0.9)
    return complete * functions * letters * calm * usual * varied


def qualities(texts: Sequence[str], scorer: str = "") -> npt.NDArray[np.float32]:
    """The rating of each text, or with ``scorer`` its log-odds by that folder."""
    if scorer:
        return _scorer(scorer).log_odds(texts).astype(np.float32)
    return np.array([rating(text) for text in texts], dtype=np.float32)


_scorer = lru_cache(maxsize=2)(load_linear)
