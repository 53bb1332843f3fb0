"""With how many ranks an elastic run may go on."""

import pytest

from cluster.elastic import legal_sizes, with_ranks
from conf.errors import ConfigError
from conf.rules import check, mesh_sizes
from conf.schema import ClusterConfig, RunConfig


def test_legal_sizes_follow_the_rules_and_keep_the_global_batch() -> None:
    config = RunConfig(cluster=ClusterConfig(ranks=8, min_ranks=1))
    config.sequence.degree, config.trainer.batch = 2, 8
    sizes = legal_sizes(check(config))
    assert sizes.legal == (8, 4, 2)
    for ranks in sizes.legal:
        mesh = mesh_sizes(with_ranks(config, ranks))
        assert (mesh.cp, mesh.dp) == (2, ranks // 2)
    assert "not 6: trainer.batch = 8" in sizes.refused
    assert "not 7: sequence.degree = 2" in sizes.refused
    config.cluster.min_ranks = 9
    with pytest.raises(ConfigError, match=r"cluster\.min_ranks"):
        check(config)
