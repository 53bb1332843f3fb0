import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.serving import EngineConfig
from inference.engine import Engine
from inference.methods import Methods
from inference.params import SamplingParams
from inference.skip_decode import active_layers
from tests.unit.inference.builders import make_folder
from tests.unit.inference.test_paths import together

ASKED = SamplingParams(max_tokens=13, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = make_folder(tmp_path_factory.mktemp("deep") / "model", layers=6)
    return Engine(folder, EngineConfig(page_tokens=4, pack=False, prefix_cache=False))


def test_layers_fall_from_all_to_the_fewest_and_never_come_back(deep: Engine):
    text = deep.start(deep.encode("the cat sat"), replace(ASKED, methods=Methods(decode_layers=2)))
    assert text.lossy == ("decode_layers=2",)
    deep.submit(text)
    used: list[set[int]] = []
    while deep.busy:
        used.append(set(active_layers(text, 6)))
        deep.step()
    assert used[0] == used[1] == set(range(6))
    assert used[-1] == {0, 5}
    assert all(later <= earlier for earlier, later in itertools.pairwise(used))


def test_all_layers_as_the_fewest_is_plain_decoding_and_texts_mix(deep: Engine):
    prompts = [deep.encode(text) for text in ("the cat sat on the mat", "a dog", "on the log")]
    plain = together(deep, [(prompt, ASKED) for prompt in prompts])
    assert together(deep, [(prompt, replace(ASKED, methods=Methods(decode_layers=6))) for prompt in prompts]) == plain
    skipping = replace(ASKED, methods=Methods(decode_layers=2))
    alone = [together(deep, [(prompt, skipping)])[0] for prompt in prompts]
    mixed = together(deep, [(prompts[0], ASKED), *((prompt, skipping) for prompt in prompts)])
    assert mixed == [plain[0], *alone]
    assert alone != plain


def test_more_layers_than_there_are_is_refused(deep: Engine):
    with pytest.raises(ConfigError, match="decode_layers"):
        deep.start([1], SamplingParams(methods=Methods(decode_layers=7)))
