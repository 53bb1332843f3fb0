"""Distributed checkpoints: every rank writes its part, any number of ranks under any sharding reads it back.

The tensors (parameters and AdamW moments by fully qualified name) go through torch's distributed checkpoint (DCP).
Only tensors are stored there and its index is read by an unpickler that knows nothing but DCP's own record types, so
that a checkpoint cannot run code. Everything else is in state.json. The protocol on disk is that of
``trainers.checkpoint_folder``. The folder must be shared by all ranks' machines.
"""

import io
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from conf.errors import DataError, ResourceError
from data.files import fsync_folder, write_atomic
from parallel.zero import ZeroModel
from trainers.checkpoint_folder import (
    STATE,
    TEMPORARY,
    complete_checkpoints,
    damage,
    digests,
    mark_complete,
    newest_complete,
    quarantine,
    read_state,
    remove,
    retain,
    step_folder,
)

__all__ = ["Checkpoints", "load_weights", "newest_complete"]

_MODEL, _OPTIMIZER = "model.", "optimizer."
_INDEX_TYPES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        value = None
        if (module, name) in _INDEX_TYPES or module == "torch":
            value = super().find_class(module, name)
        if value is None or (module == "torch" and name != "Size" and not isinstance(value, torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")
        return value


class _Reader(FileSystemReader):
    """DCP's reader, without its trust in the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = _IndexUnpickler(io.BytesIO(file.read_bytes())).load()
        except pickle.UnpicklingError as error:
            raise DataError(str(file), str(error), "the index of a checkpoint", "use another checkpoint") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors of a training state by name; writing into them changes copies or views, see ``restore``."""
    weights = get_model_state_dict(model)  # first: under FSDP2 this shards again what an evaluation left gathered
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return _named(weights, get_optimizer_state_dict(model, optimizer, options=options))


def _named(weights: dict[str, Any], moments: dict[str, Any]) -> dict[str, Any]:
    named = {_MODEL + name: value for name, value in weights.items()}
    named |= {_OPTIMIZER + name: value for name, value in moments.items()}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, used by all ranks together.

    ``group`` is a process group over all ranks whose timeout leaves room for file systems (gloo also where training
    uses NCCL); ``log`` gets a line for a person, on rank 0.
    """

    folder: Path
    keep: int
    group: dist.ProcessGroup
    log: Callable[[str], None]

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def snapshot(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return copies in CPU memory of this rank's share of the tensors of a training state by name. Collective.

        What every rank holds whole is shared out, largest first.
        """
        if isinstance(model, ZeroModel):
            return _named(*model.gather())
        named = _tensors(model, optimizer)
        whole = sorted(name for name, value in named.items() if not isinstance(value, DTensor))
        whole.sort(key=lambda name: -named[name].numel())
        others = set(whole) - set(whole[self.rank :: dist.get_world_size(self.group)])
        return {n: value.detach().to("cpu", copy=True) for n, value in named.items() if n not in others}

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any], first: Callable[[], None] = lambda: None) -> Path:
        """Write the checkpoint after ``state["step"]`` optimizer steps and drop those beyond ``keep``. Collective.

        ``tensors`` are all ranks' :meth:`snapshot`; ``first`` makes durable what the checkpoint presumes.

        Raises:
            ResourceError: a rank could not write (on all ranks); older checkpoints are untouched.
        """
        final = step_folder(self.folder, int(state["step"]))
        beside = final.with_name(final.name + TEMPORARY)
        self._together(first, final)
        self._together(lambda: self._prepare(beside), final)
        self._together(lambda: self._write_tensors(tensors, beside), final)
        own = self._together(lambda: digests(sorted(beside.glob(f"__{self.rank}_*.distcp"))), final)
        files = {name: entry for part in own for name, entry in part.items()}
        self._together(lambda: self._commit(beside, final, state, files), final)
        return final

    def _prepare(self, beside: Path) -> None:
        if self.rank == 0:
            if beside.exists():
                shutil.rmtree(beside)
            beside.mkdir(parents=True)

    def _write_tensors(self, tensors: dict[str, Tensor], beside: Path) -> None:
        writer = FileSystemWriter(beside, single_file_per_rank=True, sync_files=True)
        save(tensors, storage_writer=writer, process_group=self.group)

    def _commit(self, beside: Path, final: Path, state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
        if self.rank != 0:
            return
        write_atomic(beside / STATE, json.dumps(state, indent=1, sort_keys=True) + "\n")
        files = files | digests([beside / STATE, beside / ".metadata"])
        fsync_folder(beside)
        if final.exists():
            remove(final)
        beside.rename(final)
        fsync_folder(self.folder)
        mark_complete(final, files)
        retain(self.folder, self.keep)

    def _together(self, work: Callable[[], Any], final: Path) -> list[Any]:
        """Do ``work`` on every rank and return all results; a failure of one becomes the same error on all."""
        result, error = None, ""
        try:
            result = work()
        except (OSError, ResourceError, DataError, CheckpointException) as failure:
            error = f"rank {self.rank}: {_reason(failure)}"
        outcomes: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(outcomes, (error, result), group=self.group)
        first = next((failed for failed, _ in outcomes if failed), "")
        if first:
            raise ResourceError(
                "run_dir", str(final), f"the checkpoint must be written: {first}", "free disk space, or another run_dir"
            )
        return [each for _, each in outcomes]

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Load the newest checkpoint whose files are intact and return its state; None where there is none. Collective.

        A damaged newer one is reported and moved aside.

        Raises:
            DataError: checkpoints exist and all are damaged, or the newest intact one has another ``identity``.
        """
        candidates: list[Any] = [complete_checkpoints(self.folder) if self.rank == 0 else None]
        dist.broadcast_object_list(candidates, group_src=0, group=self.group)
        damaged: list[tuple[Path, str]] = []
        for path in candidates[0]:
            reason = self._damage(path)
            if reason:
                self._say(f"checkpoint {path} is damaged: {reason}")
                damaged.append((path, reason))
                continue
            state = read_state(path)
            check_identity(path, state.get("identity", {}), identity)
            self._read_tensors(model, optimizer, path)
            dist.barrier(group=self.group)
            for bad, _ in damaged if self.rank == 0 else []:
                self._say(f"moved the damaged checkpoint to {quarantine(bad)}; resuming from {path.name}")
            return state
        if damaged:
            listed = "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
            raise DataError(
                str(self.folder),
                f"{len(damaged)} checkpoints",
                f"a run that has checkpoints never silently starts again from step 0, and none is readable ({listed})",
                "restore the files from a backup, or remove the folder to start anew, or choose another run_dir",
            )
        return None

    def _damage(self, path: Path) -> str:
        world = dist.get_world_size(self.group)
        reasons: list[Any] = [None] * world
        dist.all_gather_object(reasons, damage(path, self.rank, world), group=self.group)
        return next((reason for reason in reasons if reason), "")

    def _read_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
        zero = isinstance(model, ZeroModel)
        tensors = _named(*model.empty()) if zero else _tensors(model, optimizer)
        try:
            load(tensors, storage_reader=_Reader(path), process_group=self.group)
        except CheckpointException as failure:  # not an Exception: it would pass every handler above
            raise DataError(str(path), _reason(failure), "a checkpoint of this program", "use another one") from failure
        weights = {name.removeprefix(_MODEL): value for name, value in tensors.items() if name.startswith(_MODEL)}
        read = {n.removeprefix(_OPTIMIZER): value for n, value in tensors.items() if n.startswith(_OPTIMIZER)}
        if zero:
            model.scatter(weights, read, self.group)
            return
        set_model_state_dict(model, weights)
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        moments = get_optimizer_state_dict(model, optimizer, options=options)  # with this run's hyperparameters
        set_optimizer_state_dict(model, optimizer, moments | read, options=options)

    def _say(self, message: str) -> None:
        if self.rank == 0:
            self.log(message)


def _reason(failure: BaseException) -> str:
    """One line on what failed; DCP wraps the ranks' exceptions."""
    if isinstance(failure, CheckpointException):
        return "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in sorted(failure.failures.items()))
    return " ".join(str(failure).split())


def check_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare what a checkpoint was trained with (model, tokenizer, data) with what this run asks for.

    Raises:
        DataError: they differ; names the part and both values.
    """
    for part in sorted(expected):
        if found.get(part) != expected[part]:
            raise DataError(
                str(path),
                f"{part} {_difference(found.get(part), expected[part])}",
                f"a run resumes with the {part} that its checkpoint was trained with; the checkpoint's is named first",
                "go back to the old settings, or choose another run_dir (trainer.init_from starts from old weights)",
            )


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in sorted(found.keys() | expected.keys()) if found.get(key) != expected.get(key)]
        return ", ".join(f"{key}: {found.get(key)} != {expected.get(key)}" for key in keys)
    return f"{found} != {expected}"


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the full parameters of a checkpoint by name, without any process group.

    Raises:
        DataError: the checkpoint is incomplete or damaged.
    """
    reason = damage(path)
    if reason:
        raise DataError(str(path), "", f"a checkpoint that is complete: {reason}", "use another one (export.step=N)")
    reader = _Reader(path)
    weights: dict[str, Any] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata):
            weights[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no process group is what is asked for
        load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix(_MODEL): value for name, value in weights.items()}
