"""The Weights & Biases workspace of a project, kept as code: every panel is a metric of ``trainers.metrics``.

``python -m trainers.workspace --entity ENTITY`` saves it to the project (needs an account); ``--json`` prints it.
"""

import argparse
import sys
from typing import Any

from conf.schema import TrackerConfig

SECTIONS: dict[str, tuple[str, ...]] = {
    "Loss": ("train/loss", "eval/loss", "optim/grad_norm", "optim/lr"),
    "Speed": ("throughput/tokens_per_sec", "throughput/mfu", "time/step_sec", "time/data_wait_sec"),
    "Ranks": ("memory/peak_gb", "system/memory_gb/", "system/cpu_percent/", "ring/exposed_comm_ms"),
    "Experts": ("moe/load_imbalance/", "moe/tokens_with_0/", "moe/causal_gap"),
    "Checkpoints": ("time/checkpoint_sec", "time/checkpoint_stall_sec"),
    "Evaluation": ("time/eval_sec", "eval/loss_by_position/"),
}
MEDIA = ("pictures/timeline", "pictures/dropped", "pictures/loss_by_position", "pictures/expert_load")
TABLES = ("samples", "dropped", "expert_load")


def workspace(entity: str, project: str) -> Any:
    """Return the workspace: lines over tokens for each section, runs grouped as sweeps are, and the pictures."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as reports

    def line(metric: str) -> Any:
        if metric.endswith("/"):
            return reports.LinePlot(title=metric, x="train/tokens", metric_regex=metric + ".*")
        return reports.LinePlot(title=metric, x="train/tokens", y=[metric])

    sections = [
        workspaces.Section(name=name, panels=[line(metric) for metric in metrics], is_open=name in ("Loss", "Speed"))
        for name, metrics in SECTIONS.items()
    ]
    pictures: list[Any] = [reports.MediaBrowser(title=key, media_keys=[key]) for key in MEDIA]
    sections.append(workspaces.Section(name="Pictures", panels=pictures))
    tables: list[Any] = [reports.WeavePanelSummaryTable(table_name=name) for name in TABLES]
    sections.append(workspaces.Section(name="Tables", panels=tables))
    runs = workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")])
    return workspaces.Workspace(
        entity=entity, project=project, name="Sundog training", sections=sections, runset_settings=runs
    )


def to_json(view: Any) -> str:
    """The workspace as wandb stores it."""
    return str(view._to_model().model_dump_json(by_alias=True, exclude_none=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.workspace", description=__doc__)
    parser.add_argument("--entity", default="")
    parser.add_argument("--project", default=TrackerConfig().project)
    parser.add_argument("--json", action="store_true", help="print it instead of saving it")
    options = parser.parse_args(arguments)
    view = workspace(options.entity, options.project)
    if options.json:
        sys.stdout.write(to_json(view) + "\n")
    else:
        view.save()
        sys.stdout.write(f"saved: {view.url}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
