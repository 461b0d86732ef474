"""The backend ``cuda`` from layer to kernel, without a GPU: its library is the emulation, tensors are on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lowbit
from benchmarks.gpu import cuda as cuda_check
from benchmarks.gpu.parts import Budget
from lowbit.backends import registry
from lowbit.backends.cpu import native
from lowbit.backends.cuda import backend, library
from lowbit.testing import cuda_emulated, verdicts
from lowbit.testing.cuda_int8 import assert_int8_close
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations, more_formats, random_weight

pytestmark = [
    pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"]),
    pytest.mark.skipif(cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"),
    pytest.mark.skipif(native.load() is not None, reason="no compiled library"),
]


@pytest.fixture
def opened(monkeypatch):
    """Lets a test name the library that is opened."""

    def open_file(path):
        monkeypatch.setenv("LOWBIT_CUDA_LIBRARY", str(path))
        library.load.cache_clear()
        library.architectures.cache_clear()
        return library.load()

    yield open_file
    monkeypatch.undo()
    library.load.cache_clear()
    library.architectures.cache_clear()


@pytest.fixture
def emulated(opened, request):
    """The kernels of codes of 4 bits, or of a test's ``bits``; `make test` compiles few others at a commit."""
    bits = request.node.callspec.params.get("bits", 4) if hasattr(request.node, "callspec") else 4
    if bits != 4:
        verdicts.only_in_turn(request.config, bits, 8)
    assert opened(cuda_emulated.library_of(bits)) is None


@pytest.fixture
def emulated_widths(opened, request):
    """The kernels of every width, at one commit in eight."""
    verdicts.only_in_turn(request.config, 0, 8)
    assert opened(cuda_emulated.library_of(*cuda_emulated.WIDTHS)) is None


