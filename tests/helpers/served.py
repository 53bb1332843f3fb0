"""An application behind a real socket."""

import socket
import threading

import openai
import uvicorn
from fastapi import FastAPI


class Served:
    """An application on a port that the system chose."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self._socket = socket.create_server(("127.0.0.1", 0))  # accepts from now on
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="s3cret", max_retries=0, timeout=60)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._socket.close()
