"""Time, speed and memory of a step. What cannot be measured or is not known is left out, never guessed."""

import resource
import sys
import time

import torch

from conf.estimate import flops_per_token
from conf.schema import RunConfig
from models.decoder import ModelSpec
from trainers.runtime import Runtime

# Dense bf16 peak of a GPU in FLOP/s, by the name that its driver reports. Source: the vendor's data sheets.
PEAK_BF16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of ``device`` in FLOP/s, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_BF16.items() if name.startswith(known)), None)


def useful_flops_per_token(config: RunConfig, spec: ModelSpec) -> int | None:
    """Return the training FLOPs of one token, or None where they depend on the documents in a window."""
    if config.data.attention != "context":
        return None
    return flops_per_token(spec.to_config(), spec.vocab_size, config.data.context)[0]


def peak_memory_gb(device: torch.device) -> float:
    """Return this process's peak so far in 10^9 bytes: allocated on a GPU, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Meter:
    """Measures optimizer steps on this rank."""

    def __init__(self, config: RunConfig, spec: ModelSpec | None, runtime: Runtime) -> None:
        """``spec`` None: a model whose FLOPs are not counted."""
        self._device = runtime.device
        flops = useful_flops_per_token(config, spec) if spec else None
        peak = peak_flops(runtime.device)
        self._flops, self._flops_per_peak = flops, None
        if flops is not None and peak is not None and config.trainer.precision == "bf16":
            self._flops_per_peak = flops / (peak * runtime.world_size)
        self._started = self._waited = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def data_is_here(self) -> None:
        """The loader has returned the step's batch."""
        self._waited = time.perf_counter() - self._started

    def stop(self, tokens: int, so_far: int) -> dict[str, float]:
        """The step, on ``tokens`` tokens over all ranks, is done; returns its metrics on this rank.

        ``so_far`` counts the tokens of all steps.

        The step's loss has been read from the device, so no work of it is still queued.
        """
        seconds = time.perf_counter() - self._started
        values = {
            "time/step_sec": seconds,
            "time/data_wait_sec": self._waited,
            "throughput/tokens_per_sec": tokens / seconds,
            "memory/peak_gb": peak_memory_gb(self._device),
        }
        if self._flops is not None:
            values["train/flops"] = float(self._flops * so_far)
        if self._flops_per_peak is not None:
            values["throughput/mfu"] = 100.0 * self._flops_per_peak * tokens / seconds
        return values