def packed_layer(**options):
    torch.manual_seed(0)
    return lowbit.PackedLinear.from_float(torch.randn(40, 300), lowbit.Packed(bits=4, **options), bias=torch.randn(40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_linear_by_its_op(emulated, bits, dtype):
    """The op of every format, with x of any shape and any strides, against float64."""
    for i, shape in enumerate(((33, 257, 64), (13, 172, 32), (9, 172, 7), (17, 96, None), (35, 4100, 128))):
        for j, format in enumerate(some_formats(bits, *shape)):
            weight = random_weight(format, i)
            x = activations(6, shape[1], dtype, j)
            bias = None if j % 2 else torch.randn(shape[0])
            spread = torch.empty(2, 3, 2 * shape[1], dtype=dtype)[..., ::2].copy_(x.view(2, 3, -1))
            with lowbit.use_backend("cuda"):
                y = torch.ops.lowbit.packed_linear(
                    spread, *weight.operands, bias, None, False, 0
                )
            assert y.shape == (2, 3, shape[0])
            assert_linear_close(y.view(6, -1), x, weight.dense(), bias)


def test_layers(emulated):
    """Outliers, zeros, no rows, a gradient; and a layer that was moved into blocks for the CPU."""
    for options in (dict(group_size=64), dict(outliers=0.01), dict(symmetric=False), dict(group_size=None)):
        layer = packed_layer(**options)
        x = torch.randn(3, 300, requires_grad=True)
        expected = layer(x)
        (wanted,) = torch.autograd.grad(expected.sum(), x)
        with lowbit.use_backend("cuda"):
            assert registry.active_backend("cpu") == "cuda"
            y = layer(x)
            assert layer(x[:0]).shape == (0, 40)
        torch.testing.assert_close(y, expected)
        (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found, wanted)


def test_what_they_do_not_read(emulated):
    """Minima, scales of two levels and packed zeros, by name: another backend takes them."""
    for format in list(more_formats(4, 9, 300, 64))[:8]:
        weight, x = random_weight(format), torch.randn(3, 300)
        others = "zeros that are packed" if format.packed_zeros else "scales of two levels"
        word = "minima" if format.zeros == "minimum" else others
        ids = torch.tensor([2, 0])
        ops, rest = torch.ops.lowbit, (None, None, False, 0)
        calls = (
            (ops.packed_linear, (x, *weight.operands, *rest)),
            (ops.packed_embedding, (ids, *weight.operands, 300, x.dtype)),
            (ops.packed_experts, (x, torch.arange(3), *weight.operands, 3, *rest)),
            (ops.packed_dequantize, (*weight.operands, 300, x.dtype)),
        )  # fmt: skip
        for op, arguments in calls:
            with lowbit.use_backend("cuda"), pytest.raises(RuntimeError, match=f"they read no {word}"):
                op(*arguments)


def test_embedding_and_dequantize(emulated):
    torch.manual_seed(0)
    for options in (dict(group_size=32), dict(outliers=0.01), dict(symmetric=False)):
        layer = lowbit.convert(torch.nn.Sequential(torch.nn.Embedding(50, 96)), lowbit.Packed(bits=4, **options))[0]
        ids = torch.tensor([[3, 49], [0, 3]])
        expected, dense = layer(ids), layer.dequantize()
        with lowbit.use_backend("cuda"):
            assert_bitwise_equal(layer(ids), expected)
            assert_bitwise_equal(layer(ids.int()[:, :1]), expected[:, :1])
            assert layer(ids[:0]).shape == (0, 2, 96)
            assert_bitwise_equal(layer.dequantize(), dense)
            assert layer(torch.tensor([50])).isnan().all(), "as on a GPU: nothing waits to see an id out of range"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_many_rows(emulated, dtype):
    format = next(some_formats(4, 70, 260, 64))
    weight, x = random_weight(format, 0), activations(83, 260, dtype)
    with lowbit.use_backend("cuda"):
        y = torch.ops.lowbit.packed_linear(
            x, *weight.operands, None, None, False, 0
        )
    assert_linear_close(y, x, weight.dense())


def test_int8_activations(emulated):
    """Dynamic and static ones, as the CPU has them; groups of them are declined."""
    x = torch.randn(3, 300)
    for options in (dict(group_size=60), dict(outliers=0.01), dict(symmetric=False), dict(group_size=None)):
        layer = packed_layer(activations="int8", **options)
        expected = layer(x)
        with lowbit.use_backend("cuda"):
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(layer(x.repeat(7, 1)), expected.repeat(7, 1))
    weight = random_weight(next(some_formats(4, 9, 300, 64)))
    arguments = (*weight.operands, None)
    with lowbit.use_backend("cuda"):
        y = torch.ops.lowbit.packed_linear(x, *arguments, torch.tensor([0.02]), True, 0)
        assert_int8_close(y, x, weight, x_scale=torch.tensor([0.02]))
        with pytest.raises(RuntimeError, match="one scale for each row of x"):
            torch.ops.lowbit.packed_linear(x, *arguments, None, True, 64)


CODEBOOKS = [(4, {}), (3, dict(outliers=0.01)), (8, dict(granularity="tensor")), (2, {})]


@pytest.mark.parametrize(("bits", "options"), CODEBOOKS)
def test_codebook_layers(emulated, bits, options):
    torch.manual_seed(0)
    linear, embedding = torch.nn.Linear(300, 40), torch.nn.Embedding(50, 96)
    layer, rows = lowbit.convert(torch.nn.Sequential(linear, embedding), lowbit.Codebook(bits=bits, **options))
    x, ids = torch.randn(3, 300).half(), torch.tensor([[3, 49], [0, 3]])
    expected, gathered, dense = layer(x.float()), rows(ids), layer.dequantize()
    with lowbit.use_backend("cuda"):
        assert (layer(x).float() - expected).abs().max() < 2e-3 * expected.abs().max()
        assert_bitwise_equal(rows(ids), gathered)
        assert_bitwise_equal(layer.dequantize(), dense)


@pytest.mark.parametrize(("bits", "options"), CODEBOOKS)
def test_codebook_layers_with_int8_activations(emulated, bits, options):
    torch.manual_seed(0)
    spec = lowbit.Codebook(bits=bits, activations="int8", **options)
    layer, x = lowbit.convert(torch.nn.Sequential(torch.nn.Linear(300, 40)), spec)[0], torch.randn(3, 300)
    expected = layer(x)
    with lowbit.use_backend("cuda"):
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x.repeat(7, 1)), expected.repeat(7, 1))


