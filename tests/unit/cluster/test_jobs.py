"""Jobs: exit codes survive Ray, the printed line works, a stop ends them, and uploads are bounded."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.job_client import connect_jobs, find_job, list_jobs
from cluster.jobs import command_line, job_server, submit
from cluster.local_head import Head, local_head
from cluster.upload import EXCLUDES, check_size, upload_files
from conf.errors import ConfigError, ResourceError
from conf.schema import ClusterConfig
from launch.jobs import main as jobs_command

PROGRAM = """
import os, sys, time
print("arguments", *sys.argv[1:], flush=True)
print("greeting", os.environ.get("GREETING"), os.path.exists("secret.bin"), flush=True)
if sys.argv[1] == "wait":
    import signal, threading
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    print("waiting", flush=True)
    stopped.wait(60)
    sys.exit(75)
if sys.argv[1] == "die":
    os.kill(os.getpid(), 9)
open("written", "w").write(sys.argv[1])
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with local_head(ClusterConfig(object_store_mb=128), dashboard=True) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder whose ``python -m launch`` is a tiny program."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    (tmp_path / "launch" / "__main__.py").write_text(PROGRAM)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "secret.bin").write_bytes(b"x")
    return tmp_path


def run(argv: list[str], head: Head, folder: Path) -> tuple[int, list[str]]:
    lines: list[str] = []
    code = submit(
        argv,
        ClusterConfig(address=head.dashboard_url),
        working_dir=folder,
        env={"GREETING": "hello"},
        on_line=lines.append,
    )
    return code, lines


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_exit_code_comes_back(head: Head, folder: Path, code: int) -> None:
    got, lines = run([str(code), "cluster.address=auto", "it's quoted"], head, folder)
    assert got == code
    assert f"arguments {code} it's quoted" in lines
    assert "greeting hello False" in lines
    assert not any(line.startswith("[sundog exit code") for line in lines)


def test_a_stop_ends_the_job_which_still_says_its_exit_code(head: Head, folder: Path) -> None:
    lines: list[str] = []
    code = submit(
        ["wait"],
        ClusterConfig(address=head.dashboard_url),
        working_dir=folder,
        on_line=lines.append,
        stop=lambda: int("waiting" in lines),
    )
    assert code == 75


