"""The process that keeps a local Ray cluster: started by ``cluster.local_head``, ended by its standard input's end.

It has a session of its own, so that Ctrl-C or a signal to the command's process group reaches the command alone, and
not Ray under it. The pipe that is its standard input closes however the command ends, SIGKILL included; then Ray is
shut down in order and the session folder removed. The first line on standard output is the cluster's address.
"""

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

STOP_TIMEOUT_SEC = 20.0
POLL_SEC = 0.1


def main(folder: str, object_store: int, dashboard_port: int) -> None:
    """Run Ray with its session in ``folder`` and ``object_store`` bytes; a ``dashboard_port`` of 0 is no dashboard."""
    if dashboard_port:
        _keep_with_job_server(folder, object_store, dashboard_port)
    else:
        _keep(folder, object_store)
    shutil.rmtree(folder, ignore_errors=True)


def _keep(folder: str, object_store: int) -> None:
    import ray

    context: Any = ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=object_store,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=folder,
    )
    _say(context.address_info["gcs_address"])
    while os.read(0, 1):
        pass
    ray.shutdown()


def _keep_with_job_server(folder: str, object_store: int, port: int) -> None:
    """Use ``ray start``: only it can choose the port of the dashboard's agent, through which jobs are submitted.

    With the fixed default, a second local cluster on a machine would have no working job server.
    """
    options = [
        "--head",
        "--block",
        "--disable-usage-stats",
        "--port=0",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        "--dashboard-agent-listen-port=0",
        f"--object-store-memory={object_store}",
        f"--temp-dir={folder}",
    ]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    head = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    ended = threading.Event()

    def watch() -> None:
        while os.read(0, 1):
            pass
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    address = Path(folder) / "ray_current_cluster"  # where Ray leaves the address for clients on this machine
    said = False
    while head.poll() is None and not ended.wait(POLL_SEC):
        if not said and address.exists() and (text := address.read_text().strip()):
            _say(text)
            said = True
    head.terminate()
    try:
        head.wait(STOP_TIMEOUT_SEC)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
