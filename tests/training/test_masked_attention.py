"""Attention under a mask in blocks: the same numbers, from fewer products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hf_partial_embed.training import masked_attention
from hf_partial_embed.training.masked_attention import MaskedAttention


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    monkeypatch.setattr(masked_attention, "_BLOCK", 4)


def tensors(queries, keys, heads=2, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, queries, 8), *[(batch, heads, keys, 8)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(True) for shape in shapes]


def run(parts, **options):
    output = F.scaled_dot_product_attention(*parts, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), parts)]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_mask_gives_the_same_output_and_gradients(data):
    queries, keys = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 40))
    shape = (data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2])), queries, keys)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    mask = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.05, 0.5, 1.0]))
    if data.draw(st.booleans()):
        mask &= torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    parts = tensors(queries, keys)
    expected = run(parts, attn_mask=mask, scale=0.3)
    with MaskedAttention():
        found = run(parts, attn_mask=mask, scale=0.3)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12, equal_nan=True)


def products(parts, mask):
    """Products of all attentions, forward and backward."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own = {
        kernel: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counted:
        F.scaled_dot_product_attention(*parts, attn_mask=mask).sum().backward()
    return counted.get_total_flops()


@pytest.mark.parametrize(("window", "part"), [(None, 0.8125), (16, 0.53)])
def test_what_no_query_of_a_block_sees_is_left_out(window, part, monkeypatch):
    """Half of the positions after the other half, four blocks: 13 of 16 products. And a window shorter than both."""
    monkeypatch.setattr(masked_attention, "_BLOCK", 16)
    mask = torch.ones(64, 128, dtype=torch.bool).tril(64)
    if window is not None:
        mask = mask.triu(64 - window)
    parts = tensors(64, 128)
    whole = products(parts, mask)
    with MaskedAttention():
        found = products(parts, mask)
    assert found <= part * whole and (window or found == part * whole)


def test_other_masks_and_functions_are_as_always():
    parts = tensors(8, 8)
    numeric = torch.zeros(8, 8, dtype=torch.float64)
    for options in ({}, {"is_causal": True}, {"attn_mask": numeric}):
        expected = run(parts, **options)
        with MaskedAttention():
            assert all(map(torch.equal, run(parts, **options), expected))
