"""``sundog doctor``: what it measures, and what it says to do."""

import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.neighbours import Machine, Silent
from cluster.wire import Disk, Receiver, bandwidth, clock_offset, disk, gpu_names
from conf.schema import RunConfig
from launch import doctor
from launch.doctor import MISSING, NOTE, OK, diagnose, judge_cluster, judge_disk, judge_link, judge_machine
from launch.preflight import load_config

HERE = Disk(10**12, 1e9, 1e-3)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LINK_SEC", 0.02)
    monkeypatch.setattr(doctor, "DISK_SEC", 0.02)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config([f"run_dir={tmp_path}/run", f"data.dir={tmp_path}/data", "cluster.ranks=1"])


@pytest.fixture
def machine() -> Machine:
    import platform
    from importlib.metadata import version

    return Machine(
        "b", platform.python_version(), version("ray"), 2.0, 0.0, (), 2**34, 0.01, 0.002, 1e9, HERE
    )  # what nothing is wrong with


def found(config: RunConfig, subject: str) -> doctor.Finding:
    return next(finding for finding in diagnose(config) if finding.subject == subject)


def test_every_subject_of_this_machine_is_looked_at(config: RunConfig, tmp_path: Path) -> None:
    findings = diagnose(config)
    subjects = {finding.subject for finding in findings}
    assert subjects >= {"python", "torch", "cpus", "gpus", "memory", "disk of run_dir", "interconnect", "clocks"}
    assert subjects >= {"shared memory", "serve.port", "host name", "corpus"}
    assert all(finding.fix for finding in findings if finding.state == MISSING)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_bandwidth_counts_what_has_arrived() -> None:
    assert bandwidth("127.0.0.1", Receiver().port, 0.05) > 1e6
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        bandwidth("127.0.0.1", port, 0.05)


def test_a_slow_link_is_measured_as_slow() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def read_slowly() -> None:
            connection, _ = server.accept()
            received = 0
            while taken := connection.recv(2**18):
                received += len(taken)
                time.sleep(0.01)  # at most 26 MB/s
            connection.sendall(received.to_bytes(8, "big"))

        threading.Thread(target=read_slowly, daemon=True).start()
        assert bandwidth("127.0.0.1", server.getsockname()[1], 0.1) < 30e6


def test_clock_offset_takes_the_quickest_answer() -> None:
    delays = iter([0.05, 0.0, 0.05])

    def theirs() -> float:
        delay = next(delays)
        told = time.time() + 100.0
        time.sleep(delay)
        return told

    ahead, error = clock_offset(theirs, tries=3)
    assert abs(ahead - 100.0) <= error + 1e-3
    assert error < 0.025


def test_the_disk_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    seen = disk(tmp_path, 0.05)
    assert seen.free > 0
    assert seen.rate > 0
    assert seen.sync_sec > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        disk(tmp_path / "none", 0.05)


@pytest.mark.parametrize(
    ("seen", "state", "said"),
    [
        (HERE, OK, "free"),
        (replace(HERE, rate=1e6), NOTE, "a checkpoint takes 200 s"),
        (replace(HERE, free=10**6), MISSING, "are needed"),
    ],
)
def test_a_disk_must_hold_and_take_the_checkpoints(seen: Disk, state: str, said: str) -> None:
    finding = judge_disk("disk", Path("/"), seen, least=10**9, checkpoint=2 * 10**8)
    assert finding.state == state
    assert said in finding.text


