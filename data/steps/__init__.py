"""The steps of curation, one module each, in the order in which their rules decide.

A step has ``REASONS`` (why it drops documents), ``annotator(config)`` (None: the step is off) and
``reasons(columns, config)``: for each reason, in order, the documents of a part that it would drop, judged by the
step's columns alone. A step that changes the text of documents that stay names its column of edits as ``EDITS``.
"""

from conf.schema import CurationConfig
from data.annotators import Annotator
from data.steps import (
    c4,
    decontaminate,
    fineweb,
    gopher,
    identity,
    language,
    minhash,
    pii,
    preselect,
    repetition,
    rules,
    url,
)
from data.steps.kind import Step

STEPS: dict[str, Step] = {
    "url": url,
    "rules": rules,
    "language": language,
    "repetition": repetition,
    "gopher": gopher,
    "c4": c4,
    "fineweb": fineweb,
    "decontaminate": decontaminate,
    "pii": pii,
    "identity": identity,
    "minhash": minhash,
    "preselect": preselect,
}


def active(config: CurationConfig) -> dict[str, tuple[Step, Annotator]]:
    """The steps that the config switches on, with their annotators."""
    found = ((name, step, step.annotator(config)) for name, step in STEPS.items())
    return {name: (step, annotator) for name, step, annotator in found if annotator is not None}
