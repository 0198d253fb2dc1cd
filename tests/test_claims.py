"""What the README and the benchmark pages say is what the committed JSON holds, and it runs."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torch_winnow.kvcache import BlockPool, PagedKVCache, paged_attention

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="needs the source checkout")


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("tabulate")
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("report")
    sys.path.pop(0)


RUNS = [p for p in sorted(RESULTS.glob("*.json")) if "benchmarks" in json.loads(p.read_text())]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_tables_are_made_from_the_json(report, path):
    assert path.with_suffix(".md").read_text() == report.text(json.loads(path.read_text()))


def test_losses_are_shown(report):
    rows = [("op 1", "rival", 0.5), ("op 2", "rival", 3.0), ("op 3", "rival", 0.25)]
    assert [row[0] for row in report.losses(rows)] == ["op 3", "op 1"]
    assert "in 1 of 3 shapes" in report.summary(rows)
    assert "op 3" in report.losses_table(rows)
    assert "op 2" not in report.losses_table(rows)


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("attention", "cat_attention forward N"),
        ("kvcache", "paged_attention decode"),
        ("unmasking", "unmasking step"),
        ("resampling", "resample systematic"),
    ],
)
def test_the_readme_claims_what_was_measured(report, family, shapes):
    ratios = [ratio for name, _, ratio in report.newest_rows() if name.startswith(shapes)]
    (row,) = re.findall(rf"^\| \[{family}\].*\|$", README, re.MULTILINE)
    low, high = (float(number) for number in re.search(r"([\d.]+)× to ([\d.]+)×", row).groups())
    assert low == pytest.approx(min(ratios), rel=0.02)
    assert high == pytest.approx(max(ratios), rel=0.02)


def newest_groups(report):
    groups = {}
    for path in RUNS:
        groups |= report.by_group(json.loads(path.read_text())["benchmarks"])
    return groups


def test_transformers_saves_what_the_page_says(report):
    groups = newest_groups(report)
    page = (ROOT / "docs/recipes/transformers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+), (\w+) \|(.*)\| ([\d, ]+) MiB \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for tokens, dtype, times, memory in rows:
        entries = groups[f"transformers decode 1x{tokens} {dtype}"]
        names = ("winnow", "winnow, sparse 10%", "DynamicCache + sdpa", "StaticCache + sdpa")
        for name, time in zip(names, re.findall(r"([\d.]+) ms", times), strict=True):
            assert float(time) == pytest.approx(1e3 * entries[name]["stats"]["median"], rel=0.05)
        names = ("winnow", "DynamicCache + sdpa", "StaticCache + sdpa")
        for name, size in zip(names, memory.split(", "), strict=True):
            found = entries[name]["extra_info"]["cache_bytes"] / 2**20
            assert float(size) == pytest.approx(found, abs=0.6)


def test_codes_are_as_fast_as_the_page_says(report):
    groups = newest_groups(report)
    page = (ROOT / "docs/kvcache/quantised.md").read_text(encoding="utf-8")
    for group_size, heads in ((1, 8), (4, 32)):
        (row,) = re.findall(rf"^\| {group_size} \|(.*)\|$", page, re.MULTILINE)
        for code, cell in zip(("int8", "float8"), row.split("|"), strict=True):
            ratios = [
                impls["winnow"]["stats"]["median"] / impls[f"winnow {code}"]["stats"]["median"]
                for name, impls in groups.items()
                if name.startswith("paged_attention quantised") and f" {heads} heads" in name
            ]
            said = [float(x) for x in cell.split(" to ")]
            assert [min(said), max(said)] == pytest.approx([min(ratios), max(ratios)], rel=0.05)


def test_the_snippets_of_the_readme_run():
    pytest.importorskip("transformers", minversion="5")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, **sizes)
    names = {
        "block_size": 17,
        "model": LlamaForCausalLM(config),
        "prompt": torch.randint(3, 30, (2, 5)),
        "denoiser": lambda tokens: torch.randn(*tokens.shape, 10),
        "tokens": torch.full((2, 40), 9),
        "mask_id": 9,
        "denoising_steps": range(3),
        "latents": torch.randn(2, 4, 3),
        "denoise": lambda latents, step: latents + torch.randn_like(latents),
        "reward": lambda latents: latents.sum(-1),
    }
    names["query"], names["key"], names["value"] = torch.randn(3, 1, 2, 40, 8)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == (1, 2, 40, 8)
    assert names["text"].shape[1] > 5
    assert not (names["result"].tokens == 9).any()
    assert names["latents"].shape == (2, 4, 3)


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def quantised_errors(dtype, large_channels, step):
    """Of keys and of attention, relative to float32, as docs/kvcache/quantised.md measures them."""
    tokens, dim = 1024, 128
    key, value = torch.randn(2, 1, 8, tokens, dim).unbind()
    if large_channels:
        key[..., :4] *= 10
    query = torch.randn(1, 32, 1, dim)
    pool = BlockPool(16, num_layers=1, num_kv_heads=8, head_dim=dim, dtype=dtype)
    cache = PagedKVCache(pool, 1)
    for k, v in zip(key.split(step, 2), value.split(step, 2), strict=True):
        cache.append(0, k, v)
    scales = {"key_scales": pool.key_scales[0], "value_scales": pool.value_scales[0]}
    pages = pool.key_pages[0], pool.value_pages[0], cache.block_table, cache.seq_lens
    out = paged_attention(query, *pages, **scales)
    stored = (pages[0].float() * scales["key_scales"][..., None, None])[cache.block_table[0].long()]
    stored = stored.transpose(0, 1).flatten(1, 2)
    exact = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in ((stored, key[0]), (out, exact))
    ]


@pytest.mark.parametrize("name", ["int8", "float8 e4m3"])
@pytest.mark.parametrize("large_channels", [False, True])
def test_the_error_of_quantised_pages_is_what_the_page_says(name, large_channels):
    page = (ROOT / "docs/kvcache/quantised.md").read_text(encoding="utf-8")
    label = f"{name}, large channels" if large_channels else name
    (row,) = re.findall(rf"^\| {label} \|(.*)\|$", page, re.MULTILINE)
    said = [[float(x) for x in cell.split(" to ")] for cell in row.split("|")]
    dtype = torch.int8 if name == "int8" else torch.float8_e4m3fn
    at_once, one_by_one = (quantised_errors(dtype, large_channels, step) for step in (1024, 1))
    found = [at_once[0], one_by_one[0], at_once[1], one_by_one[1]]
    for value, bounds in zip(found, said, strict=True):
        assert 0.9 * min(bounds) <= value <= 1.1 * max(bounds)
