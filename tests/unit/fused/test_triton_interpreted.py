"""The Triton kernels run here without a GPU: their properties hold under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_properties_hold_under_the_interpreter() -> None:
    here = Path(__file__).parent
    files = [str(here / name) for name in ("triton_properties.py", "triton_expert_properties.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=580", *files]
    done = subprocess.run(command, env=environment, cwd=here.parents[2], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
