"""The output is in its source's language: no other profile of n-grams is much nearer than that language's."""

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output
from data.steps.language import detect

REASONS = ("other_language",)
MUCH = 1.1  # the least ratio of distances: texts full of numbers are nearly as far from every language


def judge(output: Output, limits: OutputFilterConfig) -> str:
    if len(output.text) < limits.min_language_chars:
        return ""
    name, distance = detect(output.text)
    if name == output.language:
        return ""
    return "other_language" if detect(output.text, output.language)[1] > MUCH * distance else ""
