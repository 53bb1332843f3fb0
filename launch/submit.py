"""``sundog submit COMMAND ...``: any other command as a Ray job, its log streamed, its exit code returned."""

import argparse
from pathlib import Path

from conf.errors import ConfigError
from conf.rules import nearest
from conf.schema import ClusterConfig
from launch.preflight import load_config


def main(name: str, arguments: list[str]) -> int:
    from launch.__main__ import COMMANDS

    parser = argparse.ArgumentParser(prog="sundog submit", description="Run a Sundog command as a Ray job.")
    parser.add_argument(
        "--address", default="", help="of a Ray cluster's job server (http://HOST:8265); default: a local one"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its overrides")
    options = parser.parse_args(arguments)
    runnable = [command for command in COMMANDS if command != name]
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or command[0] not in runnable:
        given = command[0] if command else "(none)"
        raise ConfigError("command", given, f"one of {', '.join(runnable)}", nearest(given, runnable))
    if COMMANDS[command[0]].takes_config:
        load_config(command[1:], COMMANDS[command[0]].experiment)

    # Ray loads here, after the mistakes that can be answered without it.
    from cluster.jobs import REVISION_VARIABLE, command_line, submit
    from cluster.upload import check_size
    from launch.signals import stop_requests
    from trainers.lineage import git_revision

    config, folder = ClusterConfig(address=options.address), Path.cwd()
    env = {REVISION_VARIABLE: git_revision()}
    print(f"the same by hand: {command_line(command, config, working_dir=folder, env=env)}", flush=True)
    if options.address:
        print(f"uploading {check_size(folder) / 2**20:.1f} MiB of {folder}, code revision {git_revision()[:12]}")
        print("the job runs in a copy of this folder: give run_dir and data.dir as absolute, shared paths", flush=True)
    with stop_requests() as stops:
        return submit(
            command,
            config,
            working_dir=folder,
            env=env,
            on_line=lambda line: print(line, flush=True),
            stop=lambda: len(stops),
        )
