"""``sundog doctor``: what this machine has, what it lacks, and how to get it. Changes nothing."""

import importlib.metadata
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.wire import Disk, Receiver, bandwidth, disk, gpu_names
from conf.errors import EXIT_DONE, EXIT_RESOURCES, SundogError
from conf.estimate import parameter_count, vocabulary
from conf.memory import memory_per_rank
from conf.schema import RunConfig
from data.corpora import open_corpus
from launch.plan import human_bytes

if TYPE_CHECKING:
    from cluster.neighbours import Machine, Silent

OK, NOTE, MISSING = "ok", "note", "missing"
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
LINK_SEC, DISK_SEC = 0.3, 0.5
SLOW_LINK, SLOW_DISK = 100e6, 50e6  # bytes a second: about 1 Gbit/s, and a hard disk's half
CLOCK_SEC = 1.0  # by how much clocks may differ before logs and records of several machines get out of order


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
    tested = _tested_versions()
    found = []
    for package in [*needed, *extras]:
        fix = "make setup" if package in needed else f"pip install -c constraints.txt 'sundog[{extras[package]}]'"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, MISSING if package in needed else NOTE, "not installed", fix))
            continue
        other = tested.get(package, version)
        same = version.partition("+")[0] == other
        found.append(Finding(package, OK if same else NOTE, version + ("" if same else f", tested with {other}"), fix))
    return found


def _tested_versions() -> dict[str, str]:
    """Of the checkout's constraints; none where the package is installed without them."""
    lines = CONSTRAINTS.read_text().splitlines() if CONSTRAINTS.exists() else []
    return {name: version for name, _, version in (line.partition("==") for line in lines) if version}


def _devices(config: RunConfig) -> list[Finding]:
    """CPUs, GPUs, memory and shared memory of this machine, for ranks that run here."""
    if config.cluster.address:
        return []  # ``judge_cluster`` looks at those of the machines that it runs on
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [judge_cpus(cpus, config), _gpus(config), judge_memory(total, config), *_shared_memory(config)]


def judge_cpus(cpus: float, config: RunConfig) -> Finding:
    """Whether the ranks' CPUs are there."""
    ranks, each = config.cluster.ranks, config.cluster.cpus_per_rank
    if ranks * each > cpus:
        return Finding(
            "cpus", MISSING, f"{cpus:g}, but {ranks} ranks need {ranks * each:g}", _fewer(cpus, each, "cpus")
        )
    return Finding("cpus", OK, f"{cpus:g} for {ranks} ranks")


def _fewer(there: float, each: float, what: str) -> str:
    return f"cluster.ranks={int(there / each)}" if there >= each else f"a machine with {what} (cluster.{what}_per_rank)"


def _gpus(config: RunConfig) -> Finding:
    need = config.cluster.gpus_per_rank * config.cluster.ranks
    devices = gpu_names()
    if not devices:
        fix = "an NVIDIA driver, or cluster.gpus_per_rank=0" if need else ""
        return Finding("gpus", MISSING if need else NOTE, "no NVIDIA driver answers: ranks run on CPUs", fix)
    text = f"{len(devices)}: {', '.join(sorted(set(devices)))}"
    found = judge_gpus(len(devices), text, config)
    if need and found.state == OK and "+cpu" in _version("torch"):
        return Finding("gpus", MISSING, f"{text}; torch is built for CPUs", "a CUDA build of torch")
    return found


def judge_gpus(gpus: float, text: str, config: RunConfig) -> Finding:
    """Whether the ranks' GPUs are there, and whether there are some that are not asked for."""
    ranks, each = config.cluster.ranks, config.cluster.gpus_per_rank
    if ranks * each > gpus:
        fix = _fewer(gpus, each, "gpus")
        return Finding("gpus", MISSING, f"{text}; {ranks} ranks need {ranks * each:g}", fix)
    if gpus and not each:
        return Finding("gpus", NOTE, f"{text}; unused", "cluster.gpus_per_rank=1")
    return Finding("gpus", OK, text)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def judge_memory(total: int, config: RunConfig) -> Finding:
    """Whether ``total`` bytes hold the run's ranks."""
    runtime = 600 * 2**20  # a rank's interpreter, torch and Ray worker, as measured on Linux
    need = config.cluster.ranks * (memory_per_rank(config, vocabulary(config)).total + runtime)
    text = f"{human_bytes(total)}, the run needs about {human_bytes(need)}"
    fix = "trainer.recompute=full, a smaller trainer.micro_batch, or sharding=fsdp"
    return Finding("memory", MISSING if need > total else OK, text, fix)


