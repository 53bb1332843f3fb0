"""Text generation: sampling, the engine and the OpenAI-compatible server."""
