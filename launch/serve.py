"""``sundog serve``: an exported model behind the OpenAI API, on Ray Serve, until a signal stops it."""

from pathlib import Path

from cluster.connection import connect
from cluster.serving import serve_until, serving
from conf.errors import EXIT_DONE, DataError
from conf.schema import RunConfig
from launch.signals import stop_requests

APP, FOLLOWER = "inference.server:build_app", "inference.ranks:follow"


def check_model(folder: str) -> None:
    """Refuse a folder that holds no model before Ray starts."""
    path = Path(folder)
    if not ((path / "config.json").exists() or path.suffix == ".gguf" or any(path.glob("*.gguf"))):
        rule = "a Hugging Face folder with config.json and safetensors, or a GGUF file"
        raise DataError("serve.model", folder, rule, "sundog export, or serve.model=FOLDER")


def main(name: str, config: RunConfig) -> int:
    check_model(config.serve.model)
    with (
        stop_requests() as stops,
        connect(config.cluster) as connection,
        serving(config.serve, APP, follower=FOLLOWER, cluster_ends=connection.local) as url,
    ):
        print(f"serving {config.serve.model_name} at {url}/v1  (Ctrl-C stops)")
        print(f"try:    curl {url}/v1/completions -H 'content-type: application/json' \\")
        print(
            f'          -d \'{{"model": "{config.serve.model_name}", "prompt": "def ", "max_tokens": 32}}\'', flush=True
        )
        serve_until(lambda: len(stops))
    print("stopped")
    return EXIT_DONE
