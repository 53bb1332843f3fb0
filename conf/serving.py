"""The typed schema of inference: the engine, generation from prompts and the HTTP server."""

from dataclasses import dataclass, field

from conf import methods
from conf.errors import ConfigError

FORMS = ("fp32", "bf16", "int8", "int4")  # of an engine's weights
CHOICES = {f"{command}.engine.dtype": FORMS for command in methods.COMMANDS} | methods.CHOICES


@dataclass
class EngineConfig:
    """How a model is run for generation."""

    dtype: str = "fp32"  # of the weights; int8 and int4 are weight-only
    pack: bool = True  # fp32 weights in oneDNN's layout: on AMD processors only there, elsewhere a second copy
    kv_tokens: int = 0  # tokens that the key-value cache holds; 0: by memory, at most what all running texts can need
    page_tokens: int = 16  # tokens in a page of the cache on each rank
    step_tokens: int = 512  # rows of one forward pass, for each rank
    mixed_tokens: int = 64  # the most prompt rows in a pass that also continues texts
    mixed_slowdown: float = 1.75  # as many of them as make such a pass this many times longer; 0: always the most
    prefix_cache: bool = True  # requests that begin alike share pages
    draft_tokens: int = 0  # the most drafted tokens in a pass; 0: no drafting
    drafter: str = "ngram"  # where drafts come from
    draft_model: str = ""  # folder of a small model of the same vocabulary, for dynamic_tree and spectr
    decode_layers: int = 0  # layers that compute the last token of an output, all the first; 0: always all
    kv_policy: str = "full"  # which tokens are kept or read; all but full are lossy
    kv_budget: float = 0.25  # share of a text's tokens that a policy keeps or reads
    prefill: str = "full"  # how prompts are computed; all but full are lossy
    prefill_budget: float = 0.2  # share of the prompt that a lossy way of computing it works on
    ranks: int = 1  # processes over which long prompts and the cache are split


@dataclass
class GenerateConfig:
    """Continuation of a prompt."""

    model: str = "${export.dir}"  # Hugging Face folder
    max_tokens: int = 64
    temperature: float = 0.8  # 0: greedy
    top_p: float = 0.95
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class ServeConfig:
    """The HTTP server. A bearer token is read from the environment variable SUNDOG_API_TOKEN."""

    model: str = "${export.dir}"
    model_name: str = "${name}"
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1  # each of engine.ranks processes
    max_replicas: int = 0  # as many under load; 0: always ``replicas``
    max_concurrent: int = 8  # texts that a replica works on at once
    max_queue: int = 64  # texts that wait; more are answered 429
    max_queue_tokens: int = 262_144  # prompt tokens that wait; more are answered 429
    max_body_bytes: int = 4_000_000
    max_tokens: int = 1024  # the most that one request may ask for
    drain_sec: float = 20.0  # time for running requests to finish when the server stops
    engine: EngineConfig = field(default_factory=EngineConfig)


def check_serving(serve: ServeConfig) -> None:
    """Raise ConfigError for settings that do not fit together."""
    if not 0 < serve.port < 65536:
        raise ConfigError("serve.port", serve.port, "a TCP port from 1 to 65535", "serve.port=8000")
    if serve.max_replicas and serve.max_replicas < serve.replicas:
        rule = f"0, or at least serve.replicas = {serve.replicas}"
        raise ConfigError("serve.max_replicas", serve.max_replicas, rule, "serve.max_replicas=0")
