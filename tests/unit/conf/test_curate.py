"""Thresholds of curation that cannot be meant."""

import pytest

from conf.errors import ConfigError
from conf.rules import check
from conf.schema import RunConfig


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gopher.min_words", -1),
        ("fineweb.max_short_lines", float("nan")),
        ("minhash.bands", 0),
        ("minhash.min_jaccard", -0.1),
        ("decontaminate.ngram", 0),
        ("repetition.max_top_ngrams", [0.1]),
        ("repetition.max_duplicate_ngrams", [0.1] * 7),
        ("bucket_documents", 0),
    ],
)
def test_thresholds_out_of_range_are_named(key: str, value: object) -> None:
    config = RunConfig()
    assert check(config) is config
    node, _, leaf = key.rpartition(".")
    setattr(getattr(config.curation, node) if node else config.curation, leaf, value)
    with pytest.raises(ConfigError, match=rf"curation\.{key.replace('.', chr(92) + '.')}"):
        check(config)
