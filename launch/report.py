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


def main(name: str, arguments: list[str]) -> int:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        raise ConfigError("RUN", " ".join(arguments), "run folders or run names", "sundog report runs/NAME")
    folders = [_folder(argument) for argument in arguments]

    # Matplotlib loads here, after the mistakes that can be answered without it.
    from trainers.comparison import write_comparison
    from trainers.report import write_report

    if len(folders) > 1:
        page = write_comparison(folders, Path("runs") / "comparison")
    elif (folders[0] / SWEEP).exists():
        page = write_comparison(sorted(path.parent for path in folders[0].glob(f"*/{METRICS}")), folders[0])
    else:
        page = write_report(folders[0])
    print(f"report: {page}")
    return EXIT_DONE
