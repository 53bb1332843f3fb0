import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.control import STOP_SIGNALS, LocalControl

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop_and_handlers_come_back(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    with LocalControl(quiet=True) as control:
        assert not control.stopping()
        os.kill(os.getpid(), number)
        assert control.stopping()
    assert {each: signal.getsignal(each) for each in STOP_SIGNALS} == before


def test_a_second_signal_ends_the_process() -> None:
    code = (
        "import os, signal\n"
        "from trainers.control import LocalControl\n"
        "with LocalControl() as control:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    control.emit({'kind': 'log', 'message': f'stopping {control.stopping()}'})\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    control.emit({'kind': 'log', 'message': 'still here'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "stopping True\n"


def test_emit_prints_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    LocalControl(quiet=True).emit({"kind": "log", "message": "hidden"})
    LocalControl().emit({"kind": "log", "message": "shown"})
    assert capsys.readouterr().out == "shown\n"
