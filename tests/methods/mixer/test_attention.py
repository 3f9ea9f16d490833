"""Attention: how the rows of its matrices lie, and q/k norm."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from apportion.methods import find
from tests.conftest import DIM, HEADS, shake, tiny, tokens_of


def test_it_equals_the_stock_module_with_rows_regrouped_by_head():
    ours, stock, c = tiny().blocks[0].mixer, nn.MultiheadAttention(DIM, HEADS, batch_first=True).requires_grad_(False), DIM // HEADS
    for name, theirs in (("weight", stock.in_proj_weight), ("bias", stock.in_proj_bias)):
        rows = getattr(ours.qkv, name).view(HEADS, 3, c, -1).transpose(0, 1).reshape(3 * DIM, -1)
        theirs.copy_(rows.view_as(theirs))
    stock.out_proj.weight.copy_(ours.proj.weight)
    stock.out_proj.bias.copy_(ours.proj.bias)
    tokens = tokens_of(2, 9)
    assert_close(ours(tokens, HEADS).out, stock(tokens.x, tokens.x, tokens.x, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def test_query_and_key_are_normed_and_the_value_is_not():
    mixer, tokens = tiny("qk_norm").blocks[0].mixer, tokens_of(2, 9)
    mixer.query_norm, mixer.key_norm = (nn.LayerNorm(DIM // HEADS, elementwise_affine=False) for _ in range(2))
    before = mixer(tokens, HEADS)
    mixer.qkv.weight.view(HEADS, 3, DIM // HEADS, DIM)[:, :2] *= 100
    after = mixer(tokens, HEADS)
    assert_close(after.out, before.out, rtol=1e-3, atol=1e-3)
    mixer.qkv.weight.view(HEADS, 3, DIM // HEADS, DIM)[:, 2] *= 100
    assert not torch.allclose(mixer(tokens, HEADS).out, before.out, atol=0.1)


def on_a_grid(**options):
    """A mixer for 3 by 3 patches after one token."""
    torch.manual_seed(0)
    linear = find("weight", "dense")
    parts = {"qkv": linear(DIM, 3 * DIM), "proj": linear(DIM, DIM), "query_norm": nn.Identity(), "key_norm": nn.Identity()}
    return shake(find("mixer", "attention")(heads=HEADS, channels=DIM // HEADS, grid=3, **parts, **options)).requires_grad_(False)


def scores(mixer, tokens):
    """Weights of attention, (b, h, n, n), by the definition."""
    out = mixer(tokens, HEADS)
    return out.query @ out.key.transpose(2, 3) / (DIM // HEADS) ** 0.5


def test_rotary_positions_of_patches_turn_by_row_and_by_column():
    mixer, plain, tokens, c = on_a_grid(rotary=100.0, start=-0.5, step=2.0), on_a_grid(), tokens_of(2, 10), DIM // HEADS
    got, flat = mixer(tokens, HEADS), plain(tokens, HEADS)
    for place in range(10):
        row, column = divmod(place - 1, 3)
        for pair in range(c // 2):
            axis, i = (row, pair) if pair < c // 4 else (column, pair - c // 4)
            angle = torch.tensor((-0.5 + 2 * axis) * 100 ** (-i / (c // 4)) if place else 0.0)
            turn = torch.complex(angle.cos(), angle.sin())
            for ours, before in ((got.query, flat.query), (got.key, flat.key)):
                wanted = torch.complex(before[:, :, place, pair], before[:, :, place, pair + c // 2]) * turn
                assert_close(torch.complex(ours[:, :, place, pair], ours[:, :, place, pair + c // 2]), wanted, rtol=1e-4, atol=1e-5)


def test_patches_as_far_apart_score_alike():
    mixer, tokens = on_a_grid(rotary=10.0), tokens_of(1, 10)
    same = scores(mixer, tokens._replace(x=tokens.x[:, :1].expand(1, 10, DIM).contiguous()))[0, :, 1:, 1:]
    assert_close(same[:, 0, 4], same[:, 4, 8])
    assert_close(same[:, 1, 5], same[:, 3, 7])
    assert not torch.allclose(same[:, 0, 1], same[:, 0, 3], atol=1e-3)


def test_a_bias_for_each_difference_of_rows_and_columns():
    mixer, plain, tokens = on_a_grid(relative=28), on_a_grid(), tokens_of(2, 10)
    table, seen = mixer.relative.copy_(torch.randn(28, HEADS)), scores(plain, tokens)
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if name != "relative"})
    seen = scores(plain, tokens)
    bias = torch.zeros(HEADS, 10, 10)
    for query in range(10):
        for key in range(10):
            (r, c), (s, d) = divmod(query - 1, 3), divmod(key - 1, 3)
            entry = (r - s + 2) * 5 + c - d + 2 if query and key else {(True, False): 25, (False, True): 26, (True, True): 27}[query == 0, key == 0]
            bias[:, query, key] = table[entry]
    value = mixer.qkv(tokens.x).view(2, 10, HEADS, 3, -1)[:, :, :, 2].transpose(1, 2)
    wanted = mixer.proj(((seen + bias).softmax(-1) @ value).transpose(1, 2).reshape(2, 10, DIM))
    assert_close(mixer(tokens, HEADS).out, wanted, rtol=1e-4, atol=1e-5)


def test_a_merged_patch_stands_where_its_first_stood():
    mixer, tokens = on_a_grid(rotary=100.0, relative=28), tokens_of(1, 10)
    origin = torch.tensor([[0, 1, 2, 1, 3, 4, 5, 6, 7, 8]])
    merged = mixer(tokens._replace(x=tokens.x[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]], size=torch.tensor([[1.0, 2, 1, 1, 1, 1, 1, 1, 1]]), origin=origin), HEADS)
    assert_close(merged.key, mixer(tokens, HEADS).key[:, :, [0, 1, 2, 4, 5, 6, 7, 8, 9]])


def test_a_norm_over_heads_follows_their_order():
    mixer, tokens = on_a_grid(norm=find("norm", "nested")(DIM, eps=1e-6), rotary=10.0, relative=28), tokens_of(2, 10)
    before = mixer(tokens, HEADS).out
    mixer.permute(torch.tensor([2, 0, 3, 1]))
    assert_close(mixer(tokens, HEADS).out, before, rtol=1e-4, atol=1e-5)
    assert mixer(tokens, 1).out.isfinite().all()