def test_kronecker_layers(emulated):
    torch.manual_seed(0)
    for options in (dict(), dict(rank=2), dict(factors=lowbit.Packed(bits=4, group_size=None))):
        model = torch.nn.Sequential(torch.nn.Linear(96, 60))
        layer = lowbit.convert(model, lowbit.Kronecker(**options))[0]
        x = torch.randn(3, 96)
        expected = layer(x)
        with lowbit.use_backend("cuda"):
            torch.testing.assert_close(layer(x), expected)


def test_a_row_is_the_same_in_every_batch(emulated):
    layer, x = packed_layer(group_size=64).half(), torch.randn(12, 300).half()
    with lowbit.use_backend("cuda"), lowbit.batch_invariant():
        assert_bitwise_equal(layer(x)[3:4], layer(x[3:4]))


def test_on_a_cpu_it_runs_where_it_is_asked_for_alone(emulated):
    assert registry.active_backend("cpu") == "cpu"
    with lowbit.use_backend("cuda"):
        assert registry.active_backend("cpu") == "cuda"
    (row,) = (row for row in lowbit.backends() if row.name == "cuda")
    assert row.available and backend.STATE in str(row) and "none: the emulation" in str(row)


def test_rows_beyond_the_table_go_to_the_next_backend(monkeypatch):
    def reason(x, int8=False):
        return backend._why_another("packed_linear", (x, None, int8, 0))  # x, the weight, the numbers of activations

    assert reason(torch.randn(2, 8, 300)) is None
    assert reason(torch.randn(500, 300).half()) is None
    assert reason(torch.randn(16, 300), int8=True) is None
    assert reason(torch.randn(17, 300), int8=True) == "dispatch.json gives 17 rows of int8 to another backend"
    assert backend._why_another("packed_embedding", (torch.zeros(500, dtype=torch.long),)) is None
    assert reason(torch.randn(4, 5, 300)) == "dispatch.json gives 20 rows of float32 to another backend"
    with lowbit.batch_invariant():  # one backend for every number of rows
        assert reason(torch.randn(2, 300)) == "dispatch.json gives 2 rows of float32 to another backend"
        assert reason(torch.randn(2, 300).half()) is None
        assert reason(torch.randn(600, 300).half()) is None
    assert reason(torch.randn(600, 300).half()) == "dispatch.json gives 600 rows of float16 to another backend"
    stack = (torch.zeros(2, 300).half(), torch.zeros(4), *[None] * 9, 2, None, None, False, 0)
    assert backend._why_another("packed_experts", stack) == "dispatch.json gives 2 rows of float16 to another backend"
    (row,) = (row for row in backend.dispatch() if row["op"] == "packed_linear" and "architectures" in row)
    with monkeypatch.context() as m:  # on sm_90 wgmma is taken
        m.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert backend._takes(row, 600, torch.device("cuda", 0))
        m.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        assert not backend._takes(row, 600, torch.device("cuda", 0))


def test_the_self_check_sees_wrong_kernels(emulated_widths, monkeypatch):
    device = torch.device("cpu")
    assert backend.why_not_checked.__wrapped__(device) is None
    reference = registry.reference
    for op, what in (("packed_embedding", "2 bits"), ("codebook_linear", "1 bits, 3 rows of float16")):
        wrong = lambda name, op=op: lambda *args: reference(name)(*args) * (1.02 if name == op else 1)  # noqa: E731
        monkeypatch.setattr(registry, "reference", wrong)
        assert f"its self-check failed: {op}, {what}" in backend.why_not_checked.__wrapped__(device)


