"""``sundog generate``: continue prompts with a model folder.

``--prompt TEXT`` streams to standard output; ``--input FILE`` answers every line of a file on the Ray cluster;
``--image FILE.png`` continues the prompt with an image.
"""

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connection import connect
from cluster.gang import Gang
from conf.errors import EXIT_DONE, ConfigError
from conf.schema import RunConfig
from data.files import write_atomic
from launch.preflight import load_config
from launch.signals import stop_requests
from launch.stages import on_cluster

if TYPE_CHECKING:
    from inference.params import SamplingParams


def main(name: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sundog generate", description="Continue prompts; other settings are overrides."
    )
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--input", type=Path, help="JSON lines with prompt or messages, and settings of their own")
    parser.add_argument("--output", type=Path, help="folder for results.jsonl; RUN_DIR/generated/NAME by default")
    parser.add_argument("--image", type=Path, help="continue the prompt with an image, written to this PNG file")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(overrides)
    if options.input is not None:
        if options.prompt:
            raise ConfigError("--input", str(options.input), "not together with --prompt", "leave one of them out")
        if options.image is not None:
            raise ConfigError("--input", str(options.input), "not together with --image", "leave one of them out")
        if config.generate.engine.ranks > 1:
            rule = "the units of a file run in one process each"
            raise ConfigError("generate.engine.ranks", config.generate.engine.ranks, rule, "generate.engine.ranks=1")
        return _file(config, options.input, options.output)
    prompts = options.prompt or ([] if sys.stdin.isatty() else [sys.stdin.read()])
    if not any(prompts):
        raise ConfigError("--prompt", "(empty)", "a prompt is needed", "--prompt TEXT, or text on standard input")

    if options.image is not None and options.image.suffix.lower() != ".png":
        raise ConfigError(
            "--image", str(options.image), "images are written as PNG", f"--image {options.image.stem}.png"
        )
    settings = config.generate
    params = {name: getattr(settings, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    if settings.engine.ranks > 1:
        return _ranks(config, prompts, params, options.image)

    # Torch loads here, after every mistake that can be answered without it.
    from inference.generate import generate
    from inference.params import SamplingParams

    if options.image is not None:
        return _images(config, prompts, SamplingParams(**params), options.image)
    printer = _Printer(prompts)
    for index, piece in generate(settings.model, prompts, SamplingParams(**params), settings.engine):
        printer.event({"index": index, "text": piece})
    print()
    return EXIT_DONE


def _ranks(config: RunConfig, prompts: list[str], params: dict[str, Any], image: Path | None) -> int:
    """Continue prompts on a gang of as many ranks as the engine has."""
    settings = config.generate
    if image is not None:
        raise ConfigError("generate.engine.ranks", settings.engine.ranks, "images are made by one process", "ranks=1")
    work = {"model": str(Path(settings.model).absolute()), "prompts": prompts, "params": params}
    gang, printer = replace(config.cluster, ranks=settings.engine.ranks), _Printer(prompts)
    with stop_requests() as stops, connect(gang), Gang(gang, name="generate", stop=lambda: len(stops)) as ranks:
        ranks.run("inference.generate:generate_rank", {**work, "engine": asdict(settings.engine)}, printer.event)
    print()
    return EXIT_DONE


class _Printer:
    """Writes prompts and their continuations as they come."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts, self._current = prompts, -1

    def event(self, event: dict[str, Any]) -> None:
        if event["index"] != self._current:
            print(("\n\n" if self._current >= 0 else "") + self._prompts[event["index"]], end="")
            self._current = event["index"]
        print(event["text"], end="", flush=True)


def _images(config: RunConfig, prompts: list[str], params: "SamplingParams", target: Path) -> int:
    """Write an image for each prompt: FILE.png, FILE-2.png and so on."""
    from data.images import png
    from inference.images import generate_images

    images = generate_images(config.generate.model, prompts, params, config.generate.engine)
    for number, (prompt, pixels) in enumerate(zip(prompts, images, strict=True), 1):
        file = target if number == 1 else target.with_stem(f"{target.stem}-{number}")
        write_atomic(file, png(pixels))
        print(f"{prompt} -> {file}", flush=True)
    return EXIT_DONE


def _file(config: RunConfig, source: Path, output: Path | None) -> int:
    """Answer a file; a killed run goes on where it was."""
    from inference.batch import RESULTS, generate_file

    folder = (output or Path(config.run_dir) / "generated" / source.stem).absolute()
    start = time.monotonic()
    logs = Path(config.run_dir) / "logs"
    manifest = on_cluster(config, logs, lambda run: generate_file(source, folder, config.generate, run))
    figures = manifest.figures
    state = "complete before" if manifest.reused else f"{time.monotonic() - start:.1f} s"
    errors = f", {figures['errors']:,} with errors" if figures["errors"] else ""
    print(
        f"generate: {figures['lines']:,} lines{errors}, {figures['tokens']:,} tokens in {folder / RESULTS}  [{state}]"
    )
    return EXIT_DONE
