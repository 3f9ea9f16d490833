"""Which way tokens in groups go through an FFN, and the schedule of the kernels. The kernels themselves: `interpreted.py` on a CPU, below on a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path as File

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from apportion.measure.macs import executed_macs
from apportion.methods import kernels
from apportion.methods.ffn import acm
from tests.methods.interpreted import CASES, ffn, groups, naive

linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux alone")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
caught = pytest.raises(AssertionError)


@linux
@pytest.mark.slow
def test_the_kernels_are_the_definition_in_the_interpreter():
    """In a process of its own: whether Triton interprets is settled when it is imported. Needs the extra gpu."""
    assert kernels.TRITON, "install the extra gpu: without Triton nothing here says that the kernels are right"
    command = (sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", "tests/methods/interpreted.py")
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=File(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


def check_schedule(schedule) -> None:
    """Every row of every group is in one tile for each run of columns, and no program has nothing to do."""
    for counts, unit, dim in itertools.product(([3, 0, 70, 64], [0, 0, 1], [200, 0, 0], [1, 1, 1, 129, 0]), (1, 16, 65), (1, 64, 130)):
        for columns in (None, dim):
            programs, told = schedule(counts, unit, columns)
            assert all(value % 2 and value >= 3 for value in told)
            plain = [(value - 3) // 2 for value in told]
            entries, covered = list(zip(*[iter(plain)] * 4, strict=True)), dict[int, tuple[int, int]]()
            assert [first for first, *_ in entries] == sorted(first for first, *_ in entries)
            for (first, begin, end, units), after in zip(entries, [*(first for first, *_ in entries[1:]), *[programs] * bool(entries)], strict=True):
                across = -(-(end - begin) // kernels.ROWS)
                assert after - first == across * -(-(units if columns is None else columns) // kernels.COLUMNS)
                for row in range(begin, end):
                    covered[row] = units, covered.get(row, (0, 0))[1] + 1
            wanted = [k * unit for k, count in enumerate(counts) for _ in range(count)]
            assert covered == {row: (units, 1) for row, units in enumerate(wanted) if units or columns is not None}


def test_the_schedule_covers_each_row_once():
    check_schedule(kernels.schedule)


def test_the_schedule_catches_a_tile_that_is_left_out():
    def short(counts, unit, columns):
        programs, told = kernels.schedule(counts, unit, columns)
        return max(programs - 1, 0), told

    with caught:
        check_schedule(short)


def claimed(module: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module with weights that claim to be there, and hold nothing; to be called in a FakeTensorMode."""
    for child in module.modules():
        for name, weight in list(child.named_parameters(recurse=False)):
            setattr(child, name, nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device), requires_grad=False))
    return module


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.ReLU()], ids=str)
def test_what_the_kernels_do(monkeypatch, act):
    monkeypatch.setattr(kernels, "TRITON", True)
    for part in (ffn(8, 16, act), ffn(8, 16, act, gated=True), ffn(8, 16, act, bias=False)):
        with FakeTensorMode():
            x = torch.empty(2, 5, 8, device="cuda")
            for dtype in kernels.DTYPES:
                assert kernels.plain_because(claimed(part, "cuda", dtype), x.to(dtype)) == ""


def test_what_they_leave_to_plain_products_has_a_reason(monkeypatch):
    part = ffn(8, 16, nn.GELU())
    with FakeTensorMode():
        part, x = claimed(part, "cuda"), torch.empty(2, 5, 8, device="cuda")
        monkeypatch.setattr(kernels, "TRITON", False)
        assert "extra `gpu`" in kernels.plain_because(part, x)
        monkeypatch.setattr(kernels, "TRITON", True)
        assert "on cpu" in kernels.plain_because(part, x.to("cpu"))
        assert "gradient" in kernels.plain_because(part, x.clone().requires_grad_())
        assert "torch.float64" in kernels.plain_because(part, x.double()) and "torch.float32" in kernels.plain_because(part, x.half())
        torch.set_autocast_enabled("cuda", True)
        assert "autocast" in kernels.plain_because(part, x)
        torch.set_autocast_enabled("cuda", False)
        part.down.weight.requires_grad_()
        assert "gradient" in kernels.plain_because(part, x)
        with torch.no_grad():
            assert kernels.plain_because(part, x) == ""
            part.act = nn.Tanh()
            assert "Tanh" in kernels.plain_because(part, x)
            part.up = nn.Linear(8, 16)
            assert "no plain matrix" in kernels.plain_because(part, x)