def test_a_call_that_it_declines_raises_with_the_reason(emulated, monkeypatch):
    layer = packed_layer()
    with lowbit.use_backend("cuda"):
        with monkeypatch.context() as patched:
            patched.setattr(library, "has", lambda op: False)
            with pytest.raises(RuntimeError, match="LOWBIT_BACKEND=cuda cannot run: it has no packed_linear"):
                layer(torch.randn(1, 300))
        wide, x = torch.zeros(1, (1 << 20) // 32 * 4 + 4, dtype=torch.int32), torch.zeros(1, (1 << 20) + 1)
        args = (wide, *[None] * 3, torch.ones(1, 1), *[None] * 3, 4, x.shape[1], 0, False, 0, None, None, False, 0)
        with pytest.raises(RuntimeError, match=r"LOWBIT_BACKEND=cuda cannot run: .*2\^20 columns"):
            torch.ops.lowbit.packed_linear(x, *args)


def test_an_op_that_it_does_not_have_goes_to_the_next_backend(emulated, monkeypatch):
    stack = lowbit.PackedExperts.from_float(torch.randn(2, 40, 300), lowbit.Packed(bits=4))
    x, ids = torch.randn(3, 300), torch.tensor([1, 0, 1])
    monkeypatch.setattr(library, "has", lambda op: op != "packed_experts")
    with registry.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda cannot run: it has no packed_experts"):
        stack(x, ids)
    torch.testing.assert_close(stack(x, ids), stack.to_float()(x, ids), rtol=1e-4, atol=1e-4)


def test_experts_of_codebooks(emulated):
    """float32 goes to another backend: these kernels decline it."""
    stack = lowbit.CodebookExperts.from_float(torch.randn(3, 40, 320), lowbit.Codebook(bits=4))
    assert library.has("codebook_experts")
    x, ids = torch.randn(3, 320), torch.arange(6) % 4
    expected = stack.to_float()(x.half().float(), ids)
    with lowbit.use_backend("cuda"):
        torch.testing.assert_close(stack(x.half(), ids).float(), expected, rtol=4e-3, atol=4e-2)
        with pytest.raises(RuntimeError, match="cuda cannot run: .* take x in float16 or bfloat16"):
            stack(x, ids)


@pytest.mark.parametrize("options", [dict(group_size=64), dict(outliers=0.01, symmetric=False), dict(group_size=None)])
def test_experts(emulated, options):
    """A stack, its gradient, experts that are elsewhere, and a negative id, whose row is NaN as by Triton."""
    stack = lowbit.PackedExperts.from_float(torch.randn(3, 40, 300), lowbit.Packed(bits=4, **options))
    plain = stack.to_float()
    for tokens in (3, 40):
        x, ids = torch.randn(tokens, 300, requires_grad=True), torch.arange(2 * tokens) % 4
        with lowbit.use_backend("cuda"):
            y = stack(x, ids)
        y.sum().backward()
        again = x.detach().clone().requires_grad_()
        expected = plain(again, ids)
        expected.sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
    with lowbit.use_backend("cuda"):
        y = stack(x[:1].detach(), torch.tensor([-1, 2]))
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scales=torch.ones(40, 3)), r"scales must be of shape \[40, 5\]: got \[40, 3\]"),
        (dict(bias=torch.ones(39)), r"bias must be of shape \[40\]: got \[39\]"),
        (dict(outlier_values=torch.ones(1)), "must be given together"),
    ],
)
def test_arguments_that_do_not_fit(emulated, change, message):
    given = dict(
        packed=torch.zeros(40, 40, dtype=torch.int32), outlier_values=None, outlier_columns=None,
        outlier_rows=None, scales=torch.ones(40, 5), zeros=None, scale_factors=None, zero_factors=None, bits=4,
        group_size=64, layout=0, minimum=False, scale_block=0, bias=None, x_scale=None, int8=False, x_group=0,
    )  # fmt: skip
    with lowbit.use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.packed_linear(torch.randn(2, 300), **{**given, **change})


