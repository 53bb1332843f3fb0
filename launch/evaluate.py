"""``sundog evaluate``: judge a model folder on long contexts; results as JSON, in the tracker and in the report."""

import json
from pathlib import Path

from conf.errors import EXIT_DONE
from conf.evaluate import check_evaluation
from conf.schema import RunConfig
from data.files import write_atomic


def main(name: str, config: RunConfig) -> int:
    check_evaluation(config.evaluate)

    # Torch loads here, after every mistake that can be answered without it.
    from inference.evaluation import evaluate
    from trainers.tracking import log_evaluation

    results = evaluate(config.evaluate, lambda line: print(line, flush=True))
    path = Path(config.evaluate.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"model": config.evaluate.model, "results": results}, indent=1) + "\n")
    flat = {
        f"evaluate/{policy}/{task}/{figure}": value
        for policy, tasks in results.items()
        for task, found in tasks.items()
        for figure, value in found.items()
    }
    log_evaluation(config, flat, print)
    print(f"evaluate: {path}")
    return EXIT_DONE
