from pathlib import Path

import pytest

from inference.engine import Engine
from tests.unit.inference.builders import make_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 1024 positions with a byte-level tokenizer."""
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def engine(model_folder: Path) -> Engine:
    return Engine(model_folder)
