"""The output says what its source says: content words of the source come back, few are its own, endings aside.

For all forms but prose, which ``support`` judges.
"""

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output

REASONS = ("lost_content", "new_content")


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    if output.style.form == "prose":
        return ""
    wanted, said = set(output.source_content), set(output.content)
    shared = len(wanted & said)
    if shared < output.style.keep_words * len(wanted):
        return "lost_content"
    return "new_content" if shared < output.style.known_words * len(said) else ""
