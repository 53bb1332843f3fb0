"""Rank functions for the tests of the gang: plain Python, with sockets where ranks must meet."""

import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conf.errors import DataError, RankLost

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
MEET_TIMEOUT_SEC = 60.0


def _rank() -> int:
    return int(os.environ["RANK"])


def report(config: dict[str, Any], control: Any) -> dict[str, Any]:
    """Meet at MASTER_ADDR:MASTER_PORT, as torch.distributed would, and return the environment."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    others = int(os.environ["WORLD_SIZE"]) - 1
    if _rank() == 0:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen()
            server.settimeout(MEET_TIMEOUT_SEC)
            peers = sorted(int(server.accept()[0].recv(8)) for _ in range(others))
    else:
        peers = []
        _connect(address).sendall(str(_rank()).encode())
    sys.stdout.write(f"python output of rank {_rank()}\n")
    os.system(f"echo native output of rank {_rank()}")
    return {name: os.environ.get(name, "") for name in NAMES} | {
        "peers": peers,
        "cwd": os.getcwd(),
        "pid": os.getpid(),
        "device": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "torch": "torch" in sys.modules,
        "config": config,
    }


def _connect(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + MEET_TIMEOUT_SEC
    while True:
        try:
            return socket.create_connection(address, 5)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def emit_numbers(config: dict[str, Any], control: Any) -> dict[str, Any]:
    for step in range(config["count"]):
        control.emit({"kind": "metrics", "step": step, "rank": _rank()})
    return {"status": "done", "step": config["count"]}


def emit_until_heard(config: dict[str, Any], control: Any) -> str:
    """Emit one event and end only once the driver's callback has reacted to it by making a file."""
    control.emit({"kind": "log", "message": "here"})
    _await(Path(config["file"]).exists)
    return "heard"


def _await(condition: Any) -> None:
    deadline = time.monotonic() + MEET_TIMEOUT_SEC
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def block(config: Any, control: Any) -> None:
    """Never end, deaf to stop requests; ``config["folder"]``, if any, gets a file named after the process."""
    if isinstance(config, dict):
        (Path(config["folder"]) / str(os.getpid())).touch()
    control.emit({"kind": "log", "message": "blocked", "pid": os.getpid()})
    while True:
        signal.pause()


def work_slowly(config: dict[str, Any], control: Any) -> dict[str, Any]:
    """``config["steps"]`` steps of ``config["sec"]`` seconds, each of which asks whether to stop."""
    for _ in range(config["steps"]):
        time.sleep(config["sec"])
        control.stopping()
    return {"status": "done", "step": config["steps"]}


def give_up_in_rank_0(config: Any, control: Any) -> None:
    """Rank 0 raises as a collective does that has waited too long; rank 1 never ends."""
    if _rank() == 0:
        with tempfile.TemporaryDirectory() as folder:
            go = Path(folder) / "go"
            control.emit({"kind": "log", "message": "", "go": str(go)})
            _await(go.exists)
        raise RuntimeError("Timed out waiting 60000ms for recv operation to complete")
    block(config, control)


def wait_for_stop(config: Any, control: Any) -> dict[str, Any]:
    control.emit({"kind": "log", "message": "waiting"})
    _await(control.stopping)
    return {"status": "stopped", "step": 7, "rank": _rank()}


def fail_in_rank_1(config: dict[str, Any], control: Any) -> None:
    """Rank 1 raises, exits or dies as ``config["how"]`` says; the others wait for ever."""
    if _rank() == 1:
        sys.stdout.write("last words\n")
        how = config["how"]
        if how == "raise":
            raise ZeroDivisionError("no number")
        if how == "user":
            raise DataError("shard.bin", 3, "it must have 4 bytes", "pack again")
        if how == "exit":
            sys.exit(4)
        os.kill(os.getpid(), signal.SIGKILL)
    block(None, control)


def die_while_peer_sees_it(config: dict[str, Any], control: Any) -> None:
    """Rank 1 is killed; rank 0 notices the broken connection and raises ``config["error"]`` first, as gloo does."""
    if _rank() == 1:
        connection = _connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        connection.sendall(b"1")
        os.kill(os.getpid(), signal.SIGKILL)
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        server.listen()
        server.settimeout(MEET_TIMEOUT_SEC)
        peer = server.accept()[0]
        while peer.recv(8):
            pass
    raise RankLost("rank 1 is lost") if config["error"] == "lost" else ConnectionError("closed by peer")


def resume(config: Any, control: Any) -> dict[str, Any]:
    """Count to ``config.trainer.steps`` with a checkpoint each step; rank 1 dies once, at step 2."""
    folder = Path(config.run_dir)
    checkpoint = folder / f"step-of-{_rank()}"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    started_at = step
    while step < config.trainer.steps:
        step += 1
        beside = folder / f"beside-{_rank()}"
        beside.write_text(str(step))
        beside.replace(checkpoint)
        control.emit({"kind": "metrics", "step": step})
        if _rank() == 1 and step == 2 and started_at == 0:
            while not (folder / "step-of-0").exists():  # else rank 0 may die before it has begun
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    return {"status": "done", "step": step, "started_at": started_at}


def always_raise(config: Any, control: Any) -> None:
    raise RuntimeError("the same every time")


def user_error(config: Any, control: Any) -> None:
    raise DataError("corpus", "", "it is empty", "another corpus")


def torch_store(config: Any, control: Any) -> str:
    """Meet through torch's own store on the held port."""
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"]), is_master=_rank() == 0
    )
    store.set(f"rank-{_rank()}", "here")
    answer = store.get(f"rank-{1 - _rank()}").decode()
    store.set(f"read-{_rank()}", "")
    if _rank() == 0:
        store.get("read-1")  # the store ends with rank 0's reference to it
    return answer
