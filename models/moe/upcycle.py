"""Growing a trained model: more experts from one for each modality, auxiliary routers beside the trained ones."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from conf.errors import ConfigError
from models.decoder import Decoder
from models.moe.layer import ExpertLayer
from models.moe.router import Router
from models.spec import ExpertSpec


def upcycle(seed: Decoder, experts: ExpertSpec, random_seed: int) -> Decoder:
    """A model whose experts are copies of the seed's only expert of their modality, or of its dense layers.

    Routers are new (MoMa, section 2.5). Every expert takes every token and a token's gates sum to one, so the model
    computes what the seed does; :func:`anneal` leads from there to the capacity and the gates of ``experts``.

    Raises:
        ConfigError: the seed has several experts in a group, or other groups.
    """
    groups = seed.spec.experts.groups
    if max(groups, default=1) > 1 or (groups and len(groups) != len(experts.groups)):
        raise ConfigError(
            "model.experts.groups",
            list(experts.groups),
            f"they are copied from dense layers, or from one for each of the same groups; the seed has {list(groups)}",
            "start from a model of experts=moe_1t1i, or from a dense one",
        )
    model = Decoder(replace(seed.spec, experts=experts)).initialise(random_seed)
    _load(model, seed, _copies(seed, model))
    for router in expert_routers(model):
        if router.routing == "expert_choice":
            router.threshold.zero_()
    anneal(model, 0.0)
    return model


def anneal(model: Decoder, progress: float) -> None:
    """Between upcycling (``progress`` 0: all experts for every token, even gates) and the model's own routing (1)."""
    active, most = model.spec.experts.active, max(model.spec.experts.groups)
    for router in expert_routers(model):
        router.active = active + (most - active) * (1.0 - progress)
        router.evenness = 1.0 - progress


def add_auxiliary(model: Decoder, random_seed: int) -> Decoder:
    """The same model with auxiliary routers, which are new, as its causal choice."""
    grown = Decoder(replace(model.spec, experts=replace(model.spec.experts, causal="auxiliary"))).initialise(
        random_seed
    )
    _load(grown, model, {})
    return grown


def expert_routers(model: Decoder) -> list[Router]:
    """The routers of the experts, without those of mixture of depths."""
    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    return [layer.router for layer in layers if layer.router is not None]


@torch.no_grad()
def _load(model: Decoder, source: Decoder, more: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    kept = {name: value for name, value in source.state_dict().items() if name in own}
    model.load_state_dict({**own, **kept, **more})


def _copies(seed: Decoder, model: Decoder) -> dict[str, Tensor]:
    """The experts' weights by the model's names."""
    state, dense = seed.state_dict(), not seed.spec.experts.groups
    found = {}
    for name, own in model.state_dict().items():
        layer, _, rest = name.partition(".mlp.experts.")
        if not rest:
            continue
        if dense and rest.endswith("gate_up"):
            one = torch.cat([state[f"{layer}.mlp.{half}.weight"] for half in ("gate", "up")])[None]
        elif dense:
            one = state[f"{layer}.mlp.down.weight"][None]
        else:
            one = state[name]
        found[name] = one.expand_as(own).clone()
    return found
