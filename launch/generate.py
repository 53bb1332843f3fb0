"""``sundog generate``: continue prompts with a model folder.

``--prompt TEXT`` streams to standard output; ``--input FILE`` answers every line of a file on the Ray cluster;
``--image FILE.png`` continues the prompt with an image.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import EXIT_DONE, ConfigError
from conf.schema import RunConfig
from data.files import write_atomic
from launch.preflight import load_config
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
        return _file(config, options.input, options.output)
    prompts = options.prompt or ([] if sys.stdin.isatty() else [sys.stdin.read()])
    if not any(prompts):
        raise ConfigError("--prompt", "(empty)", "a prompt is needed", "--prompt TEXT, or text on standard input")

    if options.image is not None and options.image.suffix.lower() != ".png":
        raise ConfigError(
            "--image", str(options.image), "images are written as PNG", f"--image {options.image.stem}.png"
        )

    # Torch loads here, after every mistake that can be answered without it.
    from inference.generate import generate
    from inference.params import SamplingParams

    settings = config.generate
    params = SamplingParams(
        max_tokens=settings.max_tokens, temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed
    )
    if options.image is not None:
        return _images(config, prompts, params, options.image)
    current = -1
    for index, piece in generate(settings.model, prompts, params, settings.engine):
        if index != current:
            print(("\n\n" if current >= 0 else "") + prompts[index], end="")
            current = index
        print(piece, end="", flush=True)
    print()
    return EXIT_DONE


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
