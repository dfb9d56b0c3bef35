"""The Triton backend beyond its results, which the contract tests of the ops cover: its binaries, its launches, its limits.

Nothing here needs a GPU: Triton compiles ahead of time, for every architecture, in processes without the interpreter.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import disassembly
import pytest
import test_build_drafts
import test_draft_step
import test_logit_floor
import test_predict_tokens
import test_rank_positions
import test_scored_tokens
import test_select_transfer
import test_verify_drafts
import torch
from budgets import ALLOWED_STACK, BUDGETS
from conftest import INTERPRETED, on_backend
from hypothesis import given, settings
from states import FEW, few_combinations

import freedave_kernels as fk
from freedave_kernels import registry
from freedave_kernels.contract import OPS
from freedave_kernels.reference.predict_tokens import predict_tokens as reference
from freedave_kernels.triton import launch, merge_predictions, scan_logits

DEVICE = "cpu" if INTERPRETED else "cuda"
TESTS = Path(__file__).parent
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

pytestmark = pytest.mark.skipif(
    "triton" not in registry.BACKENDS or fk.triton.unavailable() is not None, reason=fk.triton.unavailable() or ""
)


# A CUDA or ROCm build of torch brings another Triton, which may need a few registers more.
PINNED = re.search(r"triton==(\S+)", (TESTS.parent / "requirements/triton.txt").read_text())[1]
as_pinned = pytest.mark.skipif(
    fk.triton.unavailable() is None and metadata.version("triton") != PINNED, reason=f"budgets are for triton {PINNED}"
)


def run(*arguments: str, environment: dict[str, str] = COMPILED) -> str:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def triton() -> Iterator[str]:
    yield from on_backend("triton")


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder an architecture, holding what triton_stub.py writes."""
    folder = tmp_path_factory.mktemp("binaries")
    groups = [["sm_90"], [name for name in ARCHITECTURES if name != "sm_90"]]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda group: run("triton_stub.py", str(folder), *group), groups))
    return folder


def files(folder: Path, suffix: str) -> list[Path]:
    found = sorted(folder.glob(f"*.{suffix}"))
    assert found
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(binaries, architecture):
    assert {path.name.split(".")[1] for path in files(binaries / architecture, "json")} == {
        "scan_chunk", "merge_states", "find_floor", "rank_tile", "select_row", "build_sequence",
        "verify_sequence", "step_sequence", "step_pooled", "attend", "merge_parts", "keep_rows",
    }  # fmt: skip


@as_pinned
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(binaries, architecture):
    if architecture == "gfx942":
        for path in files(binaries / architecture, "amdgcn"):
            # Scalar registers are spilled to lanes of vector registers, which takes no memory.
            spills = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", path.read_text())
            assert spills and set(spills) == {"0"}, path.name
    else:
        for path in files(binaries / architecture, "cubin"):
            allowed = max(
                (len(name), size) for name, size in {"": 0, **ALLOWED_STACK}.items() if path.name.startswith(name)
            )
            for used in disassembly.resources(path).values():
                assert used.stack <= allowed[1] and used.local == 0, path.name


def test_a_pool_is_written_when_it_has_been_read(binaries):
    """A barrier stands between what the threads of a program read and what any of them overwrites, and between rows that
    lose what the window has left and rows that are written anew. (The interpreter, where results are compared, has no
    threads.)
    """
    (pooled,) = (binaries / "sm_90").glob("pooled_step 32x1024 *.ttgir")
    stores = re.findall(r"tt\.store|ttg\.barrier all|gpu\.barrier", pooled.read_text())
    barriers = [place for place, name in enumerate(stores) if name != "tt.store"]
    # Three of either kind; at the end ages, extents, the start.
    assert [len(stores) - 1 - place for place in barriers] == [3 + 3 + 3 + 1, 3 + 3]


