"""Regenerated data is the target's own, survives a kill at any point, and outlives bad rows and bad servers."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from naive import build_draft
from tiny_data import END, ROWS, SENTENCES, byte_tokenizer, taught_target, write_jsonl

import confu.data.regenerate
import confu.data.remote
from confu import cli
from confu.config import RegenerateConfig, SamplingConfig
from confu.data.conversations import Answer, Conversation, as_row, context, is_open, read_conversations, turns_of
from confu.data.documents import Document, tokenize_row
from confu.data.regenerate import DecoderEngine, regenerate
from confu.data.remote import ServerEngine
from confu.data.rows import Rows
from confu.drafter import TreeDrafter
from confu.generate import Decoder
from confu.load import encode_chat

TOKENIZER = byte_tokenizer()
PROMPTS = [{"prompt": str(number % 6) * (1 + number // 6)} for number in range(13)]
MIXED = RegenerateConfig(max_new_tokens=12, temperature=1.5, greedy_share=0.5, seed=3, batch_size=3)


def decoder(drafter=None) -> Decoder:
    return Decoder(taught_target(), drafter, TOKENIZER)


def run(file, out, config=MIXED, *, engine=None, **answered_by):
    return regenerate((str(file),), out, engine or DecoderEngine(decoder(), config), config, answered_by=answered_by)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chat(*turns: str) -> dict:
    return {"messages": [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]}


def greedy(messages: list[dict], max_new_tokens: int = 30) -> str:
    ids = encode_chat(TOKENIZER, messages)
    return decoder().generate([ids], SamplingConfig(max_new_tokens=max_new_tokens))[0].text


# ---------------------------------------------------------------- conversations


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "a"}, [["user"]]),
        ({"prompt": "a", "response": "old"}, [["user"]]),
        (chat("user: a"), [["user"]]),
        (chat("system: s", "user: a", "assistant: b", "user: c"), [["system", "user"], ["user"]]),
        (chat("user: a", "user: b", "assistant: c", "assistant: d", "user: e"), [["user", "user"], ["user"]]),
        (chat("assistant: hi", "user: a", "assistant: b"), [["user"]]),
        (chat("user: a", "assistant: b", "system: s"), [["user"]]),
        ({"system": "s", "prompt": "a"}, [["system", "user"]]),
        ({"system": "s", "prompt": "a", "response": "b"}, [["system", "user"]]),
        ({"system": 3, "prompt": "a"}, "no messages, nor prompt"),
        (chat("system: s", "assistant: b"), "no user turn"),
        (chat("user: a", "tool: 3"), "roles other than system, user and assistant"),
        ({"text": "a"}, "no messages, nor prompt"),
        ({"messages": []}, "no user turn"),
    ],
)
def test_an_answer_is_due_wherever_others_have_spoken(row, turns):
    got = turns_of(row)
    assert got == turns if isinstance(turns, str) else [[m["role"] for m in turn] for turn in got] == turns


def test_cut_off_answer_ends_the_conversation():
    row = chat("user: a", "assistant: x", "user: b")
    conversation = Conversation("7", row, turns_of(row), 0.0)
    whole, cut = Answer("one", "stop", 1, 0), Answer("two", "length", 1, 0)
    assert is_open(conversation, [])
    assert is_open(conversation, [whole])
    assert not is_open(conversation, [cut])
    assert not is_open(conversation, [whole, cut])
    assert context(conversation, [whole]) == chat("user: a", "assistant: one", "user: b")["messages"]
    ended = as_row(conversation, [cut])
    assert ended == {"id": "7", **chat("user: a", "assistant: two"), "finish_reason": "length", "temperature": 0.0}


def test_greedy_rows_are_chosen_by_id(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": n, "prompt": "x"} for n in range(1000)])
    config = RegenerateConfig(temperature=0.8, greedy_share=0.3)
    chosen, _ = read_conversations(Rows((file,)), config)
    greedy_ids = {c.id for c in chosen if c.temperature == 0}
    assert 260 < len(greedy_ids) < 340
    assert {c.temperature for c in chosen} == {0, 0.8}
    some = write_jsonl(tmp_path / "b.jsonl", [{"id": n, "prompt": "y"} for n in range(500, 600)])
    assert {c.id for c in read_conversations(Rows((some,)), config)[0] if c.temperature == 0} == greedy_ids & {
        str(n) for n in range(500, 600)
    }


# ---------------------------------------------------------------- this package's engine


def test_answers_are_the_targets_own_and_can_be_trained_on(tmp_path):
    file = write_jsonl(tmp_path / "in.jsonl", [{"id": "n0", "source": "s", **ROWS[0], "response": "old"}, *ROWS[1:]])
    done = run(file, tmp_path / "out.jsonl", RegenerateConfig(max_new_tokens=30))
    rows = {row["prompt"]: row for row in lines(tmp_path / "out.jsonl")}
    assert rows["0"] == {
        "id": "n0", "source": "s", "prompt": "0", "response": SENTENCES[0], "finish_reason": "stop", "temperature": 0.0
    }  # fmt: skip
    assert [rows[str(n)]["response"] for n in range(6)] == list(SENTENCES)
    assert rows["3"]["id"] == f"{file}:4"
    assert done.num_answered == done.num_rows == 6
    assert done.num_tokens == sum(len(sentence) + 1 for sentence in SENTENCES)  # and the end of turn
    document = tokenize_row(rows["0"], TOKENIZER, max_length=99)
    assert document.tokens[document.spans > 0].tolist() == [*SENTENCES[0].encode(), END]


def test_cut_off_answer_is_marked_for_training(tmp_path):
    run(write_jsonl(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "out.jsonl", RegenerateConfig(max_new_tokens=5))
    [row] = lines(tmp_path / "out.jsonl")
    assert (row["response"], row["finish_reason"]) == ("the c", "length")
    document = tokenize_row(row, TOKENIZER, max_length=99)
    assert isinstance(document, Document)
    assert END not in document.tokens[document.spans > 0]


def test_later_turns_follow_the_targets_own_answers(tmp_path):
    rows = [chat("user: 1", "assistant: old", "user: 2", "assistant: old"), chat("user: 3", "assistant: old")]
    run(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", RegenerateConfig(max_new_tokens=30))
    told = max((row["messages"] for row in lines(tmp_path / "out.jsonl")), key=len)
    assert [m["content"] for m in told[:3]] == ["1", SENTENCES[1], "2"]
    assert told[3]["content"] == greedy(told[:3])


def test_sampled_answers_can_be_drawn_again_from_their_seeds(tmp_path):
    config = RegenerateConfig(max_new_tokens=12, temperature=1.5, seed=3, batch_size=4)
    run(write_jsonl(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl", config)
    rows = lines(tmp_path / "out.jsonl")
    assert len({row["seeds"][0] for row in rows}) == len(PROMPTS)
    for row in rows:
        sampling = SamplingConfig(max_new_tokens=12, temperature=1.5, seed=row["seeds"][0])
        ids = encode_chat(TOKENIZER, [{"role": "user", "content": row["prompt"]}])
        assert decoder().generate([ids], sampling)[0].text == row["response"]


def test_a_draft_changes_no_greedy_answer(tmp_path):
    target = taught_target()
    drafter = TreeDrafter(build_draft(target.model, "eagle3"), target)
    file, config = write_jsonl(tmp_path / "in.jsonl", PROMPTS), RegenerateConfig(max_new_tokens=12, batch_size=5)
    run(file, tmp_path / "plain.jsonl", config)
    run(file, tmp_path / "drafted.jsonl", config, engine=DecoderEngine(decoder(drafter), config))
    assert lines(tmp_path / "drafted.jsonl") == lines(tmp_path / "plain.jsonl")


# ---------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("rows_before", [0, 1, 4, 7, 12])
def test_killed_run_goes_on_as_if_it_had_not_been(rows_before, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "in.jsonl", [*PROMPTS, chat("user: 1", "assistant: x", "user: 2")])
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(file, whole)
    written = []

    def killed(conversation, answers):
        if len(written) == rows_before:
            raise KeyboardInterrupt
        written.append(conversation.id)
        return as_row(conversation, answers)

    monkeypatch.setattr(confu.data.regenerate, "as_row", killed)
    with pytest.raises(KeyboardInterrupt):
        run(file, parts)
    monkeypatch.undo()
    with parts.open("ab") as half:
        half.write(b'{"id": "in.jsonl:9", "prompt": "\xc3')
    done = run(file, parts)
    assert parts.read_bytes() == whole.read_bytes()
    assert (done.num_done_before, done.num_answered) == (rows_before, 14 - rows_before)
    assert {row["temperature"] for row in lines(whole)} == {0.0, 1.5}


def test_finished_file_is_left_alone_without_decoding(tmp_path, monkeypatch):
    rows = [*PROMPTS, {"prompt": "x" * 600}]  # the last one never fits and fails each time
    file, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    run(file, out)
    before = out.read_bytes()
    monkeypatch.setattr(Decoder, "generate", None)
    done = run(file, out)
    assert out.read_bytes() == before
    assert (done.num_answered, done.failed.total()) == (0, 1)


def test_other_settings_data_or_files_are_refused(tmp_path):
    file, out = write_jsonl(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    run(file, out, target="tiny")
    with pytest.raises(ValueError, match="begun with temperature 1.5, not 0.7; give what"):
        run(file, out, RegenerateConfig(12, temperature=0.7, greedy_share=0.5, seed=3), target="tiny")
    with pytest.raises(ValueError, match="begun with target 'tiny', not 'other'"):
        run(file, out, target="other")
    run(file, out, RegenerateConfig(12, 1.5, 0.5, 3, batch_size=5, max_failed=0.5), target="tiny")
    write_jsonl(tmp_path / "in.jsonl", PROMPTS[1:])
    with pytest.raises(ValueError, match="begun with other data"):
        run(file, out, target="tiny")
    with pytest.raises(ValueError, match="not the work of this command"):
        run(file, tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match="give --out a name that ends in .jsonl"):
        run(file, tmp_path / "out")
    out.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1 is no answered row"):
        run(write_jsonl(tmp_path / "in.jsonl", PROMPTS), out, target="tiny")
    (tmp_path / "out.settings.json").write_text("")
    with pytest.raises(ValueError, match=r"out.settings.json is damaged, .* give another --out"):
        run(file, out, target="tiny")


# ---------------------------------------------------------------- rows that fail


def test_bad_rows_are_recorded_and_the_rest_is_answered(tmp_path):
    bad = [3, {"text": "a"}, {"id": "same", "prompt": "1"}, {"id": "same", "prompt": "2"}, {"prompt": "x" * 600}]
    bad += [{"prompt": "cut \ud83d"}, {"id": "\udc00", "prompt": "3"}, {"prompt": "4", "note": "\ud83d"}]
    file = write_jsonl(tmp_path / "in.jsonl", [*PROMPTS, *bad])
    done = run(file, tmp_path / "out.jsonl")
    failed = lines(tmp_path / "out.errors.jsonl")
    assert done.num_answered == 14
    assert done.failed.total() == 7
    assert [(row["id"].removeprefix(str(tmp_path)), row["reason"]) for row in failed] == [
        ("/in.jsonl:14", "no messages, nor prompt"),
        ("/in.jsonl:15", "no messages, nor prompt"),
        ("/in.jsonl:17", "its id same is that of an earlier row"),
        *((f"/in.jsonl:{number}", "a lone surrogate, which is no Unicode text") for number in (19, 20, 21)),
        ("/in.jsonl:18", "longer than the target's context of 512 tokens"),
    ]


def test_batch_that_fails_is_answered_row_by_row(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "in.jsonl", ROWS)
    generate, sizes = Decoder.generate, []

    def failing(self, prompts, sampling):
        sizes.append(len(prompts))
        if len(prompts) > 1 or ord("4") in prompts[0]:
            raise RuntimeError("out of memory\nmore")
        return generate(self, prompts, sampling)

    monkeypatch.setattr(Decoder, "generate", failing)
    run(file, tmp_path / "out.jsonl", RegenerateConfig(max_new_tokens=30, batch_size=6))
    assert sizes == [6, *[1] * 6]
    assert [row["response"] for row in lines(tmp_path / "out.jsonl")] == [s for n, s in enumerate(SENTENCES) if n != 4]
    assert lines(tmp_path / "out.errors.jsonl") == [{"id": f"{file}:5", "reason": "RuntimeError: out of memory"}]
    monkeypatch.undo()
    done = run(file, tmp_path / "out.jsonl", RegenerateConfig(max_new_tokens=30, batch_size=6))
    assert (done.num_answered, done.failed.total()) == (1, 0)
    assert len(lines(tmp_path / "out.jsonl")) == 6
    assert lines(tmp_path / "out.errors.jsonl") == []


def test_too_many_failures_stop_the_run(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": str(n)} for n in range(60)])

    def broken(self, prompts, sampling):
        raise RuntimeError("no luck")

    monkeypatch.setattr(Decoder, "generate", broken)
    with pytest.raises(RuntimeError, match="20 of 20 rows failed, most of them so: RuntimeError: no luck; see"):
        run(file, tmp_path / "out.jsonl", RegenerateConfig())
    with pytest.raises(RuntimeError, match="60 of 60 rows failed"):
        run(file, tmp_path / "all.jsonl", RegenerateConfig(max_failed=1.0))
    mostly_bad = write_jsonl(tmp_path / "bad.jsonl", [*[{"x": 1}] * 25, *PROMPTS])
    with pytest.raises(RuntimeError, match="25 of 38 rows failed, most of them so: no messages, nor prompt"):
        run(mostly_bad, tmp_path / "bad.out.jsonl", MIXED)
    with pytest.raises(ValueError, match="No row of .* can be answered"):
        run(write_jsonl(tmp_path / "none.jsonl", [{"x": 1}]), tmp_path / "none.out.jsonl")
    with pytest.raises(ValueError, match="can be answered: it holds no row; give rows with prompt or messages"):
        run(write_jsonl(tmp_path / "none.jsonl", []), tmp_path / "none.out.jsonl")


# ---------------------------------------------------------------- a server


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible server that answers every message with its length; some prompts make it misbehave."""
    state = {"requests": [], "models": ["tiny"], "key": None, "busy": 2}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._reply(200, {"data": [{"id": name} for name in state["models"]]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["requests"].append(request)
            if state["key"] and self.headers["Authorization"] != f"Bearer {state['key']}":
                return self._reply(401, {"error": {"message": "bad key"}})
            said = request["messages"][-1]["content"]
            if said == "bad":
                return self._reply(400, {"error": {"message": "no such thing"}})
            if said == "crash":
                return self._reply(500, {"detail": "boom"})
            if said == "busy" and state["busy"]:
                state["busy"] -= 1
                return self._reply(503, {"message": "wait"})
            if said == "garbled":
                return self._reply(200, {}, encoding="gzip")
            if said == "deep":
                return self._reply(200, b"[" * 100_000)
            reason = {"long": "length", "filtered": "content_filter"}.get(said, "stop")
            content = f"{len(said)} é" if said != "half" else "\ud83d"
            choice = {"message": {"role": "assistant", "content": content}, "finish_reason": reason}
            usage = {"listed": [2], "uncounted": {"completion_tokens": None}}.get(said, {"completion_tokens": 2})
            return self._reply(200, {"choices": [choice], "usage": usage})

        def _reply(self, status, body, encoding="identity"):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Encoding", encoding)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(confu.data.remote, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state["url"] = f"http://127.0.0.1:{http.server_port}/v1"
        yield state
        http.shutdown()
        thread.join()


def ask(server, rows, tmp_path, *, config=MIXED, **options):
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    return run(file, tmp_path / "out.jsonl", config, engine=ServerEngine(server["url"], config, **options))


def test_server_answers_and_a_failing_row_is_recorded(server, tmp_path):
    rows = [{"id": w, "prompt": w} for w in ("one", "bad", "busy", "crash", "long", "filtered", "twelve", "half")]
    done = ask(server, rows, tmp_path, config=RegenerateConfig(7, temperature=0.8), concurrency=3)
    answers = {row["id"]: row for row in lines(tmp_path / "out.jsonl")}
    assert {name: row["response"] for name, row in answers.items()} == {
        "one": "3 é", "busy": "4 é", "long": "4 é", "twelve": "6 é"
    }  # fmt: skip
    assert answers["long"]["finish_reason"] == "length"
    assert {row["id"]: row["reason"] for row in lines(tmp_path / "out.errors.jsonl")} == {
        "bad": "HTTP 400: no such thing",
        "crash": 'HTTP 500: {"detail": "boom"}',
        "filtered": "the answer ended by 'content_filter', not by itself or at the limit",
        "half": "the answer holds a lone surrogate, which is no Unicode text",
    }
    assert (done.num_answered, done.num_tokens) == (4, 8)
    tries = [request["messages"][0]["content"] for request in server["requests"]]
    assert [tries.count(word) for word in ("one", "bad", "busy", "crash")] == [1, 1, 3, 4]
    request = next(r for r in server["requests"] if r["messages"][0]["content"] == "one")
    assert request | {"seed": None} == {
        "model": "tiny", "messages": [{"role": "user", "content": "one"}],
        "max_tokens": 7, "temperature": 0.8, "top_p": 1.0, "seed": None,
    }  # fmt: skip
    assert answers["one"]["seeds"] == [request["seed"]]
    server["requests"].clear()
    done = ask(server, rows, tmp_path, config=RegenerateConfig(7, temperature=0.8))
    assert done.num_done_before == 4
    assert {r["messages"][0]["content"] for r in server["requests"]} == {"bad", "crash", "filtered", "half"}


def test_reply_that_cannot_be_read_fails_its_row_alone(server, tmp_path):
    done = ask(server, [{"id": w, "prompt": w} for w in ("garbled", "deep", "listed", "uncounted", "one")], tmp_path)
    assert {row["id"] for row in lines(tmp_path / "out.jsonl")} == {"listed", "uncounted", "one"}
    assert done.num_tokens == 2
    reasons = {row["id"]: row["reason"] for row in lines(tmp_path / "out.errors.jsonl")}
    assert reasons == {"garbled": "DecodingError", "deep": f"HTTP 200: {'[' * 200}"}


def test_server_gets_its_own_earlier_answers(server, tmp_path):
    ask(server, [chat("system: s", "user: hello", "assistant: old", "user: more")], tmp_path)
    expected = chat("system: s", "user: hello", "assistant: 5 é", "user: more")["messages"]
    assert server["requests"][1]["messages"] == expected
    assert lines(tmp_path / "out.jsonl")[0]["messages"] == [*expected, {"role": "assistant", "content": "4 é"}]


def test_key_from_the_environment(server, tmp_path, monkeypatch):
    server["key"] = "secret"
    with pytest.raises(ValueError, match="refuses .HTTP 401: bad key.; check the address"):
        ask(server, PROMPTS, tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert ask(server, PROMPTS, tmp_path).num_answered == 13


def test_unusable_server_is_one_sentence(server, tmp_path):
    server["models"] = ["a", "b"]
    with pytest.raises(ValueError, match="serves a, b; name one with --model"):
        ask(server, PROMPTS, tmp_path)
    assert ask(server, PROMPTS, tmp_path, model="b").num_answered == 13
    with pytest.raises(ValueError, match="base_url is 'localhost:8000/v1'; give an address that begins with http://"):
        ServerEngine("localhost:8000/v1", MIXED, model="b")
    with pytest.raises(ValueError, match=r"No server answers at http://127.0.0.1:9/v1 \(ConnectError\)"):
        ServerEngine("http://127.0.0.1:9/v1", MIXED)
    engine = ServerEngine("http://127.0.0.1:9/v1", MIXED, model="gone")
    with pytest.raises(RuntimeError, match="no longer answers .ConnectError.; run the same command again"):
        run(tmp_path / "in.jsonl", tmp_path / "gone.jsonl", engine=engine)


# ---------------------------------------------------------------- the command


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taught_target().model.save_pretrained(tmp_path / "target")
    TOKENIZER.save_pretrained(tmp_path / "target")
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)


COMMAND = ["data", "regenerate", "in.jsonl", "--out", "out.jsonl", "--max-new-tokens", "8"]
LOCAL = [*COMMAND, "--target", "target", "--dtype", "float32"]


@pytest.mark.usefixtures("home")
def test_regenerate_command(tmp_path, capsys):
    assert cli.run(LOCAL) == 0
    out, err = capsys.readouterr()
    assert out == "out.jsonl\n"
    assert "answering" in err
    assert "13 of 13 rows answered, " in err
    assert cli.run([*LOCAL, "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_done_before"], document["num_answered"], document["failed"]) == (13, 0, {})
    assert json.loads((tmp_path / "out.settings.json").read_text())["target"] == "target"
    assert cli.run([*LOCAL, "--draft", "lookup"]) == 2
    assert "begun with draft None, not 'lookup'" in capsys.readouterr().err


@pytest.mark.usefixtures("home")
def test_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "generate", interrupted)
        patched.setattr(sys, "argv", ["confu", *LOCAL])
        assert cli.run(LOCAL) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert f"confu: interrupted; go on with: confu {' '.join(LOCAL)}\n" in err
    assert cli.run([*LOCAL, "-q"]) == 0


@pytest.mark.usefixtures("home")
def test_command_with_a_server(server, capsys):
    assert cli.run([*COMMAND, "--engine", "openai", "--base-url", server["url"], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["engine"], document["model"], document["num_tokens"]) == ("openai", "tiny", 26)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "openai"], "--engine openai needs --base-url"),
        (["--engine", "openai", "--draft", "lookup", "--dtype", "float32"], "engine openai: --draft, --dtype; leave"),
        (["--base-url", "http://x"], "Without effect with --engine confu: --base-url"),
        (["--tree-nodes", "5"], "Without a draft there is no tree"),
        (["--engine", "vllm"], "--engine"),
        (["--greedy-share", "0.5"], "greedy_share has no effect at temperature 0"),
        (["--temperature", "1", "--greedy-share", "2"], "greedy_share is 2.0; give a number from 0 to 1"),
        (["--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_command_refuses_in_one_sentence(arguments, words, capsys):
    assert cli.run([*COMMAND, "-q", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
