"""The Triton kernels run here without a GPU: their properties hold under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_properties_hold_under_the_interpreter() -> None:
    file = Path(__file__).with_name("triton_properties.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=580", str(file)]
    done = subprocess.run(command, env=environment, cwd=file.parents[3], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