# Bytes a block may have, the driver's own left out.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_suffices(binaries, architecture):
    for path in files(binaries / architecture, "json"):
        assert json.loads(path.read_text())["shared"] <= SHARED_MEMORY[architecture], path.name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_keys_are_copied_16_bytes_at_a_time(binaries, architecture):
    """Asynchronously, into shared memory."""
    for case in ("128", "128 many rows", "128 one draft"):
        path = binaries / architecture / f"draft_attention bfloat16 {case}.attend.ptx"
        if path.exists():  # not every case is compiled for every architecture
            sizes = set(re.findall(r"cp\.async\.c.\.shared\.global .*?\], .*?\], (\w+)", path.read_text()))
            assert sizes == {"0x10"}, case


def test_hopper_multiplies_by_warp_groups(binaries):
    for rows in ("", " many rows"):
        ptx = (binaries / "sm_90" / f"draft_attention bfloat16 128{rows}.attend.ptx").read_text()
        assert set(re.findall(r"wgmma\.mma_async.*?(m\d+n\d+k\d+)", ptx)) == {"m64n32k16", "m64n128k16"}


@as_pinned
@pytest.mark.parametrize(
    ("architecture", "case"), [key[1:] for key in BUDGETS if key[0] == "triton"], ids=lambda value: value
)
def test_budgets(binaries, architecture, case):
    """Of a case's main kernel: the first that it launches."""
    budget = BUDGETS["triton", architecture, case]
    main = {
        "predict_tokens": "scan_chunk",
        "logit_floor": "find_floor",
        "draft_step": "step_sequence",
        "pooled_step": "step_pooled",
        "rank_positions": "rank_tile",
        "draft_attention": "attend",
        "keep": "keep_rows",
    }
    name = main[case.split()[0]]
    cubin = binaries / architecture / f"{case}.{name}.cubin"
    used = disassembly.resources(cubin)[name]
    assert used.registers <= budget.registers
    assert used.shared <= budget.shared
    if budget.instructions is None:
        return
    kernel = disassembly.instructions(cubin)[name]
    hot, loads = vector_loads(kernel)
    warps = json.loads(cubin.with_suffix(".json").read_text())["warps"]
    assert loads >= budget.vector_loads
    assert disassembly.fewest_executed(kernel, hot) * warps * 32 / 16384 <= budget.instructions


def vector_loads(kernel: list[disassembly.Instruction]) -> tuple[list[disassembly.Instruction], int]:
    """The block with the most 16-byte loads that no predicate guards, which is how whole chunks are read; and how many."""
    counted = [
        (sum(instruction.opcode == "LDG.E.128" and not instruction.predicate for instruction in block), number, block)
        for number, block in enumerate(disassembly.blocks(kernel))
    ]
    most, _, block = max(counted)
    return block, most


@pytest.mark.parametrize("case", ["bfloat16 prob", "float16 prob", "float32 prob", "bfloat16 neg_entropy"])
def test_exponentials_flush_to_zero(binaries, case):
    """Without flushing, each would take two more instructions."""
    ptx = (binaries / "sm_90" / f"predict_tokens {case}.scan_chunk.ptx").read_text()
    assert set(re.findall(r"ex2\.approx\.[a-z0-9.]+", ptx)) == {"ex2.approx.ftz.f32"}


@pytest.mark.parametrize(
    ("case", "others"),
    [
        ("bfloat16 prob", ["bfloat16 prob 2 bytes", "bfloat16 prob 4 bytes", "bfloat16 prob everything"]),
        ("float32 prob", ["float32 prob 4 bytes"]),
    ],
)
def test_unaligned_rows_are_summed_in_the_same_order(binaries, case, others):
    """However a chunk is loaded, the same thread holds the same group, and the sum over groups has the same layout.

    The sum within a group is written out in the source. On a GPU the contract tests compare the bits themselves.
    """
    layout = sum_layout(binaries / "sm_90" / f"predict_tokens {case}.scan_chunk.ttgir")
    assert "sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [8]" in layout
    for other in others:
        assert sum_layout(binaries / "sm_90" / f"predict_tokens {other}.scan_chunk.ttgir") == layout


