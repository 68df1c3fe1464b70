"""llama.cpp through llama-cpp-python, over the GGUF file itself: plain, or with its prompt lookup."""

import time

import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

CONTEXT = 8192


def load(settings):
    lookup = settings["variant"] == "lookup"
    draft = LlamaPromptLookupDecoding(num_pred_tokens=settings["depth"], max_ngram_size=3) if lookup else None
    model = Llama(
        settings["model"],
        n_ctx=CONTEXT,
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        n_gpu_layers=-1 if settings["device"].startswith("cuda") else 0,
        logits_all=lookup,  # verification reads the logits of every drafted token
        draft_model=draft,
        verbose=False,
    )

    def answer(prompt, max_new_tokens, temperature, seed):
        if len(prompt) + max_new_tokens > CONTEXT:
            raise ValueError(f"the prompt has {len(prompt)} tokens, but this peer's context is {CONTEXT}")
        model.reset()  # nothing of the prompt may be known from the answer before
        model.set_seed(seed)
        token_ids, first = [], None
        began = time.perf_counter()
        for token in model.generate(prompt, top_k=0, top_p=1.0, min_p=0.0, temp=temperature, repeat_penalty=1.0):
            token_ids.append(token)
            first = first or time.perf_counter()
            if token == model.token_eos() or len(token_ids) == max_new_tokens:
                break
        return {
            "token_ids": token_ids,
            "wall_seconds": time.perf_counter() - began,
            "prefill_seconds": (first or began) - began,
        }

    return {"llama-cpp-python": llama_cpp.__version__}, answer
