"""The typed schema of curation: what each step measures and the thresholds that decide on it.

Defaults of the published rules are the published ones; docs/curation.md names their sources. A step is off unless
``enabled`` says otherwise; in every step a threshold of 0 switches its rule off.
"""

from dataclasses import dataclass, field, fields, is_dataclass

from conf.errors import ConfigError

TOPS = (0.20, 0.18, 0.16)
CHOICES = {"curation.preselect.weight": ("chars", "documents")}
DUPLICATES = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)


@dataclass
class UrlConfig:
    """Block-lists: text files of one entry a line, ``#`` begins a comment."""

    enabled: bool = False
    domains: str = ""  # file (or folder of files) of blocked domains; a domain blocks its subdomains
    urls: str = ""  # file (or folder) of blocked addresses
    words: str = ""  # file (or folder) of words that block an address; empty: a short list of adult words
    soft_words: str = ""  # file (or folder) of words of which several block an address
    min_soft_words: int = 2  # of the soft words, this many different ones block


@dataclass
class LanguageConfig:
    """Language identification."""

    enabled: bool = False
    languages: list[str] = field(default_factory=lambda: ["en"])  # ISO 639-1 codes that stay; empty: all known
    model: str = ""  # fastText model file (lid.176.bin); empty: the built-in n-gram profiles
    min_score: float = 0.65  # probability that a fastText model gives, at least
    max_distance: int = 1200  # of the built-in profiles (0: identical), at most


@dataclass
class GopherConfig:
    """Quality rules of Gopher (Rae et al. 2021, section A1.1)."""

    enabled: bool = False
    min_words: int = 50  # that are not punctuation alone
    max_words: int = 100_000
    min_mean_word: float = 3.0  # characters
    max_mean_word: float = 10.0  # characters
    max_symbol_ratio: float = 0.1  # hash signs, and ellipses, to words
    max_bullet_lines: float = 0.9  # share of the lines that begin with a bullet
    max_ellipsis_lines: float = 0.3  # share of the lines that end with an ellipsis
    min_alpha_words: float = 0.8  # share of the words that hold a letter
    min_stop_words: int = 2  # different ones of the, be, to, of, and, that, have, with


@dataclass
class RepetitionConfig:
    """Repetition rules of Gopher (Rae et al. 2021, table A1); shares of the text's characters where not said."""

    enabled: bool = False
    max_duplicate_lines: float = 0.3  # share of the lines
    max_duplicate_paragraphs: float = 0.3  # share of the paragraphs
    max_duplicate_line_chars: float = 0.2
    max_duplicate_paragraph_chars: float = 0.2
    max_top_ngrams: list[float] = field(default_factory=lambda: list(TOPS))  # most frequent 2- to 4-gram
    max_duplicate_ngrams: list[float] = field(default_factory=lambda: list(DUPLICATES))  # 5- to 10-grams seen before


@dataclass
class C4Config:
    """Rules of C4 (Raffel et al. 2020, section 2.2): lines are removed first, then documents."""

    enabled: bool = False
    terminal_punctuation: bool = True  # a line ends in . ? ! or a quote; FineWeb leaves this rule out
    min_line_words: int = 3
    max_word_chars: int = 1000  # a longer word removes its line
    min_sentences: int = 5  # in the lines that stay
    lorem_ipsum: bool = True  # drop documents with placeholder text
    javascript: bool = True  # remove lines that speak of it
    curly_bracket: bool = True  # drop documents that hold one: they are code
    policy: bool = True  # remove lines on cookies, terms and privacy
    citations: bool = True  # remove marks such as [1], [edit], [citation needed]


@dataclass
class FineWebConfig:
    """Quality rules of FineWeb (Penedo et al. 2024), on the text that C4's rules leave."""

    enabled: bool = False
    min_punctuated_lines: float = 0.12  # share of the lines that end in terminal punctuation
    max_short_lines: float = 0.67  # share of the lines of up to short_line_chars
    short_line_chars: int = 30
    max_duplicate_line_chars: float = 0.01  # share of the characters
    max_newline_ratio: float = 0.3  # line ends to words


