"""How the compiled functions are made and kept, and that torch takes their place where they cannot be."""

import ctypes
import itertools
import logging
import shutil
import subprocess

import pytest
import torch

from confu import native
from confu.native import build, library
from confu.rows import NativeRows, Rows, rows


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and nothing remembered of the library before or after. Lists the commands that were run."""
    if library() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("CONFU_CACHE", str(tmp_path))
    ran, run = [], subprocess.run
    monkeypatch.setattr(
        native.subprocess, "run", lambda command, **options: ran.append(command) or run(command, **options)
    )
    for remembered in (library, rows):
        remembered.cache_clear()
    yield ran
    for remembered in (library, rows):
        remembered.cache_clear()


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_a_compiler_takes_the_sources():
    """Without this, an error in them would turn everything compiled off, its tests included."""
    assert library() is not None


def test_the_library_is_built_once(fresh, tmp_path, monkeypatch):
    built = build()
    assert list((tmp_path / "native").iterdir()) == [built]  # and nothing of its making
    assert len(fresh) == len(native.SOURCES) + 1
    assert build() == built
    assert len(fresh) == len(native.SOURCES) + 1
    monkeypatch.setattr(native, "_processor", lambda: "another")  # a cache that several machines share
    assert build() != built
    assert len(fresh) == 2 * (len(native.SOURCES) + 1)


def test_another_source_or_option_is_another_library(fresh, tmp_path, monkeypatch):
    for header in native.HEADERS:
        shutil.copy(header, tmp_path)
    source = tmp_path / "rows.cpp"
    source.write_text(native.SOURCES[0].read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
    first = build()
    assert build("-DOTHER") != first
    monkeypatch.setattr(native, "SOURCES", (source, *native.SOURCES[1:]))
    assert build() != first


def test_the_functions_run_on_torchs_threads(fresh):
    """Their OpenMP is the one that the process has: the library names none to be loaded."""
    assert type(rows()) is NativeRows
    assert rows() is rows()
    (linked,) = [command for command in fresh if "-shared" in command]
    assert "-fopenmp" not in linked
    assert any("-fopenmp" in command for command in fresh)
    assert len(fresh) == len(native.SOURCES) + 1


def test_without_openmp_they_run_on_one_thread(fresh, monkeypatch, caplog):
    load = ctypes.CDLL
    tried = []

    def refuse_the_first(path):
        tried.append(path)
        if len(tried) == 1:
            raise OSError("undefined symbol: GOMP_parallel")
        return load(path)

    monkeypatch.setattr(native.ctypes, "CDLL", refuse_the_first)
    with caplog.at_level(logging.INFO, logger="confu.native"):
        assert type(rows()) is NativeRows
    assert "no OpenMP for the compiled functions: undefined symbol: GOMP_parallel" in caplog.text
    assert not any("-fopenmp" in command for command in fresh[6:])
    logits = torch.randn(1, 40, 1000)
    assert torch.equal(rows().argmax(logits), Rows().argmax(logits))


@pytest.mark.parametrize("trouble", ["broken compiler", "no such compiler", "no compiler", "read-only cache"])
def test_without_the_library_torch_takes_its_place(fresh, tmp_path, monkeypatch, caplog, trouble):
    said = {
        "broken compiler": "returned non-zero exit status 1",
        "no such compiler": "No such file or directory: '/nowhere/c++'",
        "no compiler": "there is no C++ compiler",
        "read-only cache": "File exists",
    }[trouble]
    monkeypatch.delenv("CXX", raising=False)
    if trouble == "broken compiler":
        monkeypatch.setenv("CXX", "false")
    elif trouble == "no such compiler":
        monkeypatch.setenv("CXX", "/nowhere/c++")
    elif trouble == "no compiler":
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    else:
        (tmp_path / "native").write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, logger="confu.native"):
        assert type(rows()) is Rows
        assert rows() is rows()  # and does not try again
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert caplog.text.count("are not used, torch takes their place") == 1
    assert said in caplog.text
    assert not list(itertools.chain.from_iterable(path.glob("*") for path in tmp_path.glob("native")))
