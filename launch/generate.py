"""``sundog generate --prompt TEXT``: continue prompts with a model folder, streaming to standard output."""

import argparse
import sys

from conf.errors import EXIT_DONE, ConfigError
from launch.preflight import load_config


def main(name: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sundog generate", description="Continue prompts; other settings are overrides."
    )
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(overrides)
    prompts = options.prompt or ([] if sys.stdin.isatty() else [sys.stdin.read()])
    if not any(prompts):
        raise ConfigError("--prompt", "(empty)", "a prompt is needed", "--prompt TEXT, or text on standard input")

    # Torch loads here, after every mistake that can be answered without it.
    from inference.generate import generate
    from inference.params import SamplingParams

    settings = config.generate
    params = SamplingParams(
        max_tokens=settings.max_tokens, temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed
    )
    current = -1
    for index, piece in generate(settings.model, prompts, params, settings.engine):
        if index != current:
            print(("\n\n" if current >= 0 else "") + prompts[index], end="")
            current = index
        print(piece, end="", flush=True)
    print()
    return EXIT_DONE
