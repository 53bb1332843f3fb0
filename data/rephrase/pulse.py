"""What a generator says of itself while it works: a small file, renewed every second, that the command shows.

One answer a second is judged by the filters as it comes, so that a model that is not up to its prompts is seen early.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from conf.rephrase import OutputFilterConfig
from data.rephrase.clean import clean
from data.rephrase.filters import Output, judge
from data.rephrase.prepare import counter
from data.rephrase.quality import qualities
from data.rephrase.store import Answer
from data.rephrase.styles import Style
from data.steps.language import detect

INTERVAL_SEC = 1.0
PATTERN = "pulse-*.json"


class Pulse:
    """The counts of one unit of a generator, in a file of its own beside the answers."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work, self.path = work, Path(work["store"]) / f"pulse-{min(work['shards']):02d}.json"
        self.counts: Counter[str] = Counter()
        self.last = -INTERVAL_SEC

    def note(self, text: str, style: Style, answer: Answer, cached: int, retried: int = 0) -> None:
        """Counts an answer to the request to rephrase ``text``; ``cached`` and ``retried`` are sums so far."""
        self.counts["done"] += 1
        self.counts["tokens"] += answer.get("tokens", 0)
        now = time.monotonic()
        if now - self.last < INTERVAL_SEC:
            return
        self.last = now
        self.counts["judged"] += 1
        self.counts["accepted"] += not self._reason(text, style, answer)
        staging = self.path.with_suffix(".tmp")
        staging.write_text(json.dumps({**self.counts, "cached": cached, "retried": retried}))
        os.replace(staging, self.path)

    def _reason(self, text: str, style: Style, answer: Answer) -> str:
        if "error" in answer:
            return answer["error"]
        count, cleaned = counter(self.work["tokenizer"]), clean(answer["text"], style).text
        quality = qualities([text, cleaned], self.work["scorer"]).tolist()
        sizes, language = (count(text), count(cleaned)), detect(text)[0]
        output = Output(text, answer["text"], answer["finish"], style, *sizes, language, *quality)
        return judge(output, OutputFilterConfig(**self.work["limits"]))


def read_pulses(folder: Path) -> Counter[str]:
    """The sums of what all units said last."""
    return sum((Counter(json.loads(path.read_text())) for path in folder.glob(PATTERN)), Counter[str]())


def forget_pulses(folder: Path) -> None:
    """Removes what an earlier run said."""
    for path in folder.glob(PATTERN):
        path.unlink()
