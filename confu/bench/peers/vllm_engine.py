"""vLLM: plain, with its n-gram drafts, or with an EAGLE-3 draft exported for it (a chain; vLLM drafts no trees)."""

import os
import time

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else it keeps one core for itself, whatever it is told

import vllm
from vllm import LLM, SamplingParams


def load(settings):
    drafts = {
        "plain": None,
        "lookup": {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1},
        "eagle3": {"method": "eagle3", "model": settings["model"]},
    }[settings["variant"]]
    engine = LLM(
        settings["target"],
        dtype=settings["dtype"],
        gpu_memory_utilization=0.25,  # of the CPU's memory, too: all engines of a run are loaded at once
        enable_prefix_caching=False,  # nothing of the prompt may be known from the answer before
        speculative_config=drafts and drafts | {"num_speculative_tokens": settings["depth"]},
    )

    def answer(prompt, max_new_tokens, temperature, seed):
        sampling = SamplingParams(temperature=temperature, max_tokens=max_new_tokens, seed=seed, detokenize=False)
        began = time.perf_counter()
        (result,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return {"token_ids": list(result.outputs[0].token_ids), "wall_seconds": time.perf_counter() - began}

    return {"vllm": vllm.__version__}, answer
