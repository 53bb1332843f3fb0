"""Answers that were cut: by their length, before the closing sentinel, or inside a sentence."""

from conf.rephrase import OutputFilterConfig
from data.rephrase.clean import clean
from data.rephrase.filters.kind import Output

REASONS = ("empty", "truncated")
ENDS = ".!?\u2026:\"')]\u201d\u2019*|\u3002\uff01\uff1f`"


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    found = clean(output.raw, output.style)
    if not found.text:
        return "empty"
    cut = output.finish == "length" or (found.opened and not found.closed)
    last = found.text.splitlines()[-1].strip()
    numeric = output.style.form == "problem" and last[-1:].isdigit()  # a solution may end in its result
    return "truncated" if cut or not (last.endswith(tuple(ENDS)) or numeric) else ""
