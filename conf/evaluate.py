"""The typed schema of `sundog evaluate`: which tasks a model folder is judged by."""

from dataclasses import dataclass, field

from conf.errors import ConfigError
from conf.serving import EngineConfig

TASKS = ("needle", "thread_forward", "thread_backward", "perplexity", "automata", "harness")


@dataclass
class EvaluateConfig:
    """Long context, judged. Everything but the text of ``perplexity`` is synthetic."""

    model: str = "${export.dir}"  # Hugging Face folder
    output: str = "${run_dir}/evaluation.json"  # where `sundog report` looks for it
    tasks: list[str] = field(default_factory=lambda: ["needle", "thread_forward", "thread_backward", "automata"])
    lengths: list[int] = field(default_factory=lambda: [256, 1024])  # words of a haystack
    samples: int = 20  # questions of each length
    pairs: int = 20  # of a key and a value in a haystack
    hops: int = 3  # links of a thread
    strings: int = 20  # that an automaton has shown before it is judged
    text: str = ""  # file whose perplexity is measured
    window: int = 1024  # tokens of it that are read at once
    windows: int = 8
    harness: str = ""  # folder of lm-evaluation-harness tasks as YAML files, ``samples`` documents of each
    policies: list[str] = field(
        default_factory=list
    )  # kv_policy:kv_budget or prefill:prefill_budget, beside full attention
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)


def check_evaluation(config: EvaluateConfig) -> None:
    """Raises ConfigError for tasks that are unknown or lack what they need, and for sizes that cannot be."""
    for task in config.tasks:
        if task not in TASKS:
            raise ConfigError("evaluate.tasks", task, f"the tasks are {', '.join(TASKS)}", "choose among them")
    if "perplexity" in config.tasks and not config.text:
        raise ConfigError("evaluate.text", "", "perplexity needs a text", "evaluate.text=FILE, or drop the task")
    if "harness" in config.tasks and not config.harness:
        raise ConfigError("evaluate.harness", "", "harness needs tasks", "evaluate.harness=FOLDER, or drop the task")
    least = {"samples": 1, "pairs": 4, "hops": 2, "strings": 2, "window": 2, "windows": 1}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise ConfigError(f"evaluate.{name}", getattr(config, name), f"must be at least {low}", "raise it")
    room = 2 * (config.pairs + 3 * config.hops)
    for length in config.lengths:
        if length < room or config.pairs > 100:
            rule = f"must hold {config.pairs} pairs (at most 100) and their threads: {room} words at least"
            raise ConfigError("evaluate.lengths", length, rule, "longer haystacks or fewer pairs")
