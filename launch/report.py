"""``sundog report RUN``: plots and one HTML page from a run's folder."""

from pathlib import Path

from conf.errors import EXIT_DONE, ConfigError


def main(name: str, arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError("RUN", " ".join(arguments), "one run folder or run name", "sundog report runs/NAME")
    folder = Path(arguments[0])
    if not folder.is_dir() and (Path("runs") / arguments[0]).is_dir():
        folder = Path("runs") / arguments[0]
    if not (folder / "metrics.jsonl").exists():
        raise ConfigError("RUN", folder, "a run folder holds metrics.jsonl", "the run_dir of a train command")

    # Matplotlib loads here, after the mistakes that can be answered without it.
    from trainers.report import write_report

    print(f"report: {write_report(folder)}")
    return EXIT_DONE
