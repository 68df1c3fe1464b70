"""benchmarks/held_out.py: the objective's own losses, and which rows the draft had foreseen."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from scripts import load_script

from confu.data.corpus import Corpus, collate
from confu.data.documents import Document
from confu.training.objective import losses


@pytest.fixture
def held_out():
    return load_script("benchmarks/held_out.py")


@pytest.mark.parametrize("method", ["eagle3", "confu-head"])
def test_rows_are_judged_as_the_objective_does(target8, drafts8, held_out, method):
    generator = torch.Generator().manual_seed(0)
    documents = [
        Document(torch.randint(8, (length,), generator=generator), (torch.arange(length) > 3).long())
        for length in (40, 21)
    ]
    draft = copy.copy(drafts8[method])
    draft.config = dataclasses.replace(draft.config, replication=1)
    found = held_out.judge(draft, target8, Corpus(documents, Counter(), ""), batch_tokens=100)
    with torch.no_grad():
        ours = losses(
            draft,
            target8,
            collate([documents[1], documents[0]]),
            ttt_steps=held_out.STEPS,
            step_decay=1.0,
            max_router_lag=held_out.MOST_LAG,
            generator=torch.Generator().manual_seed(2),
        )
    count = found.counted.sum(1)
    assert count.tolist() == ours.num_rows.tolist()
    torch.testing.assert_close((found.kl * found.counted).sum(1) / count, ours.kl, atol=1e-4, rtol=1e-4)

    # A row is foreseen when the row before, of the same document, hit: its step 0 predicts this row's own token.
    hits = found.hits[0].tolist()
    foreseen: list[bool] = []
    for length in (21, 40):
        for row in range(length - 5):
            foreseen.append(row > 0 and hits[len(foreseen) - 1])
    assert found.foreseen.tolist() == foreseen
    assert any(foreseen)
    assert found.surprising.any()
    assert not (found.foreseen & found.surprising).any()
