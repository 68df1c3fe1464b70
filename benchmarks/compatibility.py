"""Run the compatibility tests and show what they found in docs/compatibility.md.

    python benchmarks/compatibility.py            # run them (some minutes), keep the outcomes, rewrite the tables
    python benchmarks/compatibility.py --check    # exit 1 when the page does not show the kept outcomes

A cell is "yes" only where the test of that name passed; whatever failed, or was not run, says so.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
ROWS = ROOT / "benchmarks" / "results" / "compatibility.json"
VLLM = ROOT / "benchmarks" / "results" / "vllm.json"
TABLE = re.compile(r"(<!-- compatibility:([\w-]+) -->\n).*?(<!-- /compatibility -->)", re.DOTALL)
TESTS = ("test_families.py", "test_formats.py", "test_files.py", "test_hub.py", "test_target.py")

FEATURES = {
    "lossless": ("test_lossless[confu-{}]", "test_lossless[scripted-{}]"),
    "contemplate": ("test_contemplate[{}]",),
    "batch": ("test_batch[{}]",),
    "train": ("test_train[{}]",),
    "import": ("test_import[{}]",),
    "export": ("test_export[{}]",),
}
FORMATS = {
    # what it is, name when read, name when written, who reads it
    "official EAGLE-3": ("eagle", "eagle", "the EAGLE repository"),
    "SpecForge": ("specforge", "specforge", "SpecForge, SGLang"),
    "speculators": ("speculators", "speculators", "speculators, vLLM"),
    "ModelOpt": ("modelopt", None, "ModelOpt"),
    "vLLM": ("vllm", "vllm", "vLLM"),
    "SGLang": ("specforge", "sglang", "SGLang"),
}


def main() -> int:
    check = "--check" in sys.argv
    if not check:
        ROWS.write_text(json.dumps(run_tests(), indent=1) + "\n", encoding="utf-8")
    found = json.loads(ROWS.read_text(encoding="utf-8"))
    old = PAGE.read_text(encoding="utf-8")
    new = TABLE.sub(lambda part: part[1] + TABLES[part[2]](found) + part[3], old)
    if check:
        if new != old:
            sys.stderr.write("docs/compatibility.md does not show the kept outcomes; run benchmarks/compatibility.py\n")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    problems = [f"{name}: {outcome}\n" for name, outcome in found["tests"].items() if outcome != "passed"]
    sys.stderr.writelines(problems)
    return int(bool(problems))


def run_tests() -> dict[str, Any]:
    """The outcome of every test, and the sentences that refusals recorded, by the test's name."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = [sys.executable, "-m", "pytest", "-q", "-o", "junit_family=xunit1", f"--junitxml={file.name}"]
        subprocess.run([*command, *(f"tests/{name}" for name in TESTS)], cwd=ROOT, check=False)
        tests, sentences = {}, {}
        for case in ElementTree.parse(file.name).iter("testcase"):
            name = case.attrib["name"]
            problems = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
            tests[name] = problems[0] if problems else "passed"
            for recorded in case.iter("property"):
                sentences[name] = recorded.attrib["value"]
    versions = {"python": platform.python_version(), "torch": version("torch")}
    return versions | {"transformers": version("transformers"), "tests": tests, "sentences": sentences}


def outcome(found: dict[str, Any], *names: str) -> str:
    outcomes = {found["tests"].get(name, "not run") for name in names}
    return "yes" if outcomes == {"passed"} else ", ".join(sorted(outcomes - {"passed"}))


def families(found: dict[str, Any]) -> str:
    names = [
        n.removeprefix("test_lossless[confu-")[:-1] for n in found["tests"] if n.startswith("test_lossless[confu-")
    ]
    rows = [
        [name, *(outcome(found, *(test.format(name) for test in tests)) for tests in FEATURES.values())]
        for name in names
    ]
    versions = f"Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}."
    return markdown(["family", *FEATURES], rows) + f"\n{versions}\n"


def refused(found: dict[str, Any]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sorted(found["sentences"].values()))


def formats(found: dict[str, Any]) -> str:
    rows = []
    for name, (read, written, readers) in FORMATS.items():
        done = outcome(found, f"test_import_reads_every_format[{read}]")
        row = [name, f"`confu import` ({done})", "no", readers]
        if written:
            identity, literal = "test_export_and_import_is_the_identity", "test_export_writes_literal_keys_and_flags"
            done = outcome(found, f"{identity}[{written}]", f"{literal}[{written}]")
            row[2] = f"`confu export --to {written}` ({done})"
        rows.append(row)
    return markdown(["format", "read", "written", "read by"], rows)


def vllm(_: dict[str, Any]) -> str:
    """What `engine_vllm.py` kept."""
    run = json.loads(VLLM.read_text(encoding="utf-8"))
    total = len(run["answers"])
    row = [
        f"vLLM {run['vllm']}, method eagle3, {run['chain']} tokens",
        f"`{run['draft']}`",
        f"{total - run['num_different']} of {total}",
        f"{run['vllm_mean_acceptance_length']:.3f}",
        f"{run['our_mean_acceptance_length']:.3f}",
    ]
    table = markdown(["engine", "draft", "same text", "its acceptance length", "ours"], [row])
    return (
        f"{table}\nGreedy, float32, {run['max_new_tokens']} new tokens; {run['machine']}, torch {run['torch']}, commit "
        f"{run['commit'][:10]}{' (modified)' if run['dirty'] else ''}, {run['date']}.\n"
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES = {"families": families, "refused": refused, "formats": formats, "vllm": vllm}

if __name__ == "__main__":
    sys.exit(main())
