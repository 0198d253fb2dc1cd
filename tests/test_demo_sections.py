"""The parts of the demo that decide what its numbers mean."""

from __future__ import annotations

import pytest
import torch

from torch_winnow.demo import infilling, steering


@pytest.mark.parametrize(
    "source",
    [
        b"def f(x):\n    x = 1\n",
        b"def f(x):\n    if x:\n",  # a body may follow
        b"x = (1,\n",
        b'"""unfinished\n',
        b"x = 1\nreturn ) what follows the last line end is not looked at",
        b"x = 1 + \\\n",
        b"",
    ],
)
def test_unfinished_code_parses(source):
    assert steering.parses(source)


@pytest.mark.parametrize(
    "source",
    [
        b"def f(:\n",
        b"try:\n    x\ny = 1\n",
        b"x = 'unfinished\n",
        b"def f():\n    x\n  y\n",
        b"x\0y\n",
        b"\xff\xfe\n",
        b"return 3\n",
        b"(" * 300 + b"\n",
    ],
)
def test_broken_code_does_not_parse(source):
    assert not steering.parses(source)


def test_reward_is_per_candidate():
    good, bad = b"x = 1\n", b"x = )\n"
    text = torch.tensor([[list(good), list(bad)], [list(bad), list(bad)]])
    assert steering.reward_of(text).tolist() == [[0.0, -1.0], [-1.0, -1.0]]


def test_prompts_begin_with_a_definition():
    source = b"import os\n\ndef f(x):\n    return x\n" + b"# comment\n" * 40
    prompts = steering.prompts_of(torch.tensor(list(source)), torch.Generator().manual_seed(0))
    assert bytes(prompts[0].tolist()).startswith(b"def f(x):")


def test_every_window_hides_the_same_number_of_bytes():
    hidden = infilling.hidden_bytes(torch.Generator().manual_seed(0))
    assert hidden.sum(1).unique().tolist() == [77]
    assert not torch.equal(hidden[0], hidden[1])
