"""The methods of a text, made from what its request chose."""

from conf.errors import ConfigError
from inference.generation import Generation
from inference.methods import Methods
from inference.policies import POLICIES, CacheShape
from inference.prefill import PREFILLS, Surroundings
from models.spec import ModelSpec


def attach(generation: Generation, methods: Methods, spec: ModelSpec, around: Surroundings) -> None:
    """Give a text its key-value policy and its prefill strategy. Raises ConfigError for what the text cannot have."""
    if (methods.decode_layers or 0) > spec.layers:
        rule = f"must be at most the model's {spec.layers} layers"
        raise ConfigError("decode_layers", methods.decode_layers, rule, "lower it")
    if methods.kv_policy in POLICIES:
        shape, seed = CacheShape(spec.layers, spec.kv_heads, around.pool.page_tokens), generation.params.seed or 0
        policy = POLICIES[methods.kv_policy]
        generation.policy = policy(shape, methods.kv_budget or 1.0, generation.prompt_tokens, seed)
    if methods.prefill in PREFILLS:
        strategy = PREFILLS[methods.prefill]
        if strategy.skips_rows and generation.params.prompt_logprobs:
            rule = "does not compute every token of a prompt, so there are no log-probabilities of it"
            raise ConfigError("prefill", methods.prefill, rule, "prefill=full")
        generation.prefill = strategy(around, methods.prefill_budget or 1.0, generation.prompt_tokens)
