"""``sundog plan`` of a sequence-parallel run: every strategy with its reason, on links stated or assumed."""

import pytest

from conf.errors import ConfigError
from conf.schema import RunConfig
from launch.plan import describe_candidates
from launch.preflight import load_config
from parallel.plan.run import names, stated_topology


def config(*overrides: str) -> RunConfig:
    return load_config(["sequence=auto", "cluster.ranks=4", "data.context=4096", *overrides])


def test_all_candidates_are_shown_with_one_choice_for_each_direction():
    text = describe_candidates(config())
    assert "assumed where the config states nothing" in text
    for name in names(4, 4):
        assert text.count(f" {name} ") == 2, name
    assert text.count("* ") == 2


def test_stated_links_are_used():
    text = describe_candidates(config("sequence.topology=ring", "sequence.link_gbit=8", "sequence.rank_tflops=2"))
    assert "ring, 8 Gbit/s each way, 2 TFLOP/s a rank (stated;" in text
    assert "0 > 1" in text


def test_islands_need_a_size_that_fits():
    islands = ["sequence.topology=two_level", "cluster.ranks=8", "sequence.fabric_gbit=1"]
    topology = stated_topology(config(*islands, "sequence.island=4"))
    assert (topology.kind, topology.island) == ("two_level", 4)
    with pytest.raises(ConfigError, match="islands of equal size"):
        config(*islands, "sequence.island=3")


def test_auto_takes_no_backward_of_its_own():
    with pytest.raises(ConfigError, match="chooses both directions"):
        config("sequence.backward=ring")
