"""Measure how fast decoding is on this machine's CPU, part by part.

    python benchmarks/speed.py --out benchmarks/results/speed/NAME
    python benchmarks/speed.py --out benchmarks/results/speed/NAME --parts forward,prefix --repeats 9

forward   a verification forward by its rows: packed, without the blocks of its GGUF file if it has some, in int8, by
          the model's own code; and its products alone
plain     tokens per second without a draft: `model.generate` of transformers, and our decoder in the same ways
prefix    a round, of a tree and of one row, and the bytes of the cache, by the tokens before it
batch     tokens per second of plain decoding and of drafts, by batch and tree; trees of a fixed shape and adaptive ones
memory    peak of a fresh process that loads a draft with its target and answers, beside its weights and caches
busy      tokens per second of fresh processes beside other work, by how long OpenMP's threads spin before they sleep
quality   perplexity of the target on the repository's own pages, by dtype, with and without int8

What is compared takes turns within one run. The rows of a part are appended to OUT/rows.jsonl when the part is done,
with all measured seconds, and a part that has rows there is not run again; OUT/run.json says how and on what each part
was made. `table.py` renders both. Threads are torch's: set OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig
from unblocked import unblock

from confu.cache import KVCache
from confu.config import SamplingConfig, TreeConfig
from confu.drafter import TreeDrafter
from confu.forward import ModelForward
from confu.generate import PREFILL_CHUNK, Decoder, Session
from confu.info import checkout, environment
from confu.llama import LlamaForward
from confu.load import encode_chat, find_dtype, join, load_decoder, pack, read_network
from confu.lossless import PROMPTS
from confu.memory import forget_peak, peak_bytes
from confu.models import DEFAULT_TARGET, ModelUnavailable, load_target_model
from confu.stats import Stats
from confu.target import Target
from confu.tree import chain
from confu.tune import TREES, measure

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
DRAFTS = ("smollm2-135m-eagle3", "smollm2-135m-confu")
CPU = torch.device("cpu")
PREFIX = 256  # tokens before the forwards of `forward`
TREE_NODES = 16  # of the tree of `prefix`
WINDOW, MOST_WINDOWS = 512, 20
SPINS, OTHERS = (300_000, 20_000, 10_000, 5_000, 1_000), (0, 1, 2)  # the first is OpenMP's own; processes of other work
FORWARDS = 5  # times as many repeats of single forwards, which are short


@dataclass(frozen=True)
class Models:
    """The target in every form that is compared, each loaded when it is first asked for."""

    args: argparse.Namespace

    @cached_property
    def packed(self) -> Decoder:
        return self.load(self.args.dtype)

    @cached_property
    def laid_out(self) -> dict[str, Decoder]:
        """Packed, without the blocks of its GGUF file if that kept it in some, and rounded to int8."""
        found = {"packed": self.packed}
        if getattr(self.packed.target.forward_rows, "in_blocks", False):
            model, tokenizer = load_target_model(self.args.target, dtype=torch.bfloat16, device="cpu")
            unblock(model)
            found["unblocked"] = join(None, None, model, pack(model), tokenizer)
        return found | {"int8": self.load(self.args.dtype, "int8")}

    def load(self, dtype: str, quantization: str | None = None) -> Decoder:
        return load_decoder(None, target=self.args.target, dtype=dtype, device="cpu", quantization=quantization)

    @cached_property
    def own(self) -> Decoder:
        """By the model's own code. Packing would have emptied the model, so this is a second one."""
        dtype = find_dtype(self.args.dtype, "cpu")
        model, tokenizer = load_target_model(self.args.target, dtype=dtype, device="cpu")
        return join(None, None, model, ModelForward(model), tokenizer)

    @cached_property
    def prompts(self) -> dict[str, list[int]]:
        """Token ids of the built-in prompts."""
        lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()[: self.args.prompts]]
        chats = {line["name"]: [{"role": "user", "content": line["prompt"]}] for line in lines}
        found = {name: encode_chat(self.packed.tokenizer, chat) for name, chat in chats.items()}
        room = self.packed.target.max_positions - max(map(len, found.values()))
        if self.args.new_tokens > room:
            raise ValueError(f"--new-tokens {self.args.new_tokens} leaves the context; give at most {room}.")
        return found


