"""Multiply-adds and bytes against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apportion.errors import EngineError
from apportion.measure.macs import executed_macs
from apportion.measure.memory import peak_bytes

Q = torch.randn(2, 3, 5, 8)
K = torch.randn(2, 3, 7, 8)
V = torch.randn(2, 3, 7, 8)
ATTENTION = 2 * 3 * 5 * 7 * (8 + 8)


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        pytest.param(lambda: nn.Linear(8, 7)(Q), 2 * 3 * 5 * 8 * 7, id="linear"),
        pytest.param(lambda: F.linear(Q, torch.ones(7, 8)), 2 * 3 * 5 * 8 * 7, id="linear-no-bias"),
        pytest.param(lambda: nn.Conv2d(4, 6, 3, stride=2)(torch.ones(2, 4, 9, 9)), 2 * 6 * 4 * 4 * 4 * 9, id="conv-stride"),
        pytest.param(lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2)(torch.ones(1, 4, 8, 8)), 6 * 8 * 8 * 2 * 9, id="conv-groups"),
        pytest.param(lambda: nn.Conv1d(4, 6, 3)(torch.ones(1, 4, 10)), 6 * 8 * 4 * 3, id="conv1d"),
        pytest.param(lambda: nn.ConvTranspose2d(4, 6, 2, stride=2)(torch.ones(1, 4, 5, 5)), 4 * 25 * 6 * 4, id="conv-transposed"),
        pytest.param(lambda: torch.bmm(torch.ones(3, 4, 5), torch.ones(3, 5, 6)), 3 * 4 * 5 * 6, id="bmm"),
        pytest.param(lambda: torch.baddbmm(torch.ones(3, 4, 6), torch.ones(3, 4, 5), torch.ones(3, 5, 6)), 3 * 4 * 5 * 6, id="baddbmm"),
        pytest.param(lambda: torch.ones(4, 6).addmm_(torch.ones(4, 5), torch.ones(5, 6)), 4 * 5 * 6, id="in-place"),
        pytest.param(lambda: torch.mm(torch.ones(4, 5), torch.ones(5, 6), out=torch.empty(4, 6)), 4 * 5 * 6, id="out"),
        pytest.param(lambda: torch.ones(4, 5) @ torch.ones(5), 4 * 5, id="matrix-vector"),
        pytest.param(lambda: torch.ones(5) @ torch.ones(5), 5, id="dot"),
        pytest.param(lambda: torch.einsum("bhnd,bhmd->bhnm", Q, K), 2 * 3 * 5 * 7 * 8, id="einsum"),
        pytest.param(lambda: torch.cdist(torch.ones(40, 4), torch.ones(50, 4)), 40 * 50 * 4, id="distances"),
        pytest.param(lambda: F.scaled_dot_product_attention(Q, K, V), ATTENTION, id="attention"),
        pytest.param(lambda: F.scaled_dot_product_attention(Q, K, V, attn_mask=torch.ones(5, 7).bool()), ATTENTION, id="attention-mask"),
        pytest.param(lambda: F.scaled_dot_product_attention(Q, Q, Q, is_causal=True), 2 * 3 * 5 * 5 * 16, id="attention-causal"),
        pytest.param(lambda: F.scaled_dot_product_attention(Q, K[:, :1], V[:, :1], enable_gqa=True), ATTENTION, id="attention-grouped"),
        pytest.param(lambda: torch.softmax(Q.exp() * 2 + 1, -1).sum(), 0, id="elementwise"),
        pytest.param(lambda: F.interpolate(torch.ones(1, 3, 8, 8), scale_factor=2.0, mode="bilinear"), 0, id="resize"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_macs_by_hand(call, macs, inference):
    with torch.inference_mode(inference):
        assert executed_macs(call) == macs


@pytest.mark.parametrize("backend", [torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION])
def test_every_attention_backend_counts_the_same(backend):
    with torch.nn.attention.sdpa_kernel(backend):
        assert executed_macs(lambda: F.scaled_dot_product_attention(Q, K, V)) == ATTENTION


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_every_cuda_attention_backend_counts_the_same(backend):
    q, k, v = (torch.randn(2, 3, n, 64, device="cuda", dtype=torch.float16) for n in (16, 32, 32))
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        assert executed_macs(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 3 * 16 * 32 * 128


def test_a_product_without_a_formula_is_refused():
    x, w = Q[0], torch.ones(8, 8)
    with pytest.raises(EngineError, match="attention"), torch.inference_mode():
        executed_macs(lambda: torch._native_multi_head_attention(x, x, x, 8, 2, torch.ones(24, 8), torch.ones(24), w, w[0]))
    with pytest.raises(EngineError, match="trilinear"):
        executed_macs(lambda: F.bilinear(torch.ones(2, 3), torch.ones(2, 4), torch.ones(5, 3, 4)))
    with pytest.raises(EngineError, match="fft"):
        executed_macs(lambda: torch.fft.rfft(Q))
    with pytest.raises(EngineError, match="no operator"):
        executed_macs(lambda: 3)
    with pytest.raises(EngineError, match="not dense"):
        executed_macs(lambda: torch.eye(4).to_sparse() @ torch.ones(4, 3))


@pytest.mark.parametrize("inference", [False, True])
def test_peak_bytes_by_hand(inference):
    x, w = torch.randn(64, 32), torch.randn(32, 128)

    def call(rows: int):
        y = x[:rows] @ w
        return torch.relu(y)

    with torch.inference_mode(inference):
        assert peak_bytes(lambda: call(64)) == 2 * 64 * 128 * 4
        assert peak_bytes(lambda: call(32)) == 32 * 128 * 4 * 2
        assert peak_bytes(lambda: x.view(-1)[3:].t()) == 0
        assert peak_bytes(lambda: x.relu_()) == 0


def test_released_memory_is_not_counted_again():
    x = torch.randn(16, 16)

    def chain():
        y = x
        for _ in range(20):
            y = y + 1
        return y

    assert peak_bytes(chain) == 2 * x.nbytes
    kept = []
    assert peak_bytes(lambda: kept.extend(x + i for i in range(5))) == 5 * x.nbytes
    assert peak_bytes(chain) == 2 * x.nbytes


def test_memory_inside_composites_is_seen_in_inference_mode():
    def call():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(Q, K, V)

    plain = peak_bytes(call)
    with torch.inference_mode():
        assert peak_bytes(call) >= 2 * 3 * 5 * 7 * 4 + 2 * 3 * 5 * 8 * 4
        assert peak_bytes(call) == plain
