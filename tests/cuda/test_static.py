"""What CUDA C++ kernels issue, by their machine code: counts, bars, and the document that is made of them."""

from __future__ import annotations

import pytest

from benchmarks.tools import cuda_compiled, cuda_static, sass
from benchmarks.tools.cuda_kernels import KERNELS
from lowbit.testing import verdicts

needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")
CASES = [(KERNELS[name], case) for name, cases in cuda_static.CASES.items() for case in cases]


def test_the_document_is_made_of_the_counts():
    assert cuda_static.DOCUMENT.read_text(encoding="utf-8") == cuda_static.document()


@pytest.mark.parametrize("case", cuda_static.CASES["packed_decode"], ids=lambda case: case.label)
def test_a_path_through_decode_is_that_of_its_shape(case):
    """What was followed made every product and loaded every tile, once."""
    first = cuda_static.read_counts(KERNELS["packed_decode"])["cases"][case.label][0]
    tiles = case.n // 16 * -(-case.k // 256)
    assert first["products"] == tiles * 16 * (1 if case.m <= 8 else 2)
    assert first["weight bytes"] == tiles * 16 * 32 * case.bits


@pytest.mark.parametrize("case", cuda_static.CASES["packed_batch_sm90"], ids=lambda case: case.label)
def test_a_path_through_batch_is_that_of_its_shape(case):
    """The first block, which has most work, made every product of it."""
    first = cuda_static.read_counts(KERNELS["packed_batch_sm90"])["cases"][case.label][0]
    splits = cuda_static.splits_of(cuda_static.works("packed_batch_sm90", case), 8)
    works, blocks = splits * cuda_static.works("packed_batch_sm90", case), first["blocks"]
    assert blocks == min(works, 132)
    of_a_work = 128 // 16 * cuda_static.x_rows_of("packed_batch_sm90", case) // 8 * case.k // 16 // splits
    assert first["products"] == blocks * -(-works // blocks) * of_a_work


def test_bars():
    """A bar that is missed, or kept again, is a change that this list must know of."""
    every = cuda_static.predictions(KERNELS["packed_decode"])
    assert cuda_static.missed(every) == cuda_static.MISSED
    batch = cuda_static.predictions(KERNELS["packed_batch_sm90"])
    assert cuda_static.batch_missed(batch) == cuda_static.MISSED_BATCH
    batch[cuda_static.Case("packed", 4, 4096, 8192, 8192)].times["issue"] *= 1.2
    assert 4 in cuda_static.batch_missed(batch)


def test_a_planted_instruction_breaks_a_bar():
    every = cuda_static.predictions(KERNELS["packed_decode"])
    case = cuda_static.Case("packed", 8, 1, 8192, 8192)
    every[case].times["alu"] *= 3
    assert (8, "none") in cuda_static.missed(every)


@needs_nvcc
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number][1].label)
def test_what_is_followed_anew_is_what_the_counts_say(number, request):
    """`make test` follows one of them, another at another commit."""
    verdicts.only_in_turn(request.config, number, len(CASES))
    kernel, case = CASES[number]
    if cuda_static.read_counts(kernel)["nvcc"] != cuda_compiled.nvcc_version():
        pytest.skip("another nvcc")
    assert cuda_static.case_counts(kernel, case) == cuda_static.read_counts(kernel)["cases"][case.label]


# --- following machine code ---

LOOP = """
.text.f:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ULDC UR4, c[0x0][0x210] ;
        /*0020*/                   IMAD.SHL.U32 R1, R0, 0x2, RZ ;
.L_x_0:
        /*0030*/                   LOP3.LUT R2, R1, 0x3, RZ, 0xc0, !PT ;
        /*0040*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0050*/              @!P0 LDG.E R3, desc[UR8][R6.64] ;
        /*0060*/                   VIADD R1, R1, 0x1 ;
        /*0070*/                   ISETP.GE.AND P1, PT, R1, UR4, PT ;
        /*0080*/              @!P1 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""


def follow(text: str, first: int, tid: int) -> sass.Trace:
    (code,) = sass.functions(text).values()
    return sass.trace(code, bytes(0x210) + first.to_bytes(4, "little"), {"SR_TID.X": tid})


def test_a_loop_is_followed():
    trace = follow(LOOP, 9, 1)  # from 2 to 9: 4 and 8 are multiples of 4
    assert trace.ops()["VIADD"] == 7 and trace.ops()["LDG.E"] == 2
    assert trace.slots == 3 + 7 * 6 + 1


def test_a_path_that_depends_on_data_is_an_error():
    text = LOOP.replace("ISETP.GE.AND P1, PT, R1, UR4, PT", "ISETP.GE.AND P1, PT, R3, UR4, PT")
    with pytest.raises(sass.Unknown, match="a path depends on data"):
        follow(text, 9, 1)


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(sass.Unknown, match="not known here: VFANCY"):
        follow(LOOP.replace("VIADD", "VFANCY"), 9, 1)


@pytest.mark.parametrize(
    ("text", "registers", "result"),
    [
        ("LEA.HI R2, R0, R1, RZ, 0x5", (0xFFFFFFFF, 100), 131),
        ("IMAD.HI.U32 R2, R0, 0x55555556, RZ", (10, 0), 3),
        ("SHF.R.S32.HI R2, RZ, 0x1f, R0", (0x80000000, 0), 0xFFFFFFFF),
        ("SHF.L.U32 R2, R0, 0x3, RZ", (5, 0), 40),
        ("LOP3.LUT R2, R0, 0xf000f, R1, 0xea, !PT", (0x12345678, 0x64006400), 0x64046408),
        ("PRMT R2, R0, 0x4140, RZ", (0x0000BBAA, 0), 0x00BB00AA),
        ("IADD3 R2, -R0, R1, RZ", (3, 10), 7),
        ("IABS R2, R0", (0xFFFFFFFB, 0), 5),
        ("IMAD R2, R0, -0x3, R1", (2, 10), 4),
    ],
)  # fmt: skip
def test_instructions_of_integers(text, registers, result):
    (code,) = sass.functions(f".text.f:\n        /*0000*/                   {text} ;\n").values()
    thread = sass.Thread(b"", {})
    thread.registers.update(R0=registers[0], R1=registers[1])
    effect = sass.effect(code[0].op)
    assert effect is not None
    effect(thread, code[0])
    assert thread.registers["R2"] == result
