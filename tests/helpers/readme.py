"""What README shows: its blocks and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)


def commands() -> list[list[str]]:
    """Every ``sundog ...`` line of the README's blocks, as words, without its comment."""
    lines = [line.removeprefix("$ ") for block in BLOCKS for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("sundog ")]