def _shared_memory(config: RunConfig) -> list[Finding]:
    if not Path("/dev/shm").exists():
        return []
    free = shutil.disk_usage("/dev/shm").free
    fix = "a larger /dev/shm (docker --shm-size), or a smaller cluster.object_store_mb"
    short = free < config.cluster.object_store_mb * 2**20
    text = f"{human_bytes(free)} free, the object store takes {config.cluster.object_store_mb} MiB"
    return [Finding("shared memory", NOTE if short else OK, text, fix)]


def _disks(config: RunConfig) -> list[Finding]:
    checkpoint = 12 * parameter_count(config.model, vocabulary(config))  # fp32 weights and two moments
    need = (config.trainer.keep_checkpoints + 1) * checkpoint
    found = []
    for name, place, least in (("run_dir", config.run_dir, need), ("data.dir", config.data.dir, 2**28)):
        folder = Path(place).resolve()
        while not folder.exists():
            folder = folder.parent
        try:
            found.append(judge_disk(f"disk of {name}", folder, disk(folder, DISK_SEC), least, checkpoint))
        except OSError as error:
            found.append(Finding(f"disk of {name}", MISSING, f"{folder}: {error.strerror}", f"another {name}"))
    return found


def judge_disk(subject: str, folder: Path, seen: Disk, least: int, checkpoint: int) -> Finding:
    """Whether there is room for ``least`` bytes, and how long a checkpoint takes to write."""
    speed = f"writes {human_bytes(seen.rate)}/s, sync {1e3 * seen.sync_sec:.1f} ms"
    text = f"{human_bytes(seen.free)} free at {folder}, {speed}"
    if seen.free < least:
        fix = "free disk space, fewer trainer.keep_checkpoints, or another folder"
        return Finding(subject, MISSING, f"{text}; {human_bytes(least)} are needed", fix)
    if seen.rate < SLOW_DISK:
        text += f"; a checkpoint takes {checkpoint / seen.rate:.0f} s"
        return Finding(subject, NOTE, text, "a faster disk, or a larger trainer.checkpoint_every")
    return Finding(subject, OK, text)


def _machines(config: RunConfig) -> list[Finding]:
    """Links, clocks, disks and versions: of all machines of the cluster, or of this one alone."""
    if not config.cluster.address:
        rate = bandwidth("127.0.0.1", Receiver().port, LINK_SEC)
        own = "one machine, nothing to compare"
        return [judge_link("interconnect", "loopback", rate, config), Finding("clocks", OK, own)]
    from cluster.connection import takes_any_client  # Ray costs seconds
    from cluster.neighbours import look

    try:
        machines = look(config.cluster, config.run_dir if Path(config.run_dir).exists() else ".")
    except SundogError as error:
        return [Finding("cluster", MISSING, f"{error.field} = {error.value}: {error.rule}", error.fix)]
    found = judge_cluster(machines, config)
    if not takes_any_client(config.cluster.address):
        return [*found, Finding("token", OK, "the cluster takes only clients with its token")]
    text, fix = "whoever reaches the cluster can run code on it", "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on all nodes"
    if os.environ.get("RAY_AUTH_MODE") == "token":  # then nothing can be seen of its machines
        return [Finding("token", MISSING, f"{text}, and it starts no actors of a client that sends a token", fix)]
    return [*found, Finding("token", NOTE, text, fix)]


def judge_cluster(machines: Sequence["Machine | Silent"], config: RunConfig) -> list[Finding]:
    """What the machines have together beside what the ranks need, and what is wrong with each."""
    from cluster.neighbours import Machine, Silent

    live = [machine for machine in machines if isinstance(machine, Machine)]
    gpus = sum(machine.gpus for machine in live)
    found = [
        judge_cpus(sum(machine.cpus for machine in live), config),
        judge_gpus(gpus, f"{gpus:g} lent by Ray" if gpus else "Ray has none: ranks run on CPUs", config),
        judge_memory(sum(machine.memory for machine in live), config),
    ]
    for machine in machines:
        if isinstance(machine, Silent):
            fix = "look at its raylet and its network, or start Ray there again"
            found.append(Finding(machine.host, MISSING, machine.reason, fix))
        else:
            found += judge_machine(machine, config)
    return found