def told(head: Head, job: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``sundog status`` says, in one line of single spaces."""
    capsys.readouterr()
    assert jobs_command("status", ["--address", head.dashboard_url, job]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_command_that_is_killed_again_and_again(head: Head, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(["die"], head, folder)
    assert (code, lines.count("arguments die")) == (137, 4)
    job = lines[0].removeprefix("job ")
    said = told(head, job, capsys)
    assert "state killed" in said
    assert "told SIGKILL killed its command" in said
    assert f"to do `sundog logs {job}`" in said
    assert jobs_command("logs", ["--address", head.dashboard_url, job]) == 0
    log = capsys.readouterr().out
    assert log.startswith("arguments die\n")
    assert log.count("killed (137): running it again") == 3
    assert jobs_command("list", ["--address", head.dashboard_url]) == 0
    assert f"{job}  killed" in capsys.readouterr().out


def test_a_lost_job_is_submitted_again_and_says_so(
    head: Head, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []

    def stop() -> int:
        if lines.count("waiting") == 1 and not lost:
            lost.extend(process for process in psutil.process_iter(["cmdline"]) if supervises(process))
            for process in lost:
                process.kill()
        return int(lines.count("waiting") == 2)

    lost: list[psutil.Process] = []
    address = ClusterConfig(address=head.dashboard_url)
    assert submit(["wait"], address, working_dir=folder, on_line=lines.append, stop=stop) == 75
    first, second = (line.removeprefix("job ") for line in lines if line.startswith("job raysubmit"))
    assert f"submitted again as {second}" in told(head, first, capsys)
    assert "state lost" in told(head, first, capsys)
    assert "state stopped" in told(head, second, capsys)


def supervises(process: psutil.Process) -> bool:
    """Whether it looks after a job of this module's head."""
    if "ray::JobSupervisor" not in " ".join(process.info["cmdline"] or []):
        return False
    ancestors = [parent.pid for parent in process.parents()]
    return os.getpid() in ancestors


def test_jobs_are_found_by_part_of_their_id_and_say_what_they_ran(head: Head, folder: Path) -> None:
    run(["0", "first"], head, folder)
    _, lines = run(["2", "second"], head, folder)
    client = connect_jobs(head.dashboard_url)
    newest = list_jobs(client)[0]
    assert f"job {newest.submission_id}" in lines
    assert newest.metadata == {"command": "2 second", "revision": ""}
    assert find_job(list_jobs(client), (newest.submission_id or "")[-8:]).submission_id == newest.submission_id
    for wrong, rule in [("raysubmit_", "names one submitted job"), ("no-such-job", "is the id of a submitted job")]:
        with pytest.raises(ConfigError) as caught:
            find_job(list_jobs(client), wrong)
        assert caught.value.rule == rule


def test_the_server_counts_what_its_cluster_has(head: Head, folder: Path) -> None:
    with job_server(ClusterConfig(address=head.dashboard_url), working_dir=folder) as server:
        assert (server.total("CPU"), server.total("GPU")) == (os.cpu_count(), 0.0)


def test_the_printed_line_works(head: Head, folder: Path) -> None:
    line = command_line(
        ["0", "a b"], ClusterConfig(address=head.dashboard_url), working_dir=folder, env={"GREETING": "hi"}
    )
    command = shlex.split(line)
    assert command[:5] == ["ray", "job", "submit", "--address", head.dashboard_url]
    assert json.loads(command[command.index("--runtime-env-json") + 1])["excludes"] == list(EXCLUDES)
    tool = str(Path(sys.executable).parent)
    done = subprocess.run(
        line,
        shell=True,
        env=os.environ | {"PATH": f"{tool}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "arguments 0 a b" in done.stdout
    assert "greeting hi False" in done.stdout


def test_a_job_on_a_local_head_runs_in_the_folder_itself(folder: Path) -> None:
    lines: list[str] = []
    assert submit(["2"], ClusterConfig(object_store_mb=128), working_dir=folder, on_line=lines.append) == 2
    assert "arguments 2" in lines
    assert "greeting None False" in lines
    assert (folder / "written").read_text() == "2"


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1", "http://127.0.0.1"])
def test_a_wrong_address_is_refused(folder: Path, address: str) -> None:
    with pytest.raises(ResourceError) as caught:
        submit(["0"], ClusterConfig(address=address), working_dir=folder, on_line=lambda line: None)
    assert (caught.value.field, caught.value.value) == ("cluster.address", address)


def test_an_upload_leaves_out_what_is_not_code(folder: Path) -> None:
    (folder / ".venv").mkdir()
    (folder / ".venv" / "library.py").write_text("x")
    (folder / "readme").write_text("12345")
    assert upload_files(folder) == {"launch/__init__.py": 0, "launch/__main__.py": len(PROGRAM), "readme": 5}


def test_what_git_ignores_is_not_uploaded(folder: Path) -> None:
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / ".gitignore").write_text("*.log\nbig/\n")
    (folder / "big").mkdir()
    (folder / "big" / "data").write_text("x")
    (folder / "launch" / "a.log").write_text("x")
    assert sorted(upload_files(folder)) == [".gitignore", "launch/__init__.py", "launch/__main__.py"]


def test_a_large_upload_names_its_biggest_paths(folder: Path) -> None:
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(
        ResourceError, match=r"101\.0 MiB to upload, the limit is 100 MiB; biggest: weights\.bin \(101\.0 MiB\)"
    ):
        submit(["0"], ClusterConfig(address="http://127.0.0.1:1"), working_dir=folder, on_line=lambda line: None)
    assert check_size(folder, limit=2**30) > 101 * 2**20
