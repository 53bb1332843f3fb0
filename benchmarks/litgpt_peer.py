"""LitGPT's pretraining loop as a peer of ``benchmarks.training``; not among the locked packages.

    pip install --no-deps litgpt lightning lightning-utilities torchmetrics pytorch-lightning
    pip install jsonargparse typeshed_client docstring-parser

into an environment of one's own: LitGPT pins older releases of packages that its loop does not need.
"""

import importlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.beside import Beside
from conf.schema import RunConfig
from models.decoder import Decoder
from models.hf_names import hf_names


class _Batches:
    """Batches of windows with a label more than tokens, as the loop wants them; -100 where there is none."""

    def __init__(self, windows: Sequence[tuple[Tensor, Tensor]], batch: int, beside: Beside) -> None:
        rows = torch.stack([tokens for tokens, _ in windows])  # its labels are the same tokens
        rows = torch.nn.functional.pad(rows, (0, 1), value=-100)
        self._batches, self._beside = rows.split(batch), beside

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        self._beside.begin()
        for index, rows in enumerate(self._batches):
            if index:
                self._beside.turn()
            yield rows
        self._beside.turn()


def _model(model: Decoder, context: int) -> Any:
    spec = model.spec
    config = importlib.import_module("litgpt.config").Config(
        block_size=context,
        padded_vocab_size=spec.vocab_size,
        n_layer=spec.layers,
        n_head=spec.heads,
        n_query_groups=spec.kv_heads,
        n_embd=spec.dim,
        head_size=spec.head_dim,
        intermediate_size=spec.ffn_dim,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=spec.norm_eps,
        mlp_class_name="LLaMAMLP",
        rope_base=int(spec.rope.theta),
    )
    peer = importlib.import_module("litgpt.model").GPT(config)
    own, state = model.state_dict(), {}
    weights = {hf: own[name].clone() for name, hf in hf_names(spec).items()}
    importlib.import_module("litgpt.scripts.convert_hf_checkpoint").copy_weights_hf_llama(config, {}, state, weights)
    peer.load_state_dict(state)
    if spec.tie_embeddings:
        peer.lm_head.weight = peer.transformer.wte.weight
    return peer


class _Losses:
    """The loop's logger."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log_dict(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "loss" in metrics:
            self.losses.append(metrics["loss"])


def train(
    model: Decoder, config: RunConfig, windows: Sequence[tuple[Tensor, Tensor]], beside: Beside, folder: Path
) -> tuple[str, list[float]]:
    """Train a copy of ``model`` on the windows; returns the peer's name and the losses of its steps."""
    pretrain: Any = importlib.import_module("litgpt.pretrain")
    arguments: Any = importlib.import_module("litgpt.args")
    trainer, context = config.trainer, config.data.context
    fabric = importlib.import_module("lightning").Fabric(accelerator="cpu", devices=1, precision="32-true")
    losses = _Losses()
    fabric.print = lambda *_, **__: None
    fabric.log_dict = losses.log_dict
    peer = fabric.setup(_model(model, context))
    optimizer = torch.optim.AdamW(
        peer.parameters(), trainer.lr, (trainer.beta1, trainer.beta2), weight_decay=trainer.weight_decay, fused=True
    )
    optimizer = fabric.setup_optimizers(optimizer)
    state = {"model": peer, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
    steps = arguments.TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=trainer.batch,
        micro_batch_size=trainer.batch,
        max_tokens=trainer.steps * trainer.batch * context,
        max_norm=trainer.clip,
        lr_warmup_steps=0,
        min_lr=trainer.lr,
    )
    never = arguments.EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False)
    pretrain.validate = lambda *_, **__: None  # two steps to see that it works
    batches = _Batches(windows, trainer.batch, beside)
    pretrain.fit(fabric, 1, state, batches, None, folder, None, steps, never)
    return f"LitGPT {version('litgpt')}", losses.losses
