"""``sundog doctor``: what this machine has, what it lacks, and how to get it. Changes nothing."""

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conf.errors import EXIT_DONE, EXIT_RESOURCES, SundogError
from conf.estimate import memory_per_rank, vocabulary
from conf.schema import RunConfig
from data.corpora import open_corpus
from launch.plan import human_bytes

OK, NOTE, MISSING = "ok", "note", "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis: what was looked at, how it is, and the fix if it is not well."""

    subject: str
    state: str
    text: str
    fix: str = ""


def _python(config: RunConfig) -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return [Finding("python", OK if good else MISSING, version, "" if good else "Python 3.11 or newer")]


def _packages(config: RunConfig) -> list[Finding]:
    needed = {
        "torch": "",
        "ray": "",
        "pyarrow": "",
        "tokenizers": "",
        "faiss-cpu": "",
        "scikit-learn": "",
        "hydra-core": "",
    }
    extras = {"fastapi": "serve", "wandb": "wandb", "mlxtend": "images", "transformers": "test"}
    found = []
    for package in [*needed, *extras]:
        try:
            found.append(Finding(package, OK, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            if package in needed:
                found.append(Finding(package, MISSING, "not installed", "make setup"))
            else:
                extra = extras[package]
                found.append(
                    Finding(package, NOTE, "not installed", f"pip install -c constraints.txt 'sundog[{extra}]'")
                )
    return found


def _processors(config: RunConfig) -> list[Finding]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    need = config.cluster.ranks * config.cluster.cpus_per_rank
    if need > cpus and not config.cluster.address:
        return [
            Finding("cpus", MISSING, f"{cpus}, but {config.cluster.ranks} ranks need {need:g}", f"cluster.ranks={cpus}")
        ]
    return [Finding("cpus", OK, f"{cpus} for {config.cluster.ranks} ranks")]


def _gpus(config: RunConfig) -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        state = MISSING if config.cluster.gpus_per_rank > 0 else NOTE
        return [
            Finding(
                "gpus",
                state,
                "no NVIDIA driver: ranks run on CPUs",
                "cluster.gpus_per_rank=0" if state == MISSING else "",
            )
        ]
    devices = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return [Finding("gpus", OK, f"{devices} NVIDIA device(s)")]


def _memory(config: RunConfig) -> list[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    runtime = 600 * 2**20  # a rank's interpreter, torch and Ray worker, as measured on Linux
    need = config.cluster.ranks * (memory_per_rank(config, vocabulary(config)).total + runtime)
    text = f"{human_bytes(total)}, the run needs about {human_bytes(need)}"
    if need > total and not config.cluster.address:
        return [
            Finding("memory", MISSING, text, "trainer.recompute=full, a smaller trainer.micro_batch, or sharding=fsdp")
        ]
    return [Finding("memory", OK, text)]


def _disks(config: RunConfig) -> list[Finding]:
    found = []
    for key, place, need in (("disk of run_dir", config.run_dir, 2**30), ("shared memory", "/dev/shm", 2**28)):
        folder = Path(place).resolve()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        state = OK if free >= need else NOTE
        writable = os.access(folder, os.W_OK)
        if not writable:
            state = MISSING
        text = f"{human_bytes(free)} free at {folder}" + ("" if writable else ", not writable")
        found.append(
            Finding(key, state, text, "" if state == OK else f"make room for {human_bytes(need)}, or another folder")
        )
    return found


def _ports(config: RunConfig) -> list[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.serve.host, config.serve.port))
        except OSError as error:
            return [
                Finding(
                    "serve.port", NOTE, f"{config.serve.host}:{config.serve.port}: {error.strerror}", "serve.port=..."
                )
            ]
    return [Finding("serve.port", OK, f"{config.serve.host}:{config.serve.port} is free")]


def _secrets(config: RunConfig) -> list[Finding]:
    found = []
    if config.tracker.wandb == "online":
        known = bool(os.environ.get("WANDB_API_KEY")) or Path("~/.netrc").expanduser().exists()
        found.append(Finding("wandb account", OK if known else MISSING, "found" if known else "none", "wandb login"))
    if config.serve.host not in ("127.0.0.1", "localhost", "::1") and not os.environ.get("SUNDOG_API_TOKEN"):
        fix = "export SUNDOG_API_TOKEN=..."
        found.append(
            Finding("SUNDOG_API_TOKEN", NOTE, f"unset, and serve.host={config.serve.host} is not loopback", fix)
        )
    return found


def _corpus(config: RunConfig) -> list[Finding]:
    try:
        corpus = open_corpus(config.data)
    except SundogError as error:
        return [Finding("corpus", MISSING, f"{error.field}: {error.value}", error.fix)]
    return [Finding("corpus", OK, f"{config.data.name}, licence {corpus.licence}")]


CHECKS: tuple[Callable[[RunConfig], list[Finding]], ...] = (
    _python,
    _packages,
    _processors,
    _gpus,
    _memory,
    _disks,
    _ports,
    _secrets,
    _corpus,
)


def diagnose(config: RunConfig) -> list[Finding]:
    """Run all checks for this config on this machine."""
    return [finding for check in CHECKS for finding in check(config)]


def main(name: str, config: RunConfig) -> int:
    findings = diagnose(config)
    for finding in findings:
        fix = f"  fix: {finding.fix}" if finding.fix and finding.state != OK else ""
        print(f"{finding.state:<8} {finding.subject:<18} {finding.text}{fix}")
    missing = sum(finding.state == MISSING for finding in findings)
    print(f"{missing} missing" if missing else "ready")
    return EXIT_RESOURCES if missing else EXIT_DONE
