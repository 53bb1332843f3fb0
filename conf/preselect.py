"""The typed schema of PreSelect (arXiv 2503.00808): scores by a ladder of models, and ladders that are trained here."""

from dataclasses import dataclass, field

CHOICES = {"preselect.domain": ("source", "host"), "preselect.normalise": ("none", "quantile", "zscore")}


@dataclass
class PreSelectConfig:
    """PreSelect (arXiv 2503.00808): a ladder of models, its losses on a sample, and the scorer that is learnt."""

    dir: str = "${data.dir}/preselect"
    ladder: str = "${preselect.dir}/ladder.yaml"  # table of models: folder, ability, weight
    cache: str = "${preselect.dir}/cache"  # of losses, by model, windows and text; any number of ladders may share one
    strict: bool = False  # a model that does not load ends the command; else it is reported and left out
    domain: str = "source"  # what a document belongs to: its source, or the host of its url
    domains: int = 3000  # most frequent domains that are sampled; 0: all
    per_domain: int = 300  # documents of each
    min_chars: int = 200  # of a sampled document
    items: int = 100  # of each kind in the built-in evaluation
    window: int = 0  # tokens that a model reads at once; 0: the smallest context of the ladder
    stride: int = 0  # tokens that a further window of a long document scores; 0: half the window
    row_tokens: int = 1024  # of the documents that share a forward pass; changes speed alone
    ties: float = 0.5  # value of a pair of models whose losses are equal
    margin: float = 0.0  # standard errors by which two losses must differ, else they tie
    normalise: str = "none"
    positive: float = 1.0  # least strength of a positive; negatives are as many of the lowest
    most: int = 200_000  # positives, at most; 0: all
    lr: float = 0.1
    dim: int = 100  # of the scorer's vectors
    epochs: int = 5
    word_ngrams: int = 2
    buckets: int = 2_000_000  # of hashed n-grams
    held_out: float = 0.1  # share of the labelled documents that the scorer is judged by


@dataclass
class RungConfig:
    """One model of a trained ladder; zeros stand for the run's own model and steps."""

    name: str = ""
    mixture: dict[str, float] = field(default_factory=dict)  # shares of teaching, prose, shuffled, repeated, site
    documents: int = 1000
    steps: int = 0
    dim: int = 0
    layers: int = 0


@dataclass
class LadderConfig:
    """A ladder of small models that differ in what they were taught, trained by `sundog ladder`, and its corpus."""

    rungs: list[RungConfig] = field(default_factory=list)
    pool: dict[str, float] = field(default_factory=dict)  # shares of the sources in the corpus to select from
    pool_documents: int = 2000
