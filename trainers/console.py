"""Events as lines for a person: plain text, one line each, the same on a terminal and in a log file. No torch."""

import sys
from collections.abc import Mapping
from typing import Any


def short_number(value: float) -> str:
    """Return three significant digits with a k, M, B or T: ``11.9k``, ``1.24B``."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".") + suffix
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return ``45s``, ``14m16s`` or ``14h16m``."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def rate(value: float) -> str:
    """Return a learning rate as ``3e-4`` or ``2.1e-4``."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def step_line(event: Mapping[str, Any]) -> str:
    """Return the line of a ``metrics`` event.

    ``step 120/4768  loss 2.914  gnorm 0.82  lr 2.1e-4  11.9k tok/s  mem 0.9G  eta 14m16s``; what an event does not
    hold (MFU on a CPU, evaluation on most steps) is left out.
    """
    parts = [f"step {event['step']}" + (f"/{event['steps']}" if event.get("steps") else "")]
    columns = (
        ("train/loss", lambda v: f"loss {v:.3f}"),
        ("eval/loss", lambda v: f"eval {v:.3f}"),
        ("optim/grad_norm", lambda v: f"gnorm {v:.2f}"),
        ("optim/lr", lambda v: f"lr {rate(v)}"),
        ("throughput/tokens_per_sec", lambda v: f"{short_number(v)} tok/s"),
        ("throughput/mfu", lambda v: f"mfu {v:.1f}%"),
        ("memory/peak_gb", lambda v: f"mem {v:.1f}G"),
        ("eta_sec", lambda v: f"eta {duration(v)}"),
    )
    parts += [text(event[name]) for name, text in columns if event.get(name) is not None]
    return "  ".join(parts)


def event_lines(event: Mapping[str, Any]) -> list[str]:
    """Return the lines that show ``event``; none for a kind that has nothing for a person."""
    kind = event.get("kind")
    if kind == "metrics":
        return [step_line(event)]
    if kind == "log":
        return [str(event["message"])]
    if kind == "checkpoint":
        return [f"checkpoint  step {event['step']}  {event['path']}"]
    if kind == "samples":
        return [f"sample  {row['prompt']!r} -> {row['continuation']!r}" for row in event["rows"][:1]]
    return []


def show(event: Mapping[str, Any]) -> None:
    """Print an event to standard output at once."""
    for line in event_lines(event):
        print(line, flush=True)


def complain(text: str) -> None:
    """Print an error to standard error."""
    print(text, file=sys.stderr, flush=True)
