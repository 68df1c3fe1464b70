"""runs/answers.py, which writes answers by the thousand: greedy ones are those of generate, drawn ones have its law."""

from collections import Counter

import pytest
import torch
from naive import greedy
from scipy.stats import chisquare
from scripts import load_script

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]


@pytest.fixture(scope="module")
def answers():
    return load_script("runs/answers.py")


@torch.inference_mode()
def test_greedy_answers_are_those_of_generate(answers, model):
    wave = answers.Wave(model, size=4, longest=128)
    truth = [greedy(model, prompt, 20) for prompt in PROMPTS]
    for eos in (-1, truth[0][6]):
        wave.eos = eos
        for row, wanted in zip(wave.answer(PROMPTS, 0.0, most=20, at_once=2), truth, strict=False):
            end = wanted.index(eos) + 1 if eos in wanted else len(wanted)
            assert row[:end] == wanted[:end]


@torch.inference_mode()
def test_drawn_tokens_follow_the_targets_law(answers, model8):
    wave = answers.Wave(model8, size=4000, longest=128)
    wave.eos = -1
    torch.manual_seed(0)
    drawn = Counter(row[0] for row in wave.answer([[3, 1, 4]], 0.7, most=1, at_once=4000))
    law = (model8(torch.tensor([[3, 1, 4]])).logits[0, -1] / 0.7).softmax(-1).double()
    assert chisquare([drawn[token] for token in range(8)], (law / law.sum() * 4000).tolist()).pvalue > 1e-3