@linux
@pytest.mark.slow
def test_on_a_gpu_groups_are_one_operator_of_the_graph_and_on_a_cpu_plain_products():
    for where, times in (("cuda", 1), ("cpu", 0)):
        module = Dealt()
        with FakeTensorMode():
            x, rows = torch.empty(2, 5, 8, device=where), torch.empty(10, dtype=torch.int64, device=where)
            graph = torch.export.export(claimed(module, where), (x, rows), strict=True).graph
        found = [node for node in graph.nodes if "grouped_ffn" in str(node.target)]
        assert len(found) == times and all(node.meta["val"].shape == (10, 8) for node in found)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "given"), [("_up", {"ACT": "silu", "GATE": True, "GATE_BIAS": True}), ("_down", {})])
def test_they_compile_to_tensor_cores_for_a_gpu_that_is_not_here(kernel, given):
    """In bfloat16, which the interpreter cannot run: this says that it compiles, not that it is right."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from apportion.methods import triton_kernels

    function = getattr(triton_kernels, kernel)
    constants = {**given, "GROUPS": 3, "BIAS": True, "PRECISION": "ieee", "M": kernels.ROWS, "N": kernels.COLUMNS, "K": kernels.DEEP}
    types = {"rows": "*i64", "dim": "i32", "hidden_step": "i32", "weight_step": "i32", "schedule": ("i32",) * 12}
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in function.arg_names}
    source = ASTSource(function, signature, {(function.arg_names.index(name),): value for name, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "enable_fp_fusion": True})
    assert "mma.sync" in made.asm["ptx"] and "bf16" in made.asm["ptx"]


class Dealt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = ffn(8, 16, nn.GELU())

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return acm.grouped(self.ffn, x, rows, [2, 3, 5])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_are_the_definition_on_a_gpu(case, dtype):
    part, x, counts = groups(case)
    wanted = naive(part, x, counts, case.unit)
    part, x, flat = part.to("cuda", dtype), x.to("cuda", dtype), counts.flatten().cuda()
    with torch.no_grad():
        assert kernels.plain_because(part, x) == ""
        rows, sizes = flat.argsort(stable=True), flat.bincount(minlength=case.learners + 1).tolist()
        found = acm.grouped(part, x, rows, sizes)
        far = 1e-5 if dtype == torch.float32 else 2e-2
        assert_close(found.float().cpu(), wanted, rtol=far, atol=far * float(wanted.abs().max()))
        spent = int(counts.sum()) * case.unit * case.dim * (3 if case.gated else 2)
        assert executed_macs(lambda: acm.grouped(part, x, rows, sizes)) == spent


@pytest.mark.gpu
@gpu
def test_a_cuda_graph_holds_them_and_they_are_not_slower_than_the_products():
    from apportion.measure.latency import interleaved, ratio

    part, x = ffn(384, 1536, nn.GELU()).cuda().half(), torch.randn(32, 197, 384, device="cuda", dtype=torch.float16)
    rows, sizes = torch.randperm(32 * 197, device="cuda"), [0, 32 * 66, 32 * 66, 32 * 65, 0]

    def captured(call) -> torch.cuda.CUDAGraph:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answers.append(call())
        return graph

    def plain() -> Tensor:
        groups = x.flatten(0, 1).index_select(0, rows).split(sizes)
        out = torch.cat([part(group, 384 * k) for k, group in enumerate(groups) if len(group)])
        return out.index_select(0, torch.zeros_like(rows).scatter(0, rows, torch.arange(len(rows), device="cuda"))).view_as(x)

    answers: list[Tensor] = []
    with torch.no_grad():
        kernel, products = captured(lambda: acm.grouped(part, x, rows, sizes)), captured(plain)

    def timed(graph: torch.cuda.CUDAGraph):
        def call() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return call

    times = interleaved({"kernels": timed(kernel), "products": timed(products)}, repeats=50)
    assert_close(answers[0], answers[1], rtol=2e-2, atol=2e-2)
    found = ratio(times["kernels"], times["products"])
    print(f"kernels over products: {found}")
    assert found.low <= 1
