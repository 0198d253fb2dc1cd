"""What fuzzing has found: each case once more, without the search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuzz.operators import SCHEMAS, sound
from torch_winnow import kvcache, unmasking
from torch_winnow.kvcache import BlockPool, PagedKVCache
from torch_winnow.resampling import FKSteering

TENSORS = [
    (name, argument.name)
    for name, schema in SCHEMAS.items()
    for argument in schema.arguments
    if str(argument.type) == "Tensor"
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_none_for_a_tensor_is_refused_by_name(name: str, argument: str):
    """PyTorch lets it pass; what followed spoke of device types and scalar type 46."""
    arguments = sound(name, argument)
    others = [value for key, value in arguments.items() if key != argument]
    if not any(isinstance(value, (Tensor, list)) for value in others):
        pytest.skip("PyTorch's dispatcher refuses a call without tensors")
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        getattr(torch.ops.winnow, name)(**arguments | {argument: None})


def test_linear_logit_stats_of_no_rows_has_the_shapes_that_its_fake_says():
    options = dict.fromkeys(("bias", "mask", "suppress_ids", "target_ids", "seed"))
    options |= {"temperature": 1.0, "raw": False, "shift": False}
    operands = torch.ones(2, 0, 3), torch.ones(5, 3)
    real = torch.ops.winnow.linear_logit_stats(*operands, **options)
    fake = torch.ops.winnow.linear_logit_stats(*(x.to("meta") for x in operands), **options)
    assert [x.shape for x in real] == [x.shape for x in fake]


def test_linear_logit_stats_refuses_ids_of_another_dtype():
    options = dict.fromkeys(("bias", "mask", "target_ids", "seed"))
    options |= {"temperature": 1.0, "raw": False, "shift": False}
    for ids in (torch.zeros(2, dtype=torch.complex64), torch.tensor(1.5)):
        with pytest.raises(ValueError, match="^suppress_ids: expected"):
            torch.ops.winnow.linear_logit_stats(
                torch.ones(2, 3), torch.ones(5, 3), suppress_ids=ids, **options
            )


def test_fakes_refuse_what_has_no_shape():
    with pytest.raises(ValueError, match="^outs: expected at least one"):
        torch.ops.winnow.merge_attention([], [torch.zeros(1, 1, 1, device="meta")])
    with pytest.raises(ValueError, match="^rows, count: expected at least 0"):
        torch.ops.winnow.uniforms(torch.tensor(0, device="meta"), -1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_keys_of_no_dimensions_have_no_memory(dtype):
    """Undefined behaviour that only a sanitizer sees."""
    pages, table = torch.zeros(2, 1, 4, 0, dtype=dtype), torch.zeros(1, 2, dtype=torch.int32)
    lengths = torch.tensor([3], dtype=torch.int32)
    scales = torch.ones(2, 1) if dtype == torch.int8 else None
    summaries = kvcache.block_summaries(pages, table, lengths, key_scales=scales)
    assert summaries.shape == (1, 1, 2, 2, 0)
    query = torch.zeros(1, 1, 1, 0)
    both = {"key_scales": scales, "value_scales": scales}
    assert kvcache.paged_attention(query, pages, pages, table, lengths, **both).shape == query.shape


def pool(**options) -> BlockPool:
    sizes = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 3, "block_size": 4}
    return BlockPool(**{"num_blocks": 4, "dtype": torch.float32} | sizes | options)


KEY = torch.ones(1, 1, 3, 2)
TABLE, LENGTHS = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
RUNS = torch.tensor([[[0, 0, 1]]])
MASS = torch.ones(1, 1, 3)
HUGE = 2**62
SELECT = {"k": 2, "seq_lens": LENGTHS}
CALLS = {
    "block_size: expected": lambda: kvcache.select_blocks(MASS, **SELECT, block_size=HUGE),
    "key_pages: expected": lambda: kvcache.attention_mass(KEY, "pages", TABLE, LENGTHS),
    "lse: expected": lambda: kvcache.attention_mass(KEY, KEY, TABLE, LENGTHS, lse=0.5),
    "num_blocks: expected": lambda: pool(head_dim=HUGE),
    "num_blocks: expected pages": lambda: pool().grow(HUGE),
    "device: expected": lambda: pool(device=""),
    "batch_size: expected": lambda: PagedKVCache(pool(), HUGE),
    "parents: expected": lambda: PagedKVCache(pool(), 1).fork(torch.zeros(1, device="meta").int()),
    "capacity, heavy": lambda: kvcache.h2o_positions(MASS, LENGTHS, heavy=HUGE, recent=1),
    "key: expected": lambda: kvcache.similar_runs(None, LENGTHS, threshold=0.5),
    "threshold: expected": lambda: kvcache.similar_runs(KEY, LENGTHS, threshold=b"half"),
    "key, lengths: expected": lambda: kvcache.similar_runs(KEY + 0j, LENGTHS, threshold=0.5),
    "value: expected": lambda: kvcache.merge_runs(KEY, None, RUNS),
    "runs: expected int": lambda: kvcache.merge_runs(KEY, KEY, RUNS.float()),
    "runs: expected numbers": lambda: kvcache.merge_runs(KEY, KEY, RUNS * HUGE),
    "mass: expected": lambda: kvcache.merge_similar_(
        PagedKVCache(pool(key_bias=True), 0), threshold=0.5, mass=-1.0
    ),
    "logits: expected": lambda: unmasking.logit_stats([], vocab_start=0),
    "steps: expected": lambda: unmasking.presets.dream(gen_length=4, steps=HUGE, alg="entropy"),
    "tokens: expected": lambda: unmasking.Template([("a", 2)], 0).read((), "a"),
    "name: expected": lambda: unmasking.Template([("a", 2)], 0).read(torch.zeros(2).long(), []),
}


@pytest.mark.parametrize("text", CALLS)
def test_errors_that_spoke_of_something_else(text: str):
    with pytest.raises(ValueError, match=f"^{text}"):
        CALLS[text]()


def test_no_particle_is_the_best_of_none():
    steering = FKSteering(seed=1)
    steering.step(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="^reward: expected at least one particle"):
        steering.best()
