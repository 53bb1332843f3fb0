"""The names of the inference methods that an engine or a request may choose; what they do is in ``inference``."""

COMMANDS = ("generate", "serve", "evaluate")  # those that run an engine
KV_POLICIES = ("full", "sinks_recency", "h2o", "keyformer", "ems", "token_select", "squeezed")
PREFILLS = ("full", "cache_blend", "lazy_llm", "minference")
DRAFTERS = ("ngram", "token_recycling", "trie", "dynamic_tree", "spectr")
CHOICES = {
    f"{command}.engine.{key}": names
    for command in COMMANDS
    for key, names in (("kv_policy", KV_POLICIES), ("prefill", PREFILLS), ("drafter", DRAFTERS))
}
