"""The process of a peer: read requests, one JSON object a line, and answer each with one.

    PYTHON serve.py ADAPTER SETTINGS

Run by path in an environment of the peer's own, so neither this file nor an adapter imports this package. An adapter is
a module beside this one whose ``load(settings)`` returns facts about the peer (versions) and a function
``answer(prompt, max_new_tokens, temperature, seed)``, which returns at least ``token_ids`` and ``wall_seconds``.
"""

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    adapter, settings = sys.argv[1], json.loads(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print belongs to stderr

    def reply(**values: object) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    sys.path.insert(0, str(Path(__file__).parent))
    try:
        facts, answer = importlib.import_module(adapter).load(settings)
    except Exception as error:
        reply(error=_sentence(error))
        return
    reply(facts=facts)
    for line in sys.stdin:
        try:
            reply(**answer(**json.loads(line)))
        except Exception as error:
            reply(error=_sentence(error))


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


if __name__ == "__main__":
    main()
