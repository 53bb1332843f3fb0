"""The Hydra launcher of ``sundog sweep``. It lives here because Hydra finds plugins in ``hydra_plugins`` only.

Hydra composes a batch of jobs; what runs them is the task function, an object with ``batch(overrides)``
(``launch.sweep.Sweep``), so that this file knows neither Ray nor Sundog.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SundogLauncherConf:
    _target_: str = "hydra_plugins.sundog_launcher.SundogLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="sundog", node=SundogLauncherConf, provider="sundog")


class Return(JobReturn):
    """One whose failure is raised without a word: who runs the batch tells of it."""

    @property
    def return_value(self) -> Any:
        if self.status is JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class SundogLauncher(Launcher):
    """Hands every batch to the task function. A failed job is a failed ``JobReturn``: the others run all the same."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._sweep: Any = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        returns = []
        for overrides, outcome in zip(job_overrides, self._sweep.batch(job_overrides), strict=True):
            done = Return(overrides=overrides)
            failed = isinstance(outcome, Exception)
            done.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
            done.return_value = outcome
            returns.append(done)
        return returns