def test_the_check_of_a_gpu(emulated_widths, monkeypatch):
    """benchmarks/gpu/cuda.py, on the emulation: every case is right, and one that is not is named."""
    right, problems = cuda_check.check("cpu", Budget(1000), cuda_check.SHAPES[2:3])
    assert problems == [] and right == 7 * 3 + 8 * 2 + 4 * 2 + 1

    def wrong(y, x, *rest):
        assert len(x) != 200, "too many rows"

    monkeypatch.setattr(cuda_check, "assert_linear_close", wrong)
    _, problems = cuda_check.check("cpu", Budget(1000), cuda_check.SHAPES[2:3])
    assert problems and all("M=200" in problem and "too many rows" in problem for problem in problems)


# --------------------------------------------------------------------------------------------------------- the library


def test_without_a_library_the_reason_says_how_to_get_one(opened, tmp_path):
    absent = tmp_path / "none.so"
    assert opened(absent).startswith(f"not compiled: there is no {absent} (in a checkout, `make cuda`")
    assert "cuda: unavailable (not compiled" in "\n".join(map(str, lowbit.backends()))
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: not compiled"), lowbit.use_backend("cuda"):
        pass


def test_a_library_that_is_none_or_another(opened, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert "cannot be loaded" in opened(broken)
    assert "has no lowbit_cuda_library" in opened(native.path())
    other = tmp_path / "other.cpp"
    other.write_text('extern "C" const long* lowbit_cuda_library() { static long bytes = 8; return &bytes; }')
    target = tmp_path / "other.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(other), "-o", str(target)], check=True)
    assert "belongs to another version of lowbit" in opened(target)


def test_importing_opens_nothing():
    code = "import lowbit; print('lowbit_cuda.so' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_compiled_library_needs_nothing_of_cuda():
    """It serves a torch without CUDA: what it needs of a GPU it finds when it is called."""
    needed = subprocess.run(["readelf", "-d", str(native.path())], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and "cuda" not in needed.lower()


def test_the_table_names_ops_and_sources():
    for row in backend.dispatch():
        assert library.has(row["op"]) and row["source"] in ("predicted", "measured")
        assert row["most_rows"] < 0 or row["why"]
        assert set(row["dtypes"]) <= {"float32", "float16", "bfloat16", "int8"}


@pytest.mark.parametrize(
    ("here", "asked", "found"),
    [
        ({90}, {}, ["90a"]),
        ({86, 121}, {}, ["80", "120"]),
        ({75}, {}, []),
        (set(), {}, []),
        (set(), {"LOWBIT_CUDA": "1"}, ["80", "89", "90a", "100", "120"]),
        ({90}, {"LOWBIT_CUDA_ARCHITECTURES": "80, 120"}, ["80", "120"]),
    ],
)
def test_what_a_build_compiles_for(here, asked, found, monkeypatch):
    """Each GPU's newest code; nothing where no GPU is and nobody asks."""
    text = (cuda_emulated.ROOT / "setup.py").read_text(encoding="utf-8")
    build = {"__name__": "setup"}
    exec(compile(text[: text.index("\nif PURE_PYTHON:")], "setup.py", "exec"), build)
    for name in ("LOWBIT_CUDA", "LOWBIT_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    build["gpus_here"] = lambda: here
    listed = subprocess.CompletedProcess([], 0, stdout="sm_80 sm_89 sm_90 sm_100 sm_120")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: listed)
    assert build["cuda_architectures"]("nvcc") == found