def judge_machine(machine: "Machine", config: RunConfig) -> list[Finding]:
    """What is wrong with one machine of the cluster, after a line that says what it is."""
    ahead, error = machine.clock_sec, machine.clock_error_sec
    gpus = f"{machine.gpus:g} GPUs" if machine.gpus else "no GPU"
    clock = f"clock {ahead:+.3f} s (within {error:.3f})"
    about = f"{machine.cpus:g} CPUs, {gpus}, {human_bytes(machine.memory)}, {clock}"
    found = []

    def wrong(state: str, text: str, fix: str) -> None:
        found.append(Finding(machine.host, state, text, fix))

    if abs(ahead) - error > CLOCK_SEC:
        wrong(NOTE, clock, "synchronise its clock: chronyd or systemd-timesyncd")
    for name, theirs, ours in (
        ("Python", machine.python, ".".join(map(str, sys.version_info[:3]))),
        ("Ray", machine.ray, _version("ray")),
    ):
        if theirs != ours:
            wrong(MISSING, f"{name} {theirs}, here {ours}", "the same image everywhere")
    if len(machine.gpu_names) > machine.gpus:
        shown = f"its driver shows {len(machine.gpu_names)} GPUs, Ray lends {machine.gpus:g}"
        wrong(NOTE, shown, "`ray start --num-gpus`, or CUDA_VISIBLE_DEVICES where it was started")
    if isinstance(machine.disk, str):
        wrong(MISSING, machine.disk, "run_dir on a file system that all machines share")
    else:
        about += f", {human_bytes(machine.disk.free)} free and {human_bytes(machine.disk.rate)}/s for run_dir"
    if isinstance(machine.rate, str):
        fix = "open the ports between the machines: ranks listen on any"
        wrong(MISSING, f"the next machine is out of reach: {machine.rate}", fix)
    elif machine.rate is not None:
        found.append(judge_link(machine.host, "to the next machine", machine.rate, config))
    return [Finding(machine.host, OK, about), *found]


def judge_link(subject: str, where: str, rate: float, config: RunConfig) -> Finding:
    """How long the gradients of a step take on a link."""
    gradients = 4 * parameter_count(config.model, vocabulary(config))
    text = (
        f"{where}: {human_bytes(rate)}/s; a step's gradients, {human_bytes(gradients)}, take {gradients / rate:.2g} s"
    )
    fix = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the fast interface; or sharding=hsdp"
    return Finding(subject, NOTE if rate < SLOW_LINK else OK, text, fix)


def _ports(config: RunConfig) -> list[Finding]:
    serve = config.serve
    taken = port_error(serve.host, serve.port)
    where = f"{serve.host}:{serve.port}"
    found = [Finding("serve.port", NOTE if taken else OK, f"{where} is {taken or 'free'}", "serve.port=...")]
    started = time.perf_counter()
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        text, state = f"{socket.gethostname()} resolves", OK
    except OSError as error:
        text, state = f"{socket.gethostname()} does not resolve: {error.strerror}", NOTE
    if (waited := time.perf_counter() - started) > 1:
        text, state = f"{socket.gethostname()} took {waited:.1f} s to resolve", NOTE
    fix = "a line for it in /etc/hosts; ranks find each other by address"
    return [*found, Finding("host name", state, text, fix)]


def port_error(host: str, port: int) -> str:
    """Why nothing can listen there; empty: it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return str(error.strerror)
    return ""


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
    _devices,
    _disks,
    _ports,
    _secrets,
    _corpus,
    _machines,
)


def diagnose(config: RunConfig) -> list[Finding]:
    """Run all checks for this config on this machine."""
    return [finding for check in CHECKS for finding in check(config)]


def main(name: str, config: RunConfig) -> int:
    findings = diagnose(config)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        fix = f"  fix: {finding.fix}" if finding.fix and finding.state != OK else ""
        print(f"{finding.state:<8} {finding.subject:<{width}} {finding.text}{fix}")
    missing = sum(finding.state == MISSING for finding in findings)
    print(f"{missing} missing" if missing else "ready")
    return EXIT_RESOURCES if missing else EXIT_DONE
