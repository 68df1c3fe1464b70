"""Shapes of every signature are checked in all tests; tiny random models serve as targets and drafts."""

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything imports the package. The tower lets an int stand for a float, as PEP 484 has it.
install_import_hook("confu", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
torch.set_num_threads(1)

from naive import METHODS, build_draft, build_model  # noqa: E402

from confu.drafter import TreeDrafter  # noqa: E402
from confu.target import Target  # noqa: E402

# The same examples in every run: a numerical near-tie must not make a test flaky.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def model():
    """A random Llama of 8 layers and 64 tokens."""
    return build_model(64)


@pytest.fixture(scope="session")
def model8():
    """The same with 8 tokens, so that random drafts are often right and distributions can be enumerated."""
    return build_model(8, seed=3, spread=0.15)


@pytest.fixture(scope="session")
def target(model):
    return Target(model)


@pytest.fixture(scope="session")
def target8(model8):
    return Target(model8)


@pytest.fixture(scope="session")
def drafts(model):
    """Random drafts of the 64-token target by method, over 48 of its tokens."""
    return {m: build_draft(model, m, draft_vocab_size=48) for m in METHODS}


@pytest.fixture(scope="session")
def drafters(drafts, target):
    return {method: TreeDrafter(draft, target) for method, draft in drafts.items()}


@pytest.fixture(scope="session")
def drafts8(model8):
    """Random drafts of the 8-token target by method; this seed is right often enough for paths of four tokens."""
    return {m: build_draft(model8, m, seed=9) for m in METHODS}


@pytest.fixture(scope="session")
def drafters8(drafts8, target8):
    return {method: TreeDrafter(draft, target8) for method, draft in drafts8.items()}
