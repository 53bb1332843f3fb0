"""Requests that schemathesis makes from the published schema, good and bad: answers are as the schema says."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from inference.server import build_app
from tests.helpers.served import Served

SETTINGS = {"model_name": "tiny", "max_concurrent": 4, "max_queue": 64, "max_tokens": 8}
CHECKS: Any = [*HealthCheck]
BOUNDS = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)
# What no schema says: how long a prompt may be, what the vocabulary is, which fields go together.
EXCLUDED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def served(model_folder: Path) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SUNDOG_API_TOKEN", raising=False)
        server = Served(build_app(str(model_folder), SETTINGS))
    yield server
    server.close()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_published(served: Served, mode: GenerationMode) -> None:
    """``positive`` requests are what the schema allows, ``negative`` ones break it somewhere."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    found: list[Any] = list(schema.get_all_operations())
    operations = [operation.ok() for operation in found]
    assert len(operations) == 9
    seen: Counter[int] = Counter()
    for operation in operations:

        @BOUNDS
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call_and_validate(excluded_checks=EXCLUDED)
            seen[answer.status_code] += 1

        with contextlib.suppress(Unsatisfiable):  # an endpoint that takes nothing cannot be asked wrongly
            ask()
    runner = served.app.state.runner
    assert runner.wait_idle(60)
    assert runner.healthy
    assert runner.engine.pool.used == 0
    assert seen[200 if mode is GenerationMode.POSITIVE else 400] > 30, seen