def sum_layout(path: Path) -> str:
    """How the operand of the kernel's one sum lies across registers, lanes and warps."""
    text = path.read_text()
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", text, re.M))
    operands = re.findall(
        r'"tt\.reduce"(?:(?!"tt\.reduce").)*?arith\.addf.*?\}\) : \(tensor<\w+, (#\w+)>\)', text, re.S
    )
    assert len(operands) == 1
    return layouts[operands[0]]


def test_launches():
    """What an op launches, and that a decoder whose batch grows never waits for a compiler."""
    code = """
import json, torch, triton_stub as stub
from triton_stub import MASK, draft_step, drafts, predict_tokens, rank_positions
driver = stub.use("sm_90")
facts = {}
for batch in (1, 2, 3, 16, 17, 64):
    driver.grids.clear()
    logits = torch.zeros(batch, 4, 32, 40000, dtype=torch.bfloat16)[:, :, :2]
    rest = (None, "prob", None, False, None, None, None, None, None, "exclude")
    predict_tokens(logits, torch.full((batch, 4, 2), MASK), MASK, *rest)
    predicted = list(driver.grids)
    ids = torch.full((batch, 4, 32), MASK)
    confidence = torch.zeros(batch, 4, 32)
    for steps in (1, 8):
        for tokens, block in ((1, 16), (2, None)):
            static = (tokens, None, None, None, "threshold", "confidence", block)
            rule = (*static, "recycled", "exact", None, None, None, None)
            draft_step(ids, ids, confidence, torch.full((batch,), 4), MASK, steps, *rule)
    facts[batch] = [predicted, driver.grids[len(predicted):]]
print(json.dumps([facts, {kernel.function.__name__: len(kernel.compiled) for kernel in stub.KERNELS}]))
"""
    facts, compiled = json.loads(run("-c", code))
    assert {name: count for name, count in compiled.items() if count} == {
        "scan_chunk": 1, "merge_states": 1, "step_sequence": 1,
    }  # fmt: skip
    for batch, (predicted, stepped) in facts.items():
        rows = int(batch) * 4
        assert predicted == [[rows, 2, 3], [-(-rows * 2 // 16), 1, 1]]  # chunks depend on the vocabulary alone
        assert stepped == [[int(batch), 1, 1]] * 4  # one launch a call


def test_launches_of_pooled_drafts():
    """One, of one binary: for a batch, windows, pools and numbers of drafts of usual sizes."""
    code = """
import json, triton_stub as stub
driver = stub.use("sm_90")
for batch, count, length, states in ((1, 1, 4, 1), (1, 8, 32, 24), (7, 8, 20, 16), (0, 8, 20, 16), (16, 4, 17, 12)):
    stub.pooled(count, length, states, "pooled", batch)()
print(json.dumps([driver.grids, len(stub.step_pooled.compiled)]))
"""
    assert json.loads(run("-c", code)) == [[[1, 1, 1], [1, 1, 1], [7, 1, 1], [16, 1, 1]], 1]


def test_launches_of_a_layer():
    """Two at most, one where rows fill the machine; and a batch that grows or is longer never waits for a compiler."""
    code = """
import json, torch, triton_stub as stub
driver = stub.use("sm_90")
facts = {}
for batch, count, length in ((1, 1, 4), (1, 8, 4), (1, 8, 20), (3, 8, 4), (2, 8, 20), (16, 8, 20), (5, 4, 32)):
    driver.grids.clear()
    stub.attention(torch.bfloat16, 128, batch, count, length)()
    facts[f"{batch} {count} {length}"] = list(driver.grids)
driver.grids.clear()
stub.kept()()
facts["keep"] = list(driver.grids)
print(json.dumps([facts, {kernel.function.__name__: len(kernel.compiled) for kernel in stub.KERNELS}]))
"""
    facts, compiled = json.loads(run("-c", code))
    assert {name: count for name, count in compiled.items() if count} == {
        "attend": 4,  # few rows of one draft; many, whose splits or spans are shared out, or nothing
        "merge_parts": 2,  # of splits and of spans
        "keep_rows": 1,
    }
    assert facts == {
        "1 1 4": [[1, 17, 8], [8, 8, 1]],  # row tiles, parts of 8,192 stored positions and a window, groups
        "1 8 4": [[2, 17, 8], [16, 8, 1]],
        "1 8 20": [[10, 6, 8], [80, 8, 1]],
        "3 8 4": [[2, 6, 24], [16, 24, 1]],
        "2 8 20": [[10, 1, 16]],
        "16 8 20": [[10, 1, 128]],
        "5 4 32": [[8, 1, 40]],
        "keep": [[5, 1, 2]],  # tiles of 32 rows, sequences, layers
    }


def test_an_empty_batch_launches_nothing():
    code = """
import torch, triton_stub as stub
driver = stub.use("sm_90")
ids = torch.zeros(0, 4, 8, dtype=torch.int64)
stub.predict_tokens(torch.zeros(0, 4, 8, 50), ids, 9, None, "prob", None, False, None, None, None, None, None, "exclude")
rule = (1, None, None, None, "threshold", "confidence", None, "nested", "exact", None, None, None, None)
stub.draft_step(ids, ids, torch.zeros(0, 4, 8), ids[:, 0, 0], 9, 2, *rule)
print(len(driver.grids))
"""
    assert run("-c", code).strip() == "0"


CONTRACT = {
    "predict_tokens": (test_scored_tokens.scored_calls, test_predict_tokens.run),
    "partial_predictions": (
        test_scored_tokens.scored_calls_in_parts,
        test_scored_tokens.run_in_parts,
    ),
    "logit_floor": (test_logit_floor.calls, test_logit_floor.run),
    "rank_positions": (test_rank_positions.calls, test_rank_positions.run),
    "select_transfer": (test_select_transfer.calls, test_select_transfer.run),
    "build_drafts": (test_build_drafts.calls, test_build_drafts.run),
    "verify_drafts": (test_verify_drafts.calls, test_verify_drafts.run),
    "draft_step": (test_draft_step.calls, test_draft_step.run),
}


@pytest.mark.skipif(not INTERPRETED, reason="elsewhere it would launch kernels")
@pytest.mark.parametrize("op", CONTRACT)
def test_contract_tests_compile_little(monkeypatch, op):
    """Where kernels are compiled, examples share a few binaries, among which every value of every flag occurs."""
    binaries: dict[str, set[tuple[Any, ...]]] = {}
    calls, run = CONTRACT[op]

    def record(kernel, grid, arguments, constants, others=(), num_warps=4, max_registers=0):
        if 0 not in grid:
            binaries.setdefault(kernel.function.__name__, set()).add((constants, others, num_warps, max_registers))

    @given(call=calls())
    @settings(max_examples=400)
    def draw(call):
        run(*call)

    monkeypatch.setattr(launch.Kernel, "launch", record)
    with fk.use_backend("triton"), few_combinations():
        draw()
    assert binaries
    for name, keys in binaries.items():
        assert len(keys) <= 4 * FEW, name
        for values in map(set, zip(*(constants for constants, *_ in keys), strict=True)):
            assert values == {False, True} or not isinstance(next(iter(values)), bool), (name, keys)


def aliases(body: list[ast.stmt]) -> set[tuple[str, str]]:
    """(x, y) of every `x = y`, those of tuples one by one."""
    found = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign):
                pairs = [(node.targets[0], node.value)]
                if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
                found |= {(x.id, y.id) for x, y in pairs if isinstance(x, ast.Name) and isinstance(y, ast.Name)}
    return found


def lost_in_loops(source: str) -> list[str]:
    """What `x = y` before a loop and in it makes a compiler lose: x keeps its first value, whatever becomes of y."""
    lost = []
    for function in ast.walk(ast.parse(source)):
        for loop in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            if isinstance(loop, (ast.While, ast.For)):
                before = [node for node in function.body if node.lineno < loop.lineno]
                lost += [f"{function.name}: {x} = {y}" for x, y in aliases(before) & aliases(loop.body)]
    return lost


def test_no_loop_loses_a_variable():
    """Triton, which compares values before a loop with those after one pass, takes such a variable for unchanged. (The
    interpreter, where results are compared, does not.)
    """
    kernel = "def kernel(x):\n    last, first = x, 0\n    while x > 0:\n        last = x\n        x -= 1\n"
    assert lost_in_loops(kernel) == ["kernel: last = x"]
    assert lost_in_loops(kernel.replace("last, first = x, 0", "last, first = 0, x")) == []
    for path in Path(fk.triton.__file__).parent.glob("*.py"):
        assert lost_in_loops(path.read_text()) == [], path.name


def test_a_measure_that_no_kernel_knows_is_refused():
    """None takes another's branch."""
    ids, states = torch.tensor([9], device=DEVICE), torch.zeros(1, 1, 6, dtype=torch.float64, device=DEVICE)
    with pytest.raises(KeyError, match="max_logit"):
        scan_logits.scan_logits(
            torch.zeros(1, 8, device=DEVICE), ids, 9, 0, None, "max_logit", None, False, None, None, None, None, 8
        )
    with pytest.raises(Exception, match="this measure has no confidence"):
        merge_predictions.merge_predictions(states, ids, "max_logit", False)


def test_rows_that_are_too_long(triton):
    rows = torch.zeros(1, 2049), torch.ones(1, 2049, dtype=torch.bool)
    assert fk.rank_positions(*rows).shape == (1, 2049)
    message = "select_transfer: backend 'triton' serves windows of at most 2048 positions, got 2049; use"
    with pytest.raises(fk.BackendUnavailableError, match=message):
        fk.select_transfer(*rows)


@pytest.mark.parametrize(
    ("states", "length", "message"),
    [
        (4, 1025, "windows of at most 1024 positions, got 1025; use"),
        (1023, 4, "at most 1024 drafts and states of a pool together, got 2 and 1023; use"),
    ],
)
def test_pools_that_are_too_large(triton, states, length, message):
    ids = torch.full((1, 2, 4), 9)
    pool = fk.draft_pool(1, states, length)
    call = (ids, ids, torch.ones(1, 2, 4), torch.tensor([2]), 9, 2)
    with pytest.raises(fk.BackendUnavailableError, match="draft_step: backend 'triton' serves " + message):
        fk.draft_step(*call, drafting="pooled", pool=pool)
    assert not pool.memory.any()


def test_leading_dimensions_that_no_stride_walks(triton):
    logits = torch.randn(3, 4, 2, 50, generator=torch.Generator().manual_seed(0))[:, ::3, :1]
    ids = torch.full((3, 2, 1), 9)
    odd = torch.full((3, 4, 2), 9)[:, 1:3, :1]
    expected = reference(logits, ids, 9, None, "prob", None, False, None, None, None, None, None, "exclude")
    for input_ids in (ids, odd):
        token_ids, confidence = fk.predict_tokens(logits, input_ids, 9)
        assert torch.equal(token_ids, expected[0])
        torch.testing.assert_close(confidence, expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", [op for op in OPS if "triton" in registry.backends_with(op)])
def test_ops_share_the_schema_of_the_native_ones(op):
    """Argument for argument, up to defaults and the integers' symbolic type."""
    ours = registry.kernel(op, "triton", DEVICE)._schema
    native = getattr(torch.ops.freedave, op).default._schema
    assert [(a.name, str(a.type)) for a in ours.arguments] == [(a.name, str(a.type)) for a in native.arguments]
    assert [str(r.type) for r in ours.returns] == [str(r.type) for r in native.returns]


def test_compiles_without_graph_breaks():
    """As one opaque call, in the backend that is in force."""
    logits, ids = torch.randn(2, 4, 30, device=DEVICE), torch.full((2, 4), 9, device=DEVICE)

    def step(logits, input_ids):
        token_ids, confidence = fk.predict_tokens(logits * 2, input_ids, 9)
        drafted = fk.draft_step(input_ids[:, None], token_ids[:, None], confidence[:, None], ids[:, 0], 9, 2)
        return drafted.drafts, drafted.accepted + 1

    with fk.use_backend("triton"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(logits, ids), step(logits, ids), strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors are for the interpreter")
def test_opcheck():
    ids = torch.tensor([[[9, 9, 1]]])
    predict, draft = (registry.kernel(op, "triton", "cpu") for op in ("predict_tokens", "draft_step"))
    logits = torch.randn(1, 1, 3, 20)
    call = (
        logits,
        ids,
        9,
        torch.ones_like(ids, dtype=torch.bool),
        "prob",
        torch.tensor([3]),
        False,
        None,
        None,
        None,
        None,
    )
    torch.library.opcheck(predict, (*call, None, "exclude"))
    torch.library.opcheck(predict, (*call, ids, "forbid"))
    step = (1, None, None, None, "threshold", "confidence", None, "recycled", "exact", None, None, None, None)
    torch.library.opcheck(draft, (ids, ids, torch.rand(1, 1, 3), torch.tensor([1]), 9, 2, *step))
    pooled, pool = registry.kernel("pooled_step", "triton", "cpu"), fk.draft_pool(1, 4, 3).memory
    step = (1, None, None, None, "threshold", "confidence", None, "pipelined", *[None] * 8)
    torch.library.opcheck(pooled, (ids, ids, torch.rand(1, 1, 3), torch.tensor([1]), pool, 4, 3, 9, 2, *step))


@pytest.fixture
def usable(monkeypatch) -> Iterator[dict[str, str | None]]:
    """Every backend by name: None where it can run, else why not."""
    reasons: dict[str, str | None] = dict.fromkeys(registry.BACKENDS)
    monkeypatch.setattr(registry, "unavailable", reasons.__getitem__)
    registry.best.cache_clear()
    yield reasons
    registry.best.cache_clear()


def test_cuda_tensors_go_to_triton_where_there_are_no_cuda_kernels(usable):
    usable["cuda"] = "not built; build it"
    assert registry.best("draft_step", "cuda") == registry.best("keep", "cuda") == "triton"
    usable["triton"] = "not installed; install it"
    registry.best.cache_clear()
    assert registry.best("draft_step", "cuda") == "reference"


def test_ops_without_cuda_kernels_go_to_triton(usable):
    assert registry.best("draft_step", "cuda") == registry.best("keep", "cuda") == "cuda"
    assert registry.best("draft_attention", "cuda") == "triton"
    usable["triton"] = "not installed; install it"
    registry.best.cache_clear()
    assert registry.best("draft_attention", "cuda") == "reference"


def python(code: str, **environment: str) -> list[str]:
    return run("-c", code, environment=COMPILED | environment).splitlines()


def test_triton_is_imported_when_it_is_used():
    code = (
        "import sys, torch, freedave_kernels as fk\n"
        "print('triton' in sys.modules, 'torch._dynamo' in sys.modules, fk.available_backends()['triton'])\n"
        "with fk.use_backend('triton'):\n"
        "    print(fk.rank_positions(torch.tensor([.1, .9]), torch.ones(2, dtype=torch.bool)).tolist())\n"
        "print('triton' in sys.modules)"
    )
    assert python(code, TRITON_INTERPRET="1") == ["False False None", "[1, 0]", "True"]


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("sys.modules['triton'] = None", "triton is not installed; pip install triton"),
        ("torch.cuda.is_available = lambda: False", "torch sees no GPU; .*TRITON_INTERPRET=1"),
    ],
    ids=["not installed", "no GPU"],
)
def test_where_it_cannot_run_it_says_why(setup, reason):
    code = f"import sys, torch\n{setup}\nimport freedave_kernels as fk\nprint(fk.available_backends()['triton'])"
    assert re.search(reason, python(code)[0])


def test_cpu_tensors_need_the_interpreter():
    code = (
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "import freedave_kernels as fk\n"
        "try:\n"
        "    with fk.use_backend('triton'):\n"
        "        fk.rank_positions(torch.ones(2), torch.ones(2, dtype=torch.bool))\n"
        "except fk.BackendUnavailableError as error:\n"
        "    print(error)"
    )
    assert "backend 'triton' serves cuda tensors, but rank_positions was given a tensor on cpu" in python(code)[0]