def alternate(cases: dict[Any, Callable[[int], object]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of every case, ``repeats`` times over. They take turns, and who begins moves on, so that a machine that
    drifts treats all alike. Each is called with the number of the repeat, and once before, unmeasured."""
    names, seconds = list(cases), {name: [] for name in cases}
    for case in cases.values():
        case(0)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            cases[name](repeat)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def forward(models: Models, args: argparse.Namespace) -> Iterator[Row]:
    packed = models.packed.target.forward_rows
    if not isinstance(packed, LlamaForward):
        raise ValueError(f"Part forward knows the products of Llama-like targets only; leave it out for {args.target}.")
    targets = {case: decoder.target for case, decoder in (models.laid_out | {"model": models.own}).items()}
    prefix = min(PREFIX, targets["packed"].max_positions - max(args.rows))
    caches = {name: target.new_cache(1, prefix + max(args.rows)) for name, target in targets.items()}
    for name, target in targets.items():
        fill(target, caches[name], prefix)
    for rows in args.rows:
        cases = {name: verifying(target, caches[name], rows) for name, target in targets.items()}
        cases["products"] = products_of(packed, rows)
        for case, seconds in alternate(cases, FORWARDS * args.repeats).items():
            yield {"rows": rows, "prefix": prefix, "case": case, "seconds": seconds}


def plain(models: Models, args: argparse.Namespace) -> Iterator[Row]:
    model: Any = models.own.target.model
    model.generation_config = GenerationConfig(max_new_tokens=args.new_tokens, do_sample=False)  # no token ends early

    def generate(ids: list[int], repeat: int) -> None:
        tokens = torch.tensor([ids])
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens))
        assert out.shape[1] == len(ids) + args.new_tokens

    ours = {"model": models.own} | models.laid_out
    for name, ids in models.prompts.items():
        cases: dict[str, Callable[[int], object]] = {"transformers": partial(generate, ids)}
        cases |= {case: partial(answer, decoder, [ids], args.new_tokens) for case, decoder in ours.items()}
        for case, seconds in alternate(cases, args.repeats).items():
            yield {"prompt": name, "case": case, "num_tokens": args.new_tokens, "seconds": seconds}


def prefix(models: Models, args: argparse.Namespace) -> Iterator[Row]:
    target = models.packed.target
    longest = target.max_positions - TREE_NODES
    lengths = sorted({min(length, longest) for length in args.prefixes})
    cache = target.new_cache(1, max(lengths) + TREE_NODES)
    for length in lengths:
        fill(target, cache, length)
        num_bytes = (cache.keys.nbytes + cache.values.nbytes) * length // cache.capacity
        cases = {nodes: verifying(target, cache, nodes) for nodes in (TREE_NODES, 1)}
        for nodes, seconds in alternate(cases, FORWARDS * args.repeats).items():
            yield {"prefix": length, "nodes": nodes, "cache_bytes": num_bytes, "seconds": seconds}


def batch(models: Models, args: argparse.Namespace) -> Iterator[Row]:
    plain, decoders = models.packed, {("plain", None, False): models.packed}
    for name, path in args.drafts.items():
        network = read_network(path, plain.target.dtype, "cpu")
        drafted = join(path, network, plain.target.model, plain.target.forward_rows, plain.tokenizer)
        for nodes, depth in args.trees:
            tree = TreeConfig(nodes=nodes, depth=depth, topk=min(nodes, 10), contemplate=args.contemplate)
            decoders[name, tree, False] = Decoder(drafted.target, drafted.drafter, drafted.tokenizer, tree)
        if isinstance(drafted.drafter, TreeDrafter):
            tree = dataclasses.replace(TREES[0], contemplate=args.contemplate)
            costs = measure(drafted, drafted.drafter, {tree.topk})[tree.topk]
            decoders[name, tree, True] = Decoder(drafted.target, drafted.drafter, drafted.tokenizer, tree, costs)
    prompts, stats = list(models.prompts.values()), {}

    def run(case: Any, size: int, repeat: int) -> None:
        mine = [prompts[(repeat * size + i) % len(prompts)] for i in range(size)]  # others every time
        stats[case, size, repeat] = answer(decoders[case], mine, args.new_tokens)

    for size in args.batches:
        measured = alternate({case: partial(run, case, size) for case in decoders}, args.repeats)
        for (name, tree, adaptive), seconds in measured.items():
            mine = [stats[(name, tree, adaptive), size, i] for i in range(args.repeats)]
            whole = Stats(round_lengths=[rounds for one in mine for rounds in one.round_lengths])
            drafted_nodes = sum(one.num_draft_tokens for one in mine) / max(1, whole.num_rounds)
            shape = {"nodes": tree.nodes, "depth": tree.depth, "topk": tree.topk, "adaptive": adaptive} if tree else {}
            row = {"batch": size, "case": name, **shape, "num_tokens": size * args.new_tokens}
            row |= {"tau": whole.mean_acceptance_length, "nodes_per_round": 1 + drafted_nodes}
            yield row | {"seconds": seconds}


def memory(models: Models, args: argparse.Namespace) -> Iterator[Row]:
    target = models.own.target
    for name, path in args.drafts.items():
        network = read_network(path, target.dtype, "cpu")
        weights = [*target.model.parameters(), *(network.parameters() if network else ())]
        command = [sys.executable, __file__, "--out", args.out, "--target", args.target, "--dtype", args.dtype,
                   "--new-tokens", str(args.new_tokens), "--alone", path]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"The process that loads {name} by itself failed: {done.stderr.strip()[-500:]}")
        yield {"case": name, "weight_bytes": sum(w.nbytes for w in weights), **json.loads(done.stdout)}


def alone(args: argparse.Namespace) -> Row:
    """What a process that does nothing else takes. All that loading imports is there before it begins."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    forget_peak(CPU)
    before = peak_bytes(CPU)  # from here on the peak is what is resident now
    decoder = load_decoder(args.alone, target=args.target, dtype=args.dtype, device="cpu")
    session, prompt = Session(), [token % decoder.target.vocab_size for token in range(2, 66)]
    decoder.generate([prompt], SamplingConfig(max_new_tokens=args.new_tokens, ignore_eos=True), session=session)
    caches = [getattr(held, "cache", held) for held in (session.cache, session.state) if held is not None]
    held = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches if hasattr(cache, "keys"))
    return {"before_bytes": before, "peak_bytes": peak_bytes(CPU), "cache_bytes": held}


def busy(models: Models, args: argparse.Namespace) -> Iterator[Row]:
    path = next(iter(args.drafts.values()))
    command = [sys.executable, __file__, "--out", args.out, "--target", args.target, "--dtype", args.dtype,
               "--new-tokens", str(args.new_tokens), "--answering", path]  # fmt: skip
    found: dict[tuple[str, int, int], list[float]] = {}
    for repeat, spin, others in itertools.product(range(args.repeats), SPINS, OTHERS):
        work = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
        try:
            environment = os.environ | {"GOMP_SPINCOUNT": str(spin)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        finally:
            for process in work:
                process.kill()
                process.wait()
        if done.returncode != 0:
            raise ValueError(f"A process that answers beside others failed: {done.stderr.strip()[-500:]}")
        for case, seconds in json.loads(done.stdout).items():
            found.setdefault((case, spin, others), []).append(seconds)
        sys.stderr.write(f"repeat {repeat}, spin {spin}, {others} beside: {done.stdout}\n")
    for (case, spin, others), seconds in found.items():
        yield {"case": case, "spin": spin, "others": others, "num_tokens": args.new_tokens, "seconds": seconds}


def answering(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of an answer by plain decoding and by a draft, each behind one that warms up."""
    tree = TreeConfig(nodes=12, depth=4, topk=6, contemplate=0)
    drafted = load_decoder(args.answering, target=args.target, dtype=args.dtype, device="cpu", tree=tree)
    prompt = [token % drafted.target.vocab_size for token in range(2, 66)]
    seconds = {}
    for case, decoder in (("plain", Decoder(drafted.target, None, drafted.tokenizer)), ("draft", drafted)):
        answer(decoder, [prompt], 8)
        began = time.perf_counter()
        answer(decoder, [prompt], args.new_tokens)
        seconds[case] = time.perf_counter() - began
    return seconds


def quality(models: Models, args: argparse.Namespace) -> Iterator[Row]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    tokenizer: Any = models.packed.tokenizer
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    size = min(WINDOW, models.packed.target.max_positions)
    windows = ids[: len(ids) // size * size].view(-1, size)[:MOST_WINDOWS]
    for dtype, quantization in itertools.product(("float32", "bfloat16"), (None, "int8")):
        target = models.load(dtype, quantization).target
        logits = ((window, target.logits(window[None], size)[0]) for window in windows)
        nll = [cross_entropy(found[:-1], window[1:], reduction="sum").item() for window, found in logits]
        yield {"dtype": dtype, "quantization": quantization, "num_tokens": size - 1, "nll": nll}


def fill(target: Target, cache: KVCache, length: int) -> None:
    """Random tokens into the cache until it holds ``length``."""
    source = torch.Generator().manual_seed(0)
    while (there := cache.lengths[0]) < length:
        count = min(PREFILL_CHUNK, length - there)
        target.prefill(cache, torch.randint(target.vocab_size, (1, count), generator=source), [count])


def verifying(target: Target, cache: KVCache, rows: int) -> Callable[[int], object]:
    """The verification of so many nodes, again and again: without `keep` the cache is as before. Which node hangs on
    which makes no difference to what it costs."""
    tokens = torch.arange(rows)[None] % target.vocab_size
    tree = chain(tokens[:, 0], tokens[:, 1:], torch.tensor([rows - 1]))
    return lambda repeat: target.verify(cache, tree)


def products_of(forward: LlamaForward, rows: int) -> Callable[[int], object]:
    """All products of a forward one after the other, on random rows."""
    products: list[Any] = [p for layer in forward.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    products.append(forward.head)
    inputs = {p.num_inputs: torch.randn(1, rows, p.num_inputs).to(forward.norm.dtype) for p in products}
    return lambda repeat: [product(inputs[product.num_inputs]) for product in products]


def answer(decoder: Decoder, prompts: Sequence[list[int]], new_tokens: int, repeat: int = 0) -> Stats:
    stats = Stats()
    decoder.generate(prompts, SamplingConfig(max_new_tokens=new_tokens, ignore_eos=True), stats=stats)
    return stats


PARTS: dict[str, Callable[[Models, argparse.Namespace], Iterator[Row]]] = {
    part.__name__: part for part in (forward, plain, prefix, batch, memory, busy, quality)
}


@torch.inference_mode()
def main() -> None:
    args = parse()
    try:
        if args.alone or args.answering:
            sys.stdout.write(json.dumps(alone(args) if args.alone else answering(args)))
        else:
            run(args)
    except (ValueError, OSError, ModelUnavailable) as error:
        sys.exit(str(error))


def run(args: argparse.Namespace) -> None:
    out, models = Path(args.out), Models(args)
    rows_file, run_file = out / "rows.jsonl", out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    lines = rows_file.read_text(encoding="utf-8").splitlines() if rows_file.exists() else []
    done = {json.loads(line)["part"] for line in lines}
    for part in args.parts:
        if part in done:
            sys.stderr.write(f"{part}: has rows in {rows_file} already\n")
            continue
        rows = []
        for row in PARTS[part](models, args):
            rows.append({"part": part, **row})
            shown = {k: round(median(v), 4) if isinstance(v, list) else v for k, v in rows[-1].items()}
            sys.stderr.write(", ".join(f"{k} {v}" for k, v in shown.items()) + "\n")
        described = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
        run_file.write_text(json.dumps(described | {part: describe(args)}, indent=2) + "\n", encoding="utf-8")
        with rows_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def describe(args: argparse.Namespace) -> Row:
    """How and on what a part was measured."""
    (commit, dirty), facts = checkout(".", "../benchmarks/speed.py"), environment()
    names = ("cpu", "cores", "memory_bytes", "system", "python", "torch", "transformers", "confu")
    return {
        "target": Path(args.target).name if Path(args.target).is_absolute() else args.target,
        **{name: getattr(args, name) for name in ("dtype", "repeats", "new_tokens", "contemplate")},
        "drafts": list(args.drafts),
        "machine": {name: facts[name] for name in names} | {"threads": torch.get_num_threads()},
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%d"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, help="folder of rows.jsonl and run.json")
    add("--parts", type=parts, default=list(PARTS), help="some of the above, with commas; default: all")
    add("--target", default=DEFAULT_TARGET, help="name, folder or Hub id")
    add("--dtype", default="bfloat16", help="float32, bfloat16 or float16; quality takes its own")
    add("--drafts", default=DRAFTS, nargs="+", metavar="DRAFT", help="of batch and memory: shipped names, lookup, or "
        "NAME=FOLDER; default: the two shipped")  # fmt: skip
    add("--repeats", type=count, default=5, help=f"of answers; {FORWARDS} times as many of forwards")
    add("--prompts", type=count, default=8, help="so many of the built-in prompts, for plain and batch")
    add("--new-tokens", type=count, default=128, help="of every answer; it does not end before")
    add("--rows", type=counts, default=counts("1,2,4,8,16,32,48,64"), help="of forward")
    add("--prefixes", type=counts, default=counts("128,512,1024,2048,4096,8192"), help="tokens before a round, for "
        f"prefix; cut where {TREE_NODES} nodes behind them would leave the context")  # fmt: skip
    add("--batches", type=counts, default=counts("1,2,4,8,16"), help="sequences, for batch")
    add("--trees", type=trees, default=trees("4x3,8x4,16x5,30x6"), help="nodes x depth, for batch")
    add("--contemplate", type=int, help="nodes with a contemplate row, for batch; default: every node")
    add("--alone", help=argparse.SUPPRESS)  # the process that `memory` starts
    add("--answering", help=argparse.SUPPRESS)  # and the one that `busy` does
    args = parser.parse_args()
    args.drafts = {name or path: path for name, _, path in (text.rpartition("=") for text in args.drafts)}
    return args


def parts(text: str) -> list[str]:
    if unknown := [part for part in text.split(",") if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"part {unknown[0]!r} is not known; give some of {','.join(PARTS)}.")
    return text.split(",")


def count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1; give one such as 5.")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def trees(text: str) -> list[tuple[int, int]]:
    shapes = [tuple(part.split("x")) for part in text.split(",")]
    if any(len(shape) != 2 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r} names no trees; give nodes and depths such as 4x3,30x6.")
    return [(count(nodes), count(depth)) for nodes, depth in shapes]


if __name__ == "__main__":
    main()