def test_what_is_wrong_with_a_machine_is_named(config: RunConfig, machine: Machine) -> None:
    assert [finding.state for finding in judge_machine(machine, config)] == [OK, OK], "itself and its link"
    (about, _) = judge_machine(machine, config)
    for said in ("2 CPUs", "no GPU", "16.0 GiB", "clock +0.010 s", "for run_dir"):
        assert said in about.text
    wrong = {
        "clock": replace(machine, clock_sec=-4.0),
        "Python": replace(machine, python="3.9.0"),
        "Ray": replace(machine, ray="2.0.0"),
        "denied": replace(machine, disk="/x: Permission denied"),
        "out of reach": replace(machine, rate="10.0.0.2: timed out"),
        "Ray lends 0": replace(machine, gpu_names=("NVIDIA H200", "NVIDIA H200")),
    }
    for said, one in wrong.items():
        texts = [finding.text for finding in judge_machine(one, config) if finding.state != OK]
        assert len(texts) == 1
        assert said in texts[0]
    unsure = replace(machine, clock_sec=-4.0, clock_error_sec=3.5)
    assert all(finding.state == OK for finding in judge_machine(unsure, config)), "the answer took too long to tell"
    assert judge_link("b", "there", 1e6, config).state == NOTE


def test_a_cluster_needs_the_devices_of_all_ranks(config: RunConfig, machine: Machine) -> None:
    def states(ranks: int, gpus: float) -> dict[str, tuple[str, str]]:
        config.cluster.ranks, config.cluster.gpus_per_rank = ranks, gpus
        return {f.subject: (f.state, f.fix) for f in judge_cluster([machine, replace(machine, gpus=1.0)], config)}

    assert states(4, 0)["cpus"][0] == OK
    assert states(5, 0)["cpus"] == (MISSING, "cluster.ranks=4")
    assert states(1, 1.0)["gpus"][0] == OK
    assert states(2, 1.0)["gpus"] == (MISSING, "cluster.ranks=1")
    assert states(2, 2.0)["gpus"] == (MISSING, "a machine with gpus (cluster.gpus_per_rank)")
    assert states(1, 0)["gpus"][0] == NOTE, "there is one that is not used"
    config.trainer.batch = config.trainer.micro_batch = 10**6
    assert states(1, 0)["memory"][0] == MISSING


def test_a_machine_that_does_not_answer_is_named(config: RunConfig, machine: Machine) -> None:
    finding = judge_cluster([machine, Silent("c (10.0.0.3)", "no answer in 40 s")], config)[-1]
    assert (finding.subject, finding.state, finding.text) == ("c (10.0.0.3)", MISSING, "no answer in 40 s")
    assert "raylet" in finding.fix


def test_a_cluster_is_judged_by_its_own_machines(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.cluster.address = "10.0.0.1:6379"
    monkeypatch.setattr(doctor, "CHECKS", [c for c in doctor.CHECKS if c.__name__ != "_machines"])
    subjects = {finding.subject for finding in diagnose(config)}
    assert not subjects & {"cpus", "gpus", "memory", "shared memory"}, "ranks do not run on this machine"


def test_graphics_cards_are_counted(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_names() == [] or found(config, "gpus").state != MISSING
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 570.1'\necho 'NVIDIA H200, 143771 MiB, 570.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert found(config, "gpus").text == "2: NVIDIA H200 143771 MiB 570.1; unused"
    config.cluster.ranks, config.cluster.gpus_per_rank = 4, 1.0
    finding = found(config, "gpus")
    assert (finding.state, finding.fix) == (MISSING, "cluster.ranks=2")


def test_a_taken_port_and_another_version_are_notes(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constraints.txt").write_text("ray==1.0.0\n")
    monkeypatch.setattr(doctor, "CONSTRAINTS", tmp_path / "constraints.txt")
    finding = found(config, "ray")
    assert finding.state == NOTE
    assert "tested with 1.0.0" in finding.text
    with socket.create_server(("127.0.0.1", 0)) as server:
        config.serve.port = server.getsockname()[1]
        finding = found(config, "serve.port")
    assert finding.state == NOTE
    assert "in use" in finding.text


def test_a_cluster_that_does_not_answer_is_missing(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' connection would be shared
    config.cluster.address = "127.0.0.1:1"
    finding = found(config, "cluster")
    assert finding.state == MISSING
    assert "ray start" in finding.fix
