"""``sundog report RUN ...``: plots and one HTML page from a run's folder; of a sweep or several runs, a comparison."""

from pathlib import Path

from conf.errors import EXIT_DONE, ConfigError

METRICS, SWEEP = "metrics.jsonl", "sweep.json"


def _folder(argument: str) -> Path:
    below = Path("runs") / argument
    folder = below if not Path(argument).is_dir() and below.is_dir() else Path(argument)
    if not ((folder / METRICS).exists() or (folder / SWEEP).exists()):
        raise ConfigError("RUN", folder, f"a run folder holds {METRICS}", "the run_dir of a train or sweep command")
    return folder


def _runs(folder: Path) -> list[Path]:
    """The runs of a sweep, or the run itself.

    Raises:
        ConfigError: no job of the sweep has done a step.
    """
    if not (folder / SWEEP).exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    if not found:
        raise ConfigError("RUN", folder, "a job of the sweep has done a step", f"the log of a job: {folder}/*/job.log")
    return found


def main(name: str, arguments: list[str]) -> int:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        raise ConfigError("RUN", " ".join(arguments), "run folders or run names", "sundog report runs/NAME")
    folders = [_folder(argument) for argument in arguments]

    # Matplotlib loads here, after the mistakes that can be answered without it.
    from trainers.comparison import write_comparison
    from trainers.report import write_report

    if len(folders) > 1:
        page = write_comparison([run for folder in folders for run in _runs(folder)], Path("runs") / "comparison")
    elif (folders[0] / SWEEP).exists():
        page = write_comparison(_runs(folders[0]), folders[0])
    else:
        page = write_report(folders[0])
    print(f"report: {page}")
    return EXIT_DONE
