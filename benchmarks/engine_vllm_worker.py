"""Runs in vLLM's environment, started by engine_vllm.py: TASK.json in, ANSWER.json out. Imports nothing of ours."""

import json
import sys
from pathlib import Path


def main() -> None:
    import vllm

    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = vllm.LLM(
        model=task["target"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        kv_cache_memory_bytes=512 * 2**20,
        disable_log_stats=False,
        speculative_config={
            "method": "eagle3",
            "model": task["draft"],
            "num_speculative_tokens": task["num_speculative_tokens"],
        },
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=task["max_new_tokens"], ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in task["prompts"]], sampling)
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    drafts = counters["vllm:spec_decode_num_drafts"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    answer = {
        "vllm": vllm.__version__,
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "mean_acceptance_length": 1 + accepted / drafts,
    }
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
