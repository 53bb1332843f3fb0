"""The workspace as code: panels of real metrics, and a round trip through what wandb stores."""

import json

import pytest

from trainers import plots
from trainers.metrics import METRICS
from trainers.workspace import MEDIA, SECTIONS, TABLES, main, to_json, workspace

pytest.importorskip("wandb_workspaces")


def test_panels_are_metrics_and_pictures_that_exist() -> None:
    names = {metric.name for metric in METRICS}
    assert {metric for metrics in SECTIONS.values() for metric in metrics} <= names
    assert {key.removeprefix("pictures/") for key in MEDIA} <= {*plots.PICTURES, "timeline", "dropped"}


def test_the_workspace_survives_what_wandb_stores() -> None:
    from wandb_workspaces.workspaces import Workspace
    from wandb_workspaces.workspaces.internal import View

    view = workspace("someone", "sundog")
    again = Workspace._from_model(View.model_validate_json(to_json(view)))
    assert [section.name for section in again.sections] == [*SECTIONS, "Pictures", "Tables"]
    assert [len(section.panels) for section in again.sections] == [
        *map(len, SECTIONS.values()),
        len(MEDIA),
        len(TABLES),
    ]


def test_it_is_printed_without_an_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--entity", "someone"]) == 0
    assert json.loads(capsys.readouterr().out)["displayName"] == "Sundog training"
