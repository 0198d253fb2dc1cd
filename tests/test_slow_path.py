"""A slow way that the caller can avoid is told, once, with what to do; nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import torch_winnow as w
from torch_winnow import _slow_path


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(_slow_path, "_said", set())


def logits(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


LARGE = logits(4, 64, 1 << 15)  # 16 MB
COPIED = {
    "a slice of each sequence": LARGE[:, :-1],
    "vocabulary first": LARGE.transpose(1, 2),
}
READ_IN_PLACE = {
    "contiguous": LARGE,
    "evenly spaced": LARGE[:, ::2],
    "one sequence": logits(1, 257, 1 << 14)[:, :-1],
    "part of the vocabulary": LARGE[..., :20000],
    "expanded": LARGE[:, :1].expand(4, 64, 1 << 15)[:1],
    "small": logits(4, 8, 100)[:, :-1],
    "empty": logits(0, 8, 100),
    "one number": logits(1),
}


@pytest.mark.parametrize("view", COPIED)
def test_logits_that_are_copied(view):
    with pytest.warns(w.SlowPathWarning, match=r"logits: \d+ MB of shape .* are copied") as told:
        assert [w.unmasking.logit_stats(COPIED[view]) for _ in range(2)]
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize("view", READ_IN_PLACE)
def test_logits_that_are_read_in_place(view):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w.unmasking.logit_stats(READ_IN_PLACE[view])


def test_a_step_tells_it_too_and_a_filter_silences_it():
    tokens = torch.full((4, 63), 5)
    rule = w.unmasking.TopK(1)
    with pytest.warns(w.SlowPathWarning, match="shift=True instead of"):
        w.unmasking.unmask_step_(tokens, LARGE[:, :-1], mask_id=5, rule=rule)
    _slow_path._said.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=w.SlowPathWarning)
        w.unmasking.unmask_step_(tokens, LARGE[:, :-1], mask_id=5, rule=rule)


def test_a_compiled_call_is_one_graph():
    def entropy(logits: torch.Tensor) -> torch.Tensor:
        return w.unmasking.logit_stats(logits).entropy

    with warnings.catch_warnings():
        warnings.simplefilter("error", category=w.SlowPathWarning)
        compiled = torch.compile(entropy, fullgraph=True, backend="eager")
        view = torch.zeros(2, 1025, 1 << 11)[:, :-1]
        assert torch.equal(compiled(view), entropy(view.contiguous()))


def test_tensors_on_a_gpu_without_our_cuda_operators():
    """As on a CUDA torch beside a CPU build: what the dispatcher would do is asked for by hand."""
    code = (
        "import torch; torch.version.cuda = '13.0'; import torch_winnow as w;"
        "assert not w.build_info().cuda_library;"
        "keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA);"
        "op = torch.ops.winnow.effective_sample_size.default;"
        "print(op(torch.zeros(4)).item()); op.redispatch(keys, torch.zeros(4))"
    )
    if w.build_info().cuda_library:
        pytest.skip("the CUDA operators are loaded")
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True
    )
    assert result.stdout.strip() == "4.0"
    assert "RuntimeError: effective_sample_size: expected tensors on the CPU, got" in result.stderr
    assert "install a wheel for this CUDA, or build from source" in result.stderr


class TestTransformers:
    """Keys that leave the pages in every step."""

    @pytest.fixture
    def model(self):
        transformers = pytest.importorskip("transformers", minversion="5")
        from torch_winnow.integrations.transformers import register

        register()
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        return transformers.LlamaForCausalLM(config).eval()

    def run(self, model, implementation, mask=None):
        from torch_winnow.integrations.transformers import WinnowCache

        model.set_attn_implementation(implementation)
        cache = WinnowCache(model.config, block_size=4)
        tokens = torch.ones(2, 6, dtype=torch.int64)
        with torch.no_grad():
            model(tokens, attention_mask=mask, past_key_values=cache)
        return cache

    def test_another_attention(self, model):
        told = r"attention is not 'winnow'.* Call model.set_attn_implementation\('winnow'\)"
        with pytest.warns(w.SlowPathWarning, match=told) as found:
            assert [self.run(model, "sdpa") for _ in range(2)]
        assert len(found) == 1

    def test_a_mask_that_pages_do_not_know(self, model):
        mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
        with pytest.warns(w.SlowPathWarning, match="does not know this attention mask"):
            self.run(model, "winnow", mask)

    def test_pages_are_read_in_place_and_may_be_looked_at(self, model):
        left_padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        with warnings.catch_warnings():
            warnings.simplefilter("error", category=w.SlowPathWarning)
            self.run(model, "winnow", left_padded)
            cache = self.run(model, "winnow")
            assert (cache.layers[0].keys + 0).shape == (2, 1, 6, 8)
