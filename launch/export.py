"""``sundog export``: a checkpoint as a Hugging Face folder that any Llama runtime loads."""

from conf.errors import EXIT_DONE
from conf.schema import RunConfig
from trainers.export import export


def main(name: str, config: RunConfig) -> int:
    folder = export(config)
    print(f"export: {folder} (safetensors, config, tokenizer)")
    return EXIT_DONE
