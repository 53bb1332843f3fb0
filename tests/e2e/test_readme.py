"""The README's commands, run as they stand there, in their order, on a small part of the corpus."""

from pathlib import Path

import pytest

from tests.helpers.cli import sundog
from tests.helpers.readme import commands

SMALLER = ["debug=fast"]
SIDE_BY_SIDE = ["cluster.ranks=1", "sequence=local"]  # so that two jobs of a sweep fit on two CPUs
ELSEWHERE = {"serve", "plan"}  # run by the tests of the chain, and of what README prints


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_work_one_after_another(tmp_path: Path) -> None:
    ran = []
    for words in commands():
        name, rest = words[1], words[2:]
        if name in ELSEWHERE or "--address" in rest or any("learnin_rate" in word for word in rest):
            continue
        smaller = {"report": [], "sweep": [*SMALLER, *SIDE_BY_SIDE, "name=search"]}.get(name, SMALLER)
        done = sundog(name, *rest, *smaller, cwd=tmp_path, timeout=240)
        assert done.code == 0, f"{words}: {done.out}{done.err}"
        ran.append(name)
    assert ran == ["curate", "order", "pack", "train", "report", "export", "generate", "submit", "sweep"]
    assert (tmp_path / "runs/search/report/index.html").exists()
    assert (tmp_path / "runs/demo/report/index.html").exists()
    assert (tmp_path / "runs/demo/hf/model.safetensors").exists()
