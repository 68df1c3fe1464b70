"""Answers for `regenerate.py` from a server that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp ...)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2

from confu.config import RegenerateConfig
from confu.data.conversations import Answer, Conversation, Outcome, context, draw_seed, is_open
from confu.data.regenerate import Write
from confu.data.rows import LONE_SURROGATE, has_lone_surrogate

RETRY_SECONDS = (1, 2, 4, 8, 16)
TIMEOUT = httpx2.Timeout(600, connect=10)  # seconds; an answer comes in one piece
USELESS = {401, 403, 404}  # what is wrong for one request is wrong for all


class ServerEngine:
    """Many conversations at once, each turn by turn. The key, if one is needed, comes from ``OPENAI_API_KEY``.

    The server must sample from the plain distribution: vLLM needs ``--generation-config vllm``, else it applies the
    model's own top-k and top-p.
    """

    def __init__(
        self,
        base_url: str,
        config: RegenerateConfig,
        *,
        model: str | None = None,
        concurrency: int = 16,
    ) -> None:
        """``base_url`` ends in /v1 as a rule. Raises ValueError when the server cannot be used."""
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; give 1 or more.")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url is {base_url!r}; give an address that begins with http:// or https://.")
        self.base_url, self.config = base_url.rstrip("/"), config
        self.concurrency = concurrency
        key = os.environ.get("OPENAI_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = model or self._only_model()

    def run(self, conversations: Sequence[Conversation], is_done: Callable[[str], bool], write: Write) -> None:
        waiting = (conversation for conversation in conversations if not is_done(conversation.id))
        asyncio.run(self._run(waiting, write))

    async def _run(self, waiting: Iterator[Conversation], write: Write) -> None:
        limits = httpx2.Limits(max_connections=self.concurrency)
        async with httpx2.AsyncClient(headers=self.headers, timeout=TIMEOUT, limits=limits) as client:

            async def work() -> None:
                for conversation in waiting:  # shared by all workers
                    write(conversation, await self._converse(client, conversation))

            await asyncio.gather(*(work() for _ in range(self.concurrency)))

    async def _converse(self, client: httpx2.AsyncClient, conversation: Conversation) -> Outcome:
        answers: list[Answer] = []
        while is_open(conversation, answers):
            seed = draw_seed(self.config.seed, conversation.id, len(answers))
            request = {
                "model": self.model,
                "messages": context(conversation, answers),
                "max_tokens": self.config.max_new_tokens,
                "temperature": conversation.temperature,
                "top_p": 1.0,
                "seed": seed,
            }
            reply = await self._post(client, request)
            answer = reply if isinstance(reply, str) else _read_reply(reply, seed)
            if isinstance(answer, str):
                return answer
            answers.append(answer)
        return answers

    async def _post(self, client: httpx2.AsyncClient, request: dict[str, Any]) -> Any:
        """The server's reply, or a string that says why there is none. What may pass (no connection, HTTP 429 and
        5xx) is tried again."""
        for seconds in (*RETRY_SECONDS, None):
            failure: Exception | None = None
            try:
                response = await client.post(f"{self.base_url}/chat/completions", json=request)
            except httpx2.RequestError as error:
                failure, reason = error, type(error).__name__
            else:
                if response.status_code in USELESS:
                    raise ValueError(_refusal(self.base_url, response))
                reason = f"HTTP {response.status_code}: {_message(response)}"
                if response.status_code != 429 and response.status_code < 500:
                    return response.json() if response.status_code == 200 and _is_json(response) else reason
            if seconds is not None:
                await asyncio.sleep(seconds)
        if isinstance(failure, (httpx2.ConnectError, httpx2.ConnectTimeout)):
            raise RuntimeError(f"{self.base_url} no longer answers ({reason}); run the same command again to go on.")
        return reason

    def _only_model(self) -> str:
        try:
            response = httpx2.get(f"{self.base_url}/models", headers=self.headers, timeout=TIMEOUT)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ValueError(
                f"No server answers at {self.base_url} ({type(error).__name__}); give the address up to and with /v1."
            ) from None
        if response.status_code != 200 or not _is_json(response):
            raise ValueError(_refusal(self.base_url, response))
        names = [model["id"] for model in response.json().get("data", [])]
        if len(names) != 1:
            raise ValueError(f"{self.base_url} serves {', '.join(names) or 'no model'}; name one with --model.")
        return names[0]


def _read_reply(reply: Any, seed: int) -> Answer | str:
    try:
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        return "the server's reply holds no answer"
    if not isinstance(text, str) or reason not in ("stop", "length"):
        return f"the answer ended by {reason!r}, not by itself or at the limit"
    if has_lone_surrogate(text):
        return f"the answer holds {LONE_SURROGATE}"
    usage = reply.get("usage")
    num_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return Answer(text, reason, num_tokens if isinstance(num_tokens, int) else 0, seed)


def _refusal(base_url: str, response: httpx2.Response) -> str:
    return (
        f"{base_url} refuses (HTTP {response.status_code}: {_message(response)}); check the address, which ends in "
        "/v1 as a rule, --model and the key in OPENAI_API_KEY."
    )


def _message(response: httpx2.Response) -> str:
    """What an error says, in the two forms that servers use, else its first line."""
    values = response.json() if _is_json(response) else None
    if isinstance(values, dict):
        error = values.get("error", values)
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return error["message"]
    return next(iter(response.text.splitlines()), "")[:200]


def _is_json(response: httpx2.Response) -> bool:
    try:
        response.json()
    except (ValueError, RecursionError):
        return False
    return True
