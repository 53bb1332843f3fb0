"""What DeepSpeed is told."""

import pytest

from conf.schema import RunConfig
from parallel.zero import LARGEST_BUCKET, _settings


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_is_no_larger_than_the_model(stage: int) -> None:
    config = RunConfig()
    for parameters, bucket in ((1000, 1000), (2 * LARGEST_BUCKET, LARGEST_BUCKET)):
        zero = _settings(config, stage, parameters)["zero_optimization"]
        assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket
