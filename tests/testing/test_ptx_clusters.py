"""The PTX machine of sm_90: mbarriers, bulk copies, clusters, and products that read while others write.

Each program runs as it is, and must then fail with a line changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowbit.testing.ptx_emulator import Fault, Statistics, TensorMap, execute

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry lines(.param .u64 inputs, .param .u64 outputs, .param .align 64 .b8 map[128])
{
.reg .pred %p<10>;
.reg .b32 %r<90>;
.reg .b64 %rd<90>;
.reg .f32 %f<40>;
mov.u32 %r80, %tid.x;
shr.u32 %r81, %r80, 5;
mov.u32 %r82, %ctaid.x;
mov.u32 %r83, %ntid.x;
mad.lo.s32 %r84, %r82, %r83, %r80;
mov.u32 %r85, smem;
ld.param.u64 %rd80, [inputs];
ld.param.u64 %rd81, [outputs];
mov.b64 %rd82, map;
cvta.param.u64 %rd83, %rd82;
"""
SAVE = "mad.wide.u32 %rd84, %r84, 4, %rd81; st.global.b32 [%rd84], %r50;"


def array(values: Any) -> np.ndarray[Any, Any]:
    """A copy that begins at a multiple of 64 bytes."""
    values = np.ascontiguousarray(values)
    room = np.empty(values.nbytes + 64, np.uint8)
    skip = -room.ctypes.data % 64
    found: np.ndarray[Any, Any] = room[skip : skip + values.nbytes].view(values.dtype).reshape(values.shape)
    found[...] = values
    return found


NUMBERS = array(np.arange(24 * 32, dtype=np.uint32).reshape(24, 32) * 7919)
ROWS = TensorMap(NUMBERS, (2, 32))


def run(
    lines: str, *, threads: int = 64, blocks: int = 1, cluster: int = 1, tensor: TensorMap = ROWS, outputs: int = 1,
    newest_first: bool = False,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """uint32 [outputs, threads of all blocks] after ``lines``."""
    result = np.full((outputs, blocks * threads), 0xEE, np.uint32)
    given = [NUMBERS, result, tensor]
    text = HEADER + lines + "\nret;\n}\n"
    execute(text, "lines", (blocks,), threads, given, 8192, cluster=cluster, newest_first=newest_first)
    return result


def fails(lines: str, old: str, new: str, message: str, **options: Any) -> None:
    assert old in lines, old
    with pytest.raises(Fault, match=message):
        run(lines.replace(old, new), **options)


# ---------------------------------------------------------------------------------------------------------------------
# A ring of stages: warp 0 copies boxes of two rows, warps 1 and 2 sum what lies there

RING = """
setp.ne.u32 %p1, %r80, 0;
@%p1 bra made;
mbarrier.init.shared::cta.b64 [%r85+4096], 1;
mbarrier.init.shared::cta.b64 [%r85+4104], 1;
mbarrier.init.shared::cta.b64 [%r85+4112], 2;
mbarrier.init.shared::cta.b64 [%r85+4120], 2;
fence.mbarrier_init.release.cluster;
made:
bar.sync 0;
mov.b32 %r10, 0;
setp.ne.u32 %p1, %r81, 0;
@%p1 bra consumer;
elect.sync _|%p2, 0xffffffff;
@!%p2 bra end;
produce:
and.b32 %r11, %r10, 1;
shr.u32 %r12, %r10, 1;
and.b32 %r12, %r12, 1;
xor.b32 %r13, %r12, 1;
shl.b32 %r14, %r11, 3;
add.s32 %r14, %r14, %r85;
empty:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r14+4112], %r13;
@!%p3 bra empty;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r14+4096], 512;
shl.b32 %r15, %r11, 9;
add.s32 %r15, %r15, %r85;
add.s32 %r17, %r14, 4096;
shl.b32 %r16, %r10, 2;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r15], [%rd83, {0, %r16}], [%r17];
add.s32 %r16, %r16, 2;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r15+256], [%rd83, {0, %r16}], [%r17];
add.s32 %r10, %r10, 1;
setp.lt.u32 %p4, %r10, 6;
@%p4 bra produce;
bra end;
consumer:
mov.b32 %r50, 0;
sub.s32 %r20, %r80, 32;
shl.b32 %r20, %r20, 2;
consume:
and.b32 %r11, %r10, 1;
shr.u32 %r12, %r10, 1;
and.b32 %r12, %r12, 1;
shl.b32 %r14, %r11, 3;
add.s32 %r14, %r14, %r85;
full:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r14+4096], %r12;
@!%p3 bra full;
shl.b32 %r15, %r11, 9;
add.s32 %r15, %r15, %r85;
add.s32 %r15, %r15, %r20;
ld.shared.b32 %r30, [%r15];
ld.shared.b32 %r31, [%r15+256];
add.s32 %r50, %r50, %r30;
add.s32 %r50, %r50, %r31;
and.b32 %r40, %r80, 31;
setp.ne.u32 %p5, %r40, 0;
@%p5 bra released;
mbarrier.arrive.shared::cta.b64 _, [%r14+4112];
released:
add.s32 %r10, %r10, 1;
setp.lt.u32 %p4, %r10, 6;
@%p4 bra consume;
""" + SAVE + "\nend:"  # fmt: skip


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_ring_of_bulk_copies(newest_first: bool) -> None:
    got = run(RING, threads=96, newest_first=newest_first)[0, 32:]
    expected = NUMBERS.reshape(12, 2, 32).sum(0, dtype=np.uint32).reshape(-1)
    assert got.tolist() == expected.tolist()


LATE = "mov.b32 %r12, 0;\nshl.b32 %r14, %r11, 3;\nadd.s32 %r14, %r14, %r85;\nfull:"
EARLY_RELEASE = """and.b32 %r40, %r80, 31; setp.eq.u32 %p5, %r40, 0;
@%p5 mbarrier.arrive.shared::cta.b64 _, [%r14+4112]; ld.shared.b32 %r31, [%r15+256]; bra released;"""
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r14+4096], 512;"
BOX = "%r15, %r11, 9;\nadd.s32 %r15, %r15, %r85;\nadd.s32 %r17"
RING_BUGS = {
    "the ring is used before it is made": ("bar.sync 0;", "", "not know that warp 0 initialised|no mbarrier"),
    "no fence after the initialisation": ("fence.mbarrier_init.release.cluster;", "", "no fence made visible"),
    "an mbarrier is initialised twice": ("[%r85+4104], 1;", "[%r85+4096], 1;", "part of an mbarrier"),
    "the producer does not wait for a stage": ("@!%p3 bra empty;", "", "race|still reads|arrivals"),
    "the producer waits for the wrong phase": ("xor.b32 %r13, %r12, 1;", "mov.b32 %r13, %r12;", "deadlock"),
    "too few bytes are expected": (EXPECT, EXPECT.replace("512", "256"), "copy to it is on its way|deadlock"),
    "too many bytes are expected": (EXPECT, EXPECT.replace("512", "528"), "deadlock"),
    "no bytes are expected": (EXPECT, EXPECT.replace(".expect_tx", "").replace(", 512", ""), "is on its way"),
    "a consumer does not wait": ("@!%p3 bra full;", "", "read before it is written|on its way"),
    "a consumer waits for the other stage": ("[%r14+4096], %r12", "[%r85+4104], %r12", "does not know|on its way"),
    "a consumer's phase does not change": (LATE.replace("mov.b32 %r12, 0", "and.b32 %r12, %r12, 1"), LATE,
                                           "on its way|does not know|arrivals"),
    "one warp of two releases a stage": ("[%r85+4112], 2;", "[%r85+4112], 1;", "does not know|arrivals|deadlock"),
    "a stage is released twice": ("_, [%r14+4112];", "_, [%r14+4112], 2;", "arrivals|deadlock"),
    "a stage is never released": ("@%p5 bra released;", "bra released;", "deadlock"),
    "a stage is released before it is read": ("ld.shared.b32 %r31, [%r15+256];\nadd.s32 %r50, %r50, %r30;",
                                              EARLY_RELEASE, "writes what warp . read|on its way"),
    "a box lies where an mbarrier is": ("shl.b32 " + BOX, "mov.b32 %r15, 4096;\n" + BOX.split("9;\n")[1],
                                        "part of an mbarrier"),
    "a box is misaligned": ("[%r15+256], [%rd83", "[%r15+264], [%rd83", "multiple of 128 bytes"),
    "a box lies outside shared memory": ("[%r15+256], [%rd83", "[%r15+8192], [%rd83", "out of bounds"),
    "a parameter is no tensor map": ("cvta.param.u64", "add.s64 %rd82, %rd82, 8; cvta.param.u64", "no tensor map"),
    "the last stage is not awaited": ("setp.lt.u32 %p4, %r10, 6;\n@%p4 bra consume;",
                                      "setp.lt.u32 %p4, %r10, 5;\n@%p4 bra consume;", "ends while a bulk copy"),
}  # fmt: skip


@pytest.mark.parametrize("name", RING_BUGS)
def test_a_bug_in_the_ring_is_found(name: str) -> None:
    old, new, message = RING_BUGS[name]
    text = RING if old in RING else HEADER
    assert old in text
    if text is HEADER:
        place, result = HEADER.replace(old, new), np.zeros((1, 96), np.uint32)
        with pytest.raises(Fault, match=message):
            execute(place + RING + "ret;}", "lines", (1,), 96, [NUMBERS, result, ROWS], 8192)
    else:
        fails(RING, old, new, message, threads=96)


def test_a_wait_without_a_loop_is_found() -> None:
    """``try_wait`` may say no before the phase is complete."""
    lines = RING.replace("@!%p3 bra full;", "@!%p3 bra.uni fallen; bra.uni ready; fallen: ready:")
    with pytest.raises(Fault, match="read before it is written|on its way"):
        run(lines, threads=96)


def test_states_and_tests_of_mbarriers() -> None:
    lines = """
    setp.ne.u32 %p1, %r80, 0;
    @%p1 bra made;
    mbarrier.init.shared::cta.b64 [%r85], 64;
    made: bar.sync 0;
    mbarrier.arrive.shared::cta.b64 %rd1, [%r85];
    mov.b32 %r50, 0;
    again: add.s32 %r50, %r50, 1;
    mbarrier.test_wait.shared::cta.b64 %p2, [%r85], %rd1;
    @!%p2 bra again;
    """ + SAVE  # fmt: skip
    assert run(lines).max() < 5
    fails(lines, "[%r85], 64;", "[%r85], 65;", "deadlock")
    fails(lines, "[%r85], 64;", "[%r85], 0;", "1 to 1048575 arrivals: got 0")
    fails(lines, "mbarrier.arrive.shared::cta.b64 %rd1", "mbarrier.arrive.noComplete2.shared::cta.b64 %rd1", "modifier")
    fails(lines, "mov.b32 %r50, 0;", "ld.shared.b32 %r50, [%r85];", "part of an mbarrier")


# ---------------------------------------------------------------------------------------------------------------------
# What happens before what

CHAIN = """
shl.b32 %r10, %r81, 3;
setp.ne.u32 %p1, %r80, 0;
@%p1 bra made;
mbarrier.init.shared::cta.b64 [%r85], 32;
mbarrier.init.shared::cta.b64 [%r85+8], 32;
made: bar.sync 0;
setp.eq.u32 %p1, %r81, 1; @%p1 bra second;
setp.eq.u32 %p1, %r81, 2; @%p1 bra third;
st.shared.b32 [%r85+64], 5;
mbarrier.arrive.shared::cta.b64 _, [%r85];
bra end;
second:
first_wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r85], 0;
@!%p2 bra first_wait;
mbarrier.arrive.shared::cta.b64 _, [%r85+8];
bra end;
third:
second_wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r85+8], 0;
@!%p2 bra second_wait;
ld.shared.b32 %r50, [%r85+64];
st.shared.b32 [%r85+64], 6;
""" + SAVE + "\nend:"  # fmt: skip


def test_what_is_known_is_passed_on() -> None:
    assert (run(CHAIN, threads=96)[0, 64:] == 5).all()
    fails(CHAIN, "@!%p2 bra first_wait;", "", "warp 2 reads what warp 0 wrote", threads=96)
    fails(CHAIN, "@!%p2 bra second_wait;", "", "warp 2 reads what warp 0 wrote|read before", threads=96)
    late = ("st.shared.b32 [%r85+64], 5;\nmbarrier.arrive.shared::cta.b64 _, [%r85];",
            "mbarrier.arrive.shared::cta.b64 _, [%r85];\nst.shared.b32 [%r85+64], 5;")  # fmt: skip
    fails(CHAIN, *late, "does not know of it", threads=96)
    reads = CHAIN.replace("bra end;\nsecond:", "ld.shared.b32 %r50, [%r85+64];\nbra end;\nsecond:")
    with pytest.raises(Fault, match=r"warp 2 writes what warp 0 read|warp 0 reads what warp 2 wrote"):
        run(reads, threads=96)
    with pytest.raises(Fault, match="two warps write it at once"):
        run("bar.sync 1, 64; st.shared.b32 [%r85], %r81;")


PAIRS = """
shl.b32 %r10, %r80, 2;
add.s32 %r10, %r10, %r85;
st.shared.b32 [%r10], %r80;
shr.u32 %r11, %r81, 1;
add.s32 %r11, %r11, 1;
bar.sync %r11, 64;
xor.b32 %r12, %r80, 32;
shl.b32 %r12, %r12, 2;
add.s32 %r12, %r12, %r85;
ld.shared.b32 %r50, [%r12];
""" + SAVE  # fmt: skip


def test_barriers_of_some_warps() -> None:
    assert run(PAIRS, threads=128)[0].tolist() == [n ^ 32 for n in range(128)]
    fails(PAIRS, "bar.sync %r11, 64;", "", "written by another warp", threads=128)
    fails(PAIRS, "%r80, 32;", "%r80, 64;", "does not know", threads=128)
    fails(PAIRS, "bar.sync %r11, 64;", "bar.sync %r11, 96;", "deadlock", threads=128)
    fails(PAIRS, "bar.sync %r11, 64;", "bar.sync 1, 64;", "128 threads are at barrier 1 of 64", threads=128)
    fails(PAIRS, "bar.sync %r11, 64;", "bar.sync 16, 64;", "barriers 0 to 15: got 16", threads=128)
    fails(PAIRS, "bar.sync %r11, 64;", "bar.sync 1, 65;", "multiple of 32: got 65", threads=128)


def test_arriving_at_a_barrier_without_waiting() -> None:
    lines = """
    setp.eq.u32 %p1, %r81, 1;
    @%p1 bra reader;
    st.shared.b32 [%r85], 9;
    bar.arrive 1, 64;
    bra end;
    reader: bar.sync 1, 64;
    ld.shared.b32 %r50, [%r85];
    """ + SAVE + "\nend:"  # fmt: skip
    assert (run(lines)[0, 32:] == 9).all()
    fails(lines, "bar.arrive 1, 64;", "", "deadlock")
    order = ("st.shared.b32 [%r85], 9;\n    bar.arrive 1, 64;", "bar.arrive 1, 64;\n    st.shared.b32 [%r85], 9;")
    fails(lines, *order, "does not know|read before")


# ---------------------------------------------------------------------------------------------------------------------
# Clusters

EXCHANGE = """
mov.u32 %r10, %cluster_ctarank;
add.s32 %r11, %r10, 100;
st.shared.b32 [%r85], %r11;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
xor.b32 %r12, %r10, 1;
mapa.shared::cluster.u32 %r13, %r85, %r12;
ld.shared::cluster.u32 %r50, [%r13];
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
""" + SAVE  # fmt: skip


def test_blocks_of_a_cluster_read_each_other() -> None:
    options: dict[str, Any] = dict(threads=32, blocks=6, cluster=2)
    assert run(EXCHANGE, **options)[0, ::32].tolist() == [101, 100] * 3
    first = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
    last = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"
    fails(EXCHANGE, first, "bar.sync 0;", "does not know|read before", **options)
    fails(EXCHANGE, "arrive.release", "arrive.relaxed", "does not know", **options)
    fails(EXCHANGE, "%r10, 1;\nmapa", "%r10, 2;\nmapa", "a cluster has 2 blocks: no rank", **options)
    fails(EXCHANGE, "ld.shared::cluster", "ld.shared", "of another block: use shared::cluster", **options)
    fails(EXCHANGE, "barrier.cluster.wait.acquire.aligned;", "", "does not know", **options)
    fails(EXCHANGE, "wait.acquire.aligned;", "arrive;", "arrives twice", **options)
    fails(EXCHANGE, "barrier.cluster.arrive.release.aligned;", "", "has not arrived", **options)
    uneven = ("ld.shared::cluster.u32 %r50, [%r13];\n" + last,
              "setp.eq.u32 %p1, %r10, 1; @%p1 bra out; ld.shared::cluster.u32 %r50, [%r13]; out:")  # fmt: skip
    run(EXCHANGE.replace(*uneven).replace("%p1, %r10, 1", "%p1, %r10, 9").replace("out:", "out:" + last), **options)
    ended = EXCHANGE.replace(*uneven).replace("@%p1 bra out;", "@%p1 ret; bar.sync 0;")
    with pytest.raises(Fault, match="a block that has ended"):
        run(ended, **options)
    overwritten = "ld.shared::cluster.u32 %r50, [%r13]; st.shared.b32 [%r85], 0;"
    fails(EXCHANGE, "ld.shared::cluster.u32 %r50, [%r13];", overwritten, "does not know", **options)
    with pytest.raises(Fault, match="multiple of a cluster: got 3 and 2"):
        run(EXCHANGE, threads=32, blocks=3, cluster=2)


def test_arriving_at_the_mbarrier_of_another_block() -> None:
    lines = """
    setp.ne.u32 %p1, %r80, 0;
    mov.u32 %r10, %cluster_ctarank;
    @%p1 bra made;
    mbarrier.init.shared::cta.b64 [%r85], 1;
    made: barrier.cluster.arrive; barrier.cluster.wait;
    xor.b32 %r12, %r10, 1;
    mapa.shared::cluster.u32 %r13, %r85, %r12;
    add.s32 %r14, %r13, 64;
    @%p1 bra wait;
    st.shared::cluster.u32 [%r14], %r10;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r13];
    wait: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r85], 0;
    @!%p2 bra wait;
    ld.shared.b32 %r50, [%r85+64];
    """ + SAVE  # fmt: skip
    options: dict[str, Any] = dict(threads=64, blocks=2, cluster=2)
    assert run(lines, **options)[0].tolist() == [1] * 64 + [0] * 64
    fails(lines, "@!%p2 bra wait;", "", "does not know|read before", **options)
    fails(lines, "barrier.cluster.arrive; barrier.cluster.wait;", "bar.sync 0;", "does not know|no mbarrier", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Products of matrices whose right side a bulk copy brings

LEFT = np.random.default_rng(0).integers(-4, 5, (64, 16))
RIGHT = np.random.default_rng(1).integers(-4, 5, (8, 64))
X_ROWS = TensorMap(array(RIGHT.astype(np.float16)), (8, 64), 128)
PRODUCT = """
setp.ne.u32 %p1, %r80, 0;
@%p1 bra made;
mbarrier.init.shared::cta.b64 [%r85+4096], 1;
fence.proxy.async.shared::cta;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r85+4096], 1024;
add.s32 %r10, %r85, 4096;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r85], [%rd83, {0, 0}], [%r10];
made: bar.sync 0;
full: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r85+4096], 0;
@!%p2 bra full;
mad.wide.u32 %rd1, %r80, 16, %rd80;
ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
cvt.u64.u32 %rd2, %r85;
shr.u64 %rd2, %rd2, 4;
add.s64 %rd2, %rd2, STEP;
or.b64 %rd2, %rd2, 0x4000004000010000;
wgmma.fence.sync.aligned;
{ .reg .pred p; setp.ne.b32 p, 0, 0;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, {%r1, %r2, %r3, %r4}, %rd2, p, 1, 1, 0; }
wgmma.commit_group.sync.aligned;
AFTER
wgmma.wait_group.sync.aligned 0;
mul.wide.u32 %rd3, %r80, 4;
add.s64 %rd3, %rd3, %rd81;
st.global.f32 [%rd3], %f0;
st.global.f32 [%rd3+512], %f1;
st.global.f32 [%rd3+1024], %f2;
st.global.f32 [%rd3+1536], %f3;
"""


def product(lines: str, step: int = 1, after: str = "", cluster: int = 1) -> tuple[np.ndarray[Any, Any], Statistics]:
    """LEFT @ RIGHT.T of 16 columns, as the threads of a warpgroup give it."""
    fragments = np.zeros((128, 4, 2), np.float16)
    lane = np.arange(128)
    for register in range(4):
        for half in range(2):
            row = lane // 32 * 16 + lane % 32 // 4 + 8 * (register % 2)
            fragments[:, register, half] = LEFT[row, lane % 4 * 2 + half + 8 * (register // 2)]
    result = np.zeros((4, 128), np.float32)
    text = HEADER + lines.replace("STEP", str(2 * step)).replace("AFTER", after) + "ret;}"
    given = [array(fragments.view(np.uint32)), result, X_ROWS]
    statistics = execute(text, "lines", (1,), 128, given, 8192)
    found = np.zeros((64, 8))
    for i in range(4):
        found[lane // 32 * 16 + lane % 32 // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] = result[i]
    return found, statistics


@pytest.mark.parametrize("step", range(4))
def test_a_product_with_what_a_bulk_copy_brought(step: int) -> None:
    found, statistics = product(PRODUCT, step)
    assert (found == LEFT @ RIGHT[:, 16 * step : 16 * step + 16].T).all()
    assert statistics.count("wgmma.mma_async") == 4


PRODUCT_BUGS = {
    "nobody waits for the copy": ("@!%p2 bra full;", "", "read before it is written|on its way"),
    "no fence": ("wgmma.fence.sync.aligned;", "", "written since the last wgmma.fence"),
    "the sums are read too early": ("AFTER", "add.f32 %f9, %f0, %f0;", "read before wgmma.wait_group"),
    "an operand is overwritten": ("AFTER", "mov.b32 %r1, 0;", "written before wgmma.wait_group"),
    "its right side is overwritten": ("AFTER", "@!%p1 st.shared.b32 [%r85+32], 0;", "product in flight reads it"),
    "its right side is stored without a fence": (
        "wgmma.fence.sync.aligned;",
        "@!%p1 st.shared.b32 [%r85+32], 0; bar.sync 0; wgmma.fence.sync.aligned;", "fence.proxy.async"),
    "another warp made the store visible": (
        "wgmma.fence.sync.aligned;",
        "@!%p1 st.shared.b32 [%r85+32], 0; bar.sync 0; setp.eq.u32 %p3, %r81, 1; @%p3 fence.proxy.async.shared::cta;"
        "bar.sync 0; wgmma.fence.sync.aligned;", "fence.proxy.async"),
    "no commit": ("wgmma.commit_group.sync.aligned;", "", "read before wgmma.wait_group"),
    "only a part of a warpgroup": ("wgmma.fence.sync", "setp.lt.u32 %p3, %r81, 3; @!%p3 ret; wgmma.fence.sync",
                                   "part of a warpgroup"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCT_BUGS)
def test_a_bug_in_the_product_is_found(name: str) -> None:
    old, new, message = PRODUCT_BUGS[name]
    assert old in PRODUCT
    with pytest.raises(Fault, match=message):
        product(PRODUCT.replace(old, new))


def test_stores_that_a_fence_made_visible() -> None:
    zeros = (
        "@!%p1 st.shared.b32 [%r85+32], 0; @!%p1 fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
    )
    found, _ = product(PRODUCT.replace("wgmma.fence.sync.aligned;", zeros))
    right = RIGHT[:, 16:32].copy()
    right[0, :2] = 0
    assert (found == LEFT @ right.T).all()


# ---------------------------------------------------------------------------------------------------------------------
# Tensor maps and warps


def test_boxes_beyond_a_tensor_are_zeros() -> None:
    numbers = array(np.arange(1, 5 * 8 + 1, dtype=np.int16).reshape(5, 8))
    tensor = TensorMap(numbers[:, :8], (4, 16))
    box = tensor.read((-2, 3)).view(np.int16).reshape(4, 16)
    expected = np.zeros((4, 16), np.int16)
    expected[:2, 2:10] = numbers[3:]
    assert (box == expected).all()
    assert not tensor.read((8, 0)).any() and not tensor.read((0, -4)).any()


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzled_boxes(swizzle: int) -> None:
    """Pieces of 16 bytes that lie below each other in 8 rows of a box are in 8 different groups of banks."""
    tensor = TensorMap(array(np.zeros((64, 256), np.uint8)), (16, swizzle), swizzle)
    place = tensor.place(2048).reshape(16, -1)
    assert sorted(place.reshape(-1).tolist()) == list(range(2048, 2048 + 16 * swizzle, 16))
    for column in range(place.shape[1]):
        assert len(set(place[:8, column] % 128)) == min(8, 128 // 16)
    if swizzle == 128:  # of row 3, piece 1 is where piece 2 would be
        assert place[3, 1] == 2048 + 3 * 128 + 2 * 16


def test_tensor_maps_that_hardware_refuses() -> None:
    good = array(np.zeros((8, 64), np.float16))
    for message, tensor, box, swizzle in [
        ("multiples of 16 bytes: got strides", array(np.zeros((8, 12), np.float16)), (8, 8), 0),
        ("begins at a multiple of 16", good[:, 1:], (8, 8), 0),
        ("as long as the swizzle: got 128 and 64", good, (8, 64), 64),
        ("rows of 16-byte pieces", good, (8, 4), 0),
        ("1 to 256 elements", good, (257, 8), 0),
        ("1 to 5 axes", good, (8,), 0),
    ]:
        with pytest.raises(Fault, match=message):
            TensorMap(tensor, box, swizzle)
    with pytest.raises(Fault, match="a tensor map has 128"):
        execute(HEADER + "ret;}", "lines", (1,), 32, [NUMBERS, NUMBERS, NUMBERS])
    assert TensorMap(torch.zeros(8, 64, dtype=torch.bfloat16), (8, 64), 128).array.dtype == np.int16


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("setp.lt.u32 %p1, %r80, 4; @%p1 elect.sync _|%p2, 15;", "only a part of a warp"),
        ("setp.lt.u32 %p1, %r80, 32; @%p1 setmaxnreg.dec.sync.aligned.u32 40;", "only a part of a warpgroup"),
        ("setmaxnreg.dec.sync.aligned.u32 41;", "a multiple of 8: got 41"),
        ("mapa.shared::cluster.u32 %r1, %r85, 1;", "a cluster has 1 blocks: no rank 1"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r85];", "no mbarrier at shared address 0"),
        ("mbarrier.init.shared::cta.b64 [%r85+4], 1;", "misaligned for 8"),
    ],
)
def test_faults(lines: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(lines, threads=128)
