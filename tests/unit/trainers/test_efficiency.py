"""Ratios of FLOPs, crossings and names of models, on curves whose answers are known."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conf.estimate import flops_per_token, vocabulary
from data.files import canonical_json, write_atomic
from launch.preflight import dump, load_config
from trainers import efficiency
from trainers.comparison import differing, write_comparison
from trainers.efficiency import Curves, collect, crossings, describe_crossings, first_at, interval, ratio, smooth
from trainers.report import read_run

Floats = npt.NDArray[np.float64]
FLOPS: Floats = np.arange(10, 8010, 10, dtype=np.float64)


def power(scale: float, exponent: float = 0.5) -> Floats:
    """A loss that needs ``scale`` times fewer FLOPs than the one of scale 1."""
    return (FLOPS * scale) ** -exponent


@pytest.mark.parametrize("gain", [1.0, 1.5, 4.0, 0.5])
def test_the_ratio_is_that_of_the_flops_to_the_same_loss(gain: float) -> None:
    assert ratio((FLOPS, power(1.0)), (FLOPS, power(gain))) == pytest.approx(gain, rel=0.02)
    assert ratio((FLOPS, power(gain)), (FLOPS, power(1.0))) == pytest.approx(1 / gain, rel=0.02)


def test_a_loss_between_two_steps_is_interpolated() -> None:
    flops, losses = np.array([1.0, 2.0, 3.0]), np.array([5.0, 4.0, 2.0])
    assert [first_at(flops, losses, loss) for loss in (6.0, 5.0, 4.5, 3.0, 2.0)] == [1.0, 1.0, 1.5, 2.5, 3.0]


def test_smoothing_is_a_trailing_mean() -> None:
    values = np.random.default_rng(0).normal(size=(2, 90))
    window = min(efficiency.SMOOTH, 90 // 8)
    expected = [[row[max(0, i - window + 1) : i + 1].mean() for i in range(90)] for row in values]
    np.testing.assert_allclose(smooth(values), expected)


def test_intervals_are_students() -> None:
    assert interval(np.array([1.0, 2.0, 3.0])) == "2.00 +- 2.48"  # 4.303 / sqrt(3)
    assert interval(np.array([1.5])) == "1.50"


def test_crossings_are_found_where_they_are() -> None:
    dense = Curves("dense", FLOPS, {"all": power(1.0)[None]})
    late = Curves("4 text 4 image", FLOPS, {"all": (power(1.0) * np.where(FLOPS < 4000, 1.1, 0.9))[None]})
    [(flops, below)] = crossings(dense, late, "all")
    assert below
    assert flops == pytest.approx(4000, rel=0.1)
    assert describe_crossings(dense, late, "all").startswith("below from 4")
    assert describe_crossings(late, dense, "all").startswith("above from 4")
    never = Curves("x", FLOPS, {"all": (power(1.0) * 2)[None]})
    assert describe_crossings(dense, never, "all") == "above throughout"


def run(groups: list[int], seed: int, gain: float, steps: int = 800, **model: Any) -> tuple[dict[str, Any], list[Any]]:
    config = {"model": {"experts": {"groups": groups}, "modalities": ["text", "image"], **model}, "seed": seed}
    records = [
        {
            "step": step + 1,
            "train/flops": FLOPS[step],
            "train/tokens": step,
            "train/loss": power(gain)[step],
            "train/loss_by_modality/text": power(1.0)[step],
            "train/loss_by_modality/image": power(gain * gain)[step],
        }
        for step in range(steps)
    ]
    return config, records


def test_runs_are_grouped_by_model_and_cut_to_what_all_have() -> None:
    runs = [run([4, 4], 0, 2.0), run([], 1, 1.5, 700), run([], 0, 1.0), run([8], 0, 0.5, depth=0.25)]
    found = collect(runs)
    assert [one.name for one in found] == ["dense", "4 text 4 image", "8 mixed, depth"]
    assert [one.losses["image"].shape for one in found] == [(2, 700), (1, 700), (1, 700)]
    np.testing.assert_array_equal(found[0].losses["all"], [power(1.0)[:700], power(1.5)[:700]], "seeds in order")
    assert collect(runs[:1]) == []
    assert collect([run([], 0, 1.0), run([], 1, 1.0)]) == []


def test_a_comparison_shows_the_ratios_beside_the_papers(tmp_path: Path) -> None:
    folders = []
    for name, (config, records) in {"d": run([], 0, 1.0), "m": run([4, 4], 0, 2.0)}.items():
        write_atomic(tmp_path / name / "metrics.jsonl", "".join(canonical_json(r) + "\n" for r in records))
        write_atomic(tmp_path / name / "config.yaml", canonical_json(config))
        folders.append(tmp_path / name)
    text = write_comparison(folders, tmp_path).read_text().replace(" class=number", "")
    assert "image (paper, 1.4B, 1T tokens)" in text
    row = text[text.index("<td>4 text 4 image</td><td>") :]
    assert "<td>3.7</td><td>2.6</td><td>5.2</td>" in row
    assert (tmp_path / "report" / "loss_over_flops_image.png").stat().st_size > 1000
    other = run([], 0, 1.0)[0] | {"trainer": {"lr": 1.0}}
    write_atomic(tmp_path / "d" / "config.yaml", canonical_json(other))
    assert "paper" not in write_comparison(folders, tmp_path).read_text(), "learning rates are no seeds"


def test_jobs_of_the_experiment_differ_in_seed_and_model_alone(tmp_path: Path) -> None:
    folders = []
    for name, variant in (("a", "seed=0"), ("b", "seed=1 model=moma_small_depth experts=moe_4t4i")):
        config = load_config(
            ["experiment=moma_small", f"name={name}", f"run_dir='{tmp_path / name}'", *variant.split()]
        )
        write_atomic(tmp_path / name / "config.yaml", dump(config))
        write_atomic(tmp_path / name / "metrics.jsonl", canonical_json(run([], 0, 1.0)[1][0]) + "\n")
        folders.append(read_run(tmp_path / name))
    found = differing(folders)
    assert "seed" in found
    assert all(key == "seed" or key.startswith("model.") for key in found)


def test_the_experiment_compares_equal_flops() -> None:
    sweep = load_config(["experiment=moma_small"]).sweep
    configs = [load_config(["experiment=moma_small", *variant.split()]) for variant in sweep.variants]
    flops = [flops_per_token(config.model, vocabulary(config), config.data.context)[0] for config in configs]
    assert max(flops) / min(flops) < 1.01
    assert [efficiency.model_name({"model": vars(c.model) | {"experts": vars(c.model.experts)}}) for c in configs] == [
        "dense",
        "8 mixed",
        "4 text 4 image",
        "4 text 4 image, depth",
    ]
