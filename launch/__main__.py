"""``sundog COMMAND [KEY=VALUE ...]``: find the command, run it, turn what it raises into a message and an exit code."""

import importlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from types import FrameType

from conf.describe import keys
from conf.errors import (
    EXIT_BUG,
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    ConfigError,
    SundogError,
)
from conf.rules import nearest
from conf.schema import GROUPS, OVERLAYS
from launch.preflight import load_config, options

MULTIRUN = {"-m", "--multirun"}  # Hydra's own words for a sweep


@dataclass(frozen=True)
class Command:
    """One command: its module has ``main(name, config)``, or ``main(name, argv)`` when it takes more than overrides.

    The config is loaded before the module is imported, so that a mistake is answered before torch or Ray load.
    """

    module: str
    text: str
    takes_config: bool = True
    experiment: str = ""  # overlay that it starts from


COMMANDS = {
    "curate": Command("launch.stages", "read the corpus, filter it, remove exact duplicates"),
    "why": Command("launch.history", "a document's whole history: sundog why ID [KEY=VALUE ...]", takes_config=False),
    "verify": Command("launch.history", "hash stage files again: sundog verify [SHARE] [KEY=VALUE ...]", False),
    "order": Command("launch.stages", "order documents so that windows hold related ones (or at random)"),
    "pack": Command("launch.stages", "train or load the tokenizer, write memory-mapped shards of windows"),
    "prepare": Command("launch.stages", "raw text to packed tokens: curate, order and pack, one after another"),
    "ladder": Command("launch.ladder", "train a ladder of small models and the corpus that it judges"),
    "score": Command("launch.preselect", "score a sample of the corpus by a ladder of models (PreSelect)"),
    "scorer": Command("launch.preselect", "train the fastText scorer on the sample's best and worst documents"),
    "rephrase": Command("launch.rephrase", "rephrase the corpus by a model, filter, mix with real text, pack (WRAP)"),
    "train": Command("launch.train", "train on a gang of Ray actors, from the newest checkpoint if there is one"),
    "export": Command("launch.export", "write a checkpoint as a Hugging Face folder"),
    "generate": Command("launch.generate", "continue a prompt: sundog generate --prompt TEXT", takes_config=False),
    "evaluate": Command("launch.evaluate", "needles, threads, automata and perplexity of a model folder"),
    "serve": Command("launch.serve", "answer the OpenAI API on loopback through Ray Serve"),
    "report": Command(
        "launch.report", "write plots and a page from a run's folder: sundog report RUN", takes_config=False
    ),
    "plan": Command("launch.plan", "print parameters, FLOPs, memory, traffic and horizon; starts nothing"),
    "doctor": Command("launch.doctor", "say what this machine lacks and how to get it"),
    "submit": Command("launch.submit", "run any command as a Ray job: sundog submit [--address A] COMMAND ...", False),
    "list": Command("launch.jobs", "the jobs of a running cluster", takes_config=False),
    "status": Command("launch.jobs", "what became of a job: sundog status JOB", takes_config=False),
    "logs": Command("launch.jobs", "a job's log: sundog logs [-f] JOB", takes_config=False),
    "stop": Command("launch.jobs", "checkpoint and stop a job: sundog stop JOB", takes_config=False),
    "sweep": Command("launch.sweep", "train with every choice of values: sundog sweep KEY=A,B ...", takes_config=False),
    "demo": Command(
        "launch.demo", "the whole chain on a real corpus, ending with a served model that answers", experiment="demo"
    ),
}


class Terminated(BaseException):
    """SIGTERM arrived while a command without a checkpoint of its own was running."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _usage() -> str:
    rows = "\n".join(f"  {name:<9} {command.text}" for name, command in COMMANDS.items())
    return (
        "usage: sundog COMMAND [KEY=VALUE ...]\n\n"
        f"{rows}\n\n"
        "Overrides are Hydra's: a group picks an option (sequence=ring, order=random, experiment=demo), a key sets a\n"
        "value (trainer.steps=500). `sundog COMMAND --help` lists every group and key.\n\n"
        "exit codes: 0 done, 1 bug, 2 config or usage, 3 resources unavailable, 75 stopped and checkpointed (run the\n"
        "same command again), 130 and 143 signals"
    )


def _command_help(name: str) -> str:
    lines = [f"sundog {name}: {COMMANDS[name].text}", "", "groups (GROUP=OPTION):"]
    lines += [f"  {group:<11} {' | '.join(options(group))}" for group in (*GROUPS, *OVERLAYS)]
    lines += ["", "keys (KEY=VALUE) with their defaults:"]
    for key in keys().values():
        default = "''" if key.default == "" else key.default
        lines.append(f"  {f'{key.name}={default}':<46} {key.comment}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except SundogError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Terminated:
        return EXIT_TERMINATED
    except BrokenPipeError:
        # The reader of a pipe has left; nothing can be printed, at interpreter exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception:
        traceback.print_exc()
        print("This is a bug in Sundog, not in what you typed. The lines above say where.", file=sys.stderr)
        return EXIT_BUG


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(), flush=True)
        return EXIT_DONE if arguments else EXIT_CONFIG
    name, rest = arguments[0], arguments[1:]
    if name == "train" and MULTIRUN.intersection(rest):
        name, rest = "sweep", [argument for argument in rest if argument not in MULTIRUN]
    if name not in COMMANDS:
        raise ConfigError("command", name, f"one of {', '.join(COMMANDS)}", nearest(name, list(COMMANDS)))
    if "-h" in rest or "--help" in rest:
        print(_command_help(name), flush=True)
        return EXIT_DONE
    command = COMMANDS[name]
    if command.takes_config:
        config = load_config(rest, command.experiment)
        return importlib.import_module(command.module).main(name, config)
    return importlib.import_module(command.module).main(name, rest)


if __name__ == "__main__":
    sys.exit(main())
