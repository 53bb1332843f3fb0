"""llama.cpp and vLLM as engines of the same weights, each in a process of its own with its own Python.

``Peer`` starts this file under the interpreter that has the peer, which it may import nothing else of. The two talk in
lines of JSON, which takes a fraction of a millisecond.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONTEXT = 4096
FTYPES = {"fp32": 0, "int8": 7, "int4": 3}  # llama.cpp's numbers: F32, Q8_0, Q4_1


class Peer:
    """One engine that answers prompts given as tokens, greedily."""

    def __init__(self, kind: str, python: Path, model: Path, threads: int, form: str = "fp32") -> None:
        names = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
        environment = {**os.environ, names[0]: str(threads), names[1]: f"0-{threads - 1}" if threads > 1 else "0"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        # -P: beside this file are modules of names that the peers import.
        command = [str(python), "-P", __file__, kind, str(model), str(threads), form]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._read()

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """The outputs of all prompts together."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([prompts, tokens]) + "\n")
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):  # engines print things of their own
                return json.loads(line[7:])
        raise RuntimeError(f"the peer ended with {self._process.wait()}")


class LlamaCpp:
    """llama.cpp by its C interface: sequences side by side in one batch. ``form`` is what the file is made into."""

    def __init__(self, model: str, threads: int, form: str) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._c = c = llama_cpp
        c.llama_backend_init()
        with tempfile.TemporaryDirectory() as scratch:
            wide = f"{scratch}/wide.gguf".encode()
            settings = c.llama_model_quantize_default_params()
            settings.ftype, settings.allow_requantize, settings.nthread = FTYPES[form], True, threads
            assert c.llama_model_quantize(model.encode(), wide, settings) == 0
            self._model = c.llama_model_load_from_file(wide, c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = 16, threads, threads
        settings.kv_unified, settings.type_k, settings.type_v = True, 0, 0  # 0: fp32
        self._context = c.llama_init_from_model(self._model, settings)
        self._vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._batch = c.llama_batch_init(CONTEXT, 0, 1)

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), False)
        rows = [(token, at, text) for text, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        outputs: list[list[int]] = [[] for _ in prompts]
        for _ in range(tokens):
            last = {text: row for row, (_, _, text) in enumerate(rows)}
            for row, (token, at, text) in enumerate(rows):
                self._batch.token[row], self._batch.pos[row] = token, at
                self._batch.n_seq_id[row], self._batch.seq_id[row][0] = 1, text
                self._batch.logits[row] = last[text] == row
            self._batch.n_tokens = len(rows)
            assert c.llama_decode(self._context, self._batch) == 0
            for text, row in last.items():
                outputs[text].append(self._likeliest(row))
            rows = [(out[-1], len(prompts[text]) + len(out) - 1, text) for text, out in enumerate(outputs)]
        return outputs

    def _likeliest(self, row: int) -> int:
        import numpy as np

        logits = self._c.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self._vocab,)).argmax())


class Vllm:
    """The CPU build of vLLM, in fp32, without its prefix cache."""

    def __init__(self, model: str, threads: int, form: str) -> None:
        import vllm  # pyright: ignore[reportMissingImports]

        del threads  # the environment says it
        assert form == "fp32"
        self._vllm = vllm
        self._model = vllm.LLM(
            model, dtype="float32", max_model_len=CONTEXT, enforce_eager=True, enable_prefix_caching=False, seed=0
        )

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = self._vllm.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(found.outputs[0].token_ids) for found in self._model.generate(given, params, use_tqdm=False)]


def main() -> None:
    kind, model, threads, form = sys.argv[1:]
    engine = {"llama.cpp": LlamaCpp, "vLLM": Vllm}[kind](model, int(threads), form)
    print("ANSWER true", flush=True)
    for line in sys.stdin:
        prompts, tokens = json.loads(line)
        print("ANSWER " + json.dumps(engine(prompts, tokens)), flush=True)


if __name__ == "__main__":
    main()