@dataclass
class PiiConfig:
    """Masking of personal data in the documents that stay."""

    enabled: bool = False
    emails: bool = True
    ips: bool = True  # public addresses only
    phones: bool = False  # numbers with a leading + and a country code


@dataclass
class MinhashConfig:
    """Near duplicates (Broder 1997): band keys propose pairs, the exact similarity decides, one of a cluster stays."""

    enabled: bool = False
    bands: int = 18  # FineWeb takes 14 x 8, which misses 8 % of the pairs of similarity 0.8; 18 x 6 misses 0.4 %
    rows: int = 6  # hashes in one band
    shingle: int = 5  # words
    min_jaccard: float = 0.7  # of the shingle sets, exact; a pair of fewer is no duplicate
    seed: int = 1


@dataclass
class DecontaminateConfig:
    """Documents that hold text of evaluation sets (Brown et al. 2020, appendix C: 13-grams)."""

    enabled: bool = False
    sets: str = ""  # file or folder of evaluation items: text, or JSONL whose strings all count
    ngram: int = 13  # words
    min_matches: int = 1  # different n-grams of an evaluation set that drop a document


@dataclass
class SelectionConfig:
    """The share of the documents that the scorer of PreSelect (arXiv 2503.00808) finds most useful."""

    enabled: bool = False
    scorer: str = ""  # folder that `sundog scorer` wrote
    keep: float = 0.1  # share of what all other rules leave; the score at which it is reached stays
    weight: str = "chars"  # what the share is of
    per_source: bool = False  # the share of every source, not of the corpus


@dataclass
class CurationConfig:
    """Language-independent quality rules, duplicates, and a group of settings a step."""

    min_chars: int = 200
    max_chars: int = 1_000_000
    max_line_chars: int = 100_000
    min_letter_fraction: float = 0.4  # of the characters that are not white space
    max_repeated_line_fraction: float = 0.5  # characters in lines seen before in the same document
    max_replacement_fraction: float = 0.01  # U+FFFD and control characters: a sign of a wrong encoding
    deduplicate: bool = True  # drop all but the first of documents with equal normalised text
    bucket_documents: int = 10_000_000  # hashes that one unit of deduplication holds in memory, about 50 bytes each
    url: UrlConfig = field(default_factory=UrlConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    repetition: RepetitionConfig = field(default_factory=RepetitionConfig)
    gopher: GopherConfig = field(default_factory=GopherConfig)
    c4: C4Config = field(default_factory=C4Config)
    fineweb: FineWebConfig = field(default_factory=FineWebConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    minhash: MinhashConfig = field(default_factory=MinhashConfig)
    preselect: SelectionConfig = field(default_factory=SelectionConfig)


def check_curation(curation: CurationConfig) -> None:
    """Raises ConfigError for the first threshold that is out of its range."""
    default = CurationConfig()
    for group in (f.name for f in fields(curation) if is_dataclass(getattr(curation, f.name))):
        for name, value in vars(getattr(curation, group)).items():
            key, usual = f"curation.{group}.{name}", getattr(getattr(default, group), name)
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise ConfigError(key, value, "a threshold is a number that is not negative", f"{key}={usual}")
            if isinstance(value, list) and name.endswith("_ngrams") and len(value) != len(usual):
                raise ConfigError(key, value, f"{len(usual)} shares, one for each n", f"{key}={usual}")
    sizes = {"bucket_documents": curation.bucket_documents, "decontaminate.ngram": curation.decontaminate.ngram}
    sizes |= {f"minhash.{name}": getattr(curation.minhash, name) for name in ("bands", "rows", "shingle")}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"curation.{name}", value, "it must be greater than 0", "leave it out for the default")
