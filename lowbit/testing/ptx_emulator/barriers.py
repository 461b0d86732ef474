"""Clusters, warps with work of their own, mbarriers and bulk copies (sm_90).

Threads of :class:`ConcurrentMachine` wait for mbarriers and for barriers of some warps or of a cluster. When all wait
for each other, that is a Fault. A bulk copy writes at the latest moment, when nobody else can go on, and reports to
its mbarrier then. A ``try_wait`` fails once before it waits, as it may on hardware, so a program without a loop around
it is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.testing.ptx_emulator.clocks import MOST_MBARRIERS, WINDOW, OrderedMemory
from lowbit.testing.ptx_emulator.machine import STEP_LIMIT, Machine
from lowbit.testing.ptx_emulator.matrices import WARPGROUP
from lowbit.testing.ptx_emulator.memory import WARP
from lowbit.testing.ptx_emulator.program import Address, BoxAddress, Instruction, Operand, Program, instruction
from lowbit.testing.ptx_emulator.values import UNSIGNED, Array, Fault

MOST_PENDING = (1 << 20) - 1  # arrivals, and bytes, of an mbarrier


@dataclass
class Mbarrier:
    """A phase completes when ``pending`` arrivals and ``bytes`` of copies are none any more."""

    agent: int  # as which its copies write
    count: int
    maker: int  # the warp that initialised it, and when
    made_at: int
    known: Array  # of those who arrived in this phase
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    known_before: Array | None = None  # of those who arrived in the phase before
    announced: bool = False  # its initialisation is visible to bulk copies

    def __post_init__(self) -> None:
        self.pending = self.count


@dataclass
class BulkCopy:
    place: Array
    data: Array
    bar: Mbarrier


@dataclass
class ClusterBarrier:
    arrived: Array  # a mask of lanes
    known: Array
    phase: int = 0
    known_before: Array | None = None


class ConcurrentMachine(Machine):
    shared: OrderedMemory

    def __init__(self, *arguments: Any, cluster: int, newest_first: bool, tensors: dict[int, TensorMap]) -> None:
        super().__init__(*arguments)
        program, threads, blocks, shared_bytes = (arguments[n] for n in (0, 4, 5, 6))
        size = program.shared_bytes + shared_bytes
        self.shared = OrderedMemory(len(blocks), math.prod(threads), size, cluster)
        self.cluster, self.newest_first, self.tensors = cluster, newest_first, tensors
        self.bars: dict[tuple[int, int], Mbarrier] = {}  # by block and address
        self.bulk: list[BulkCopy] = []
        every = np.zeros(self.lanes, np.int64)
        self.parked = np.zeros(self.lanes, bool)  # until `parked_for` completes a phase
        self.parked_for: list[Mbarrier | None] = [None] * self.lanes
        self.failed: dict[int, tuple[int, int]] = {}  # of a lane: the mbarrier and phase for which its wait failed
        self.asking = np.zeros(self.lanes, bool)  # parked at a test_wait, which may also say no
        self.stay: Array | None = None  # lanes that do not leave the instruction
        self.done, self.waiting = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        self.barrier_number, self.barrier_count = every.copy(), every.copy()  # of who waits; 0 threads: all
        # what the warps knew that arrived and went on (bar.arrive), by block and number of the barrier
        self.arrivals: dict[tuple[int, int], list[Array]] = {}
        clusters, agents = len(blocks) // cluster, self.shared.knows.shape[2]
        self.cluster_barriers = [
            ClusterBarrier(np.zeros(self.lanes, bool), np.zeros(agents, np.int64)) for _ in range(clusters)
        ]
        # of a lane: barriers of its cluster at which it arrived, and for which it waited
        self.cluster_phase, self.cluster_waited = every.copy(), every.copy()
        rank = np.asarray(blocks)[self.block] % cluster
        self.special["%cluster_ctarank"], self.special["%cluster_ctaid.x"] = rank, rank
        for name in ("%cluster_nctarank", "%cluster_nctaid.x"):
            self.special[name] = np.full(self.lanes, cluster)
        self.special["%dynamic_smem_size"] = np.full(self.lanes, shared_bytes)

    # The order in which threads run

    def run(self) -> None:
        program = self.program.instructions
        place = np.zeros(self.lanes, np.int64)
        refusals = 0
        for _ in range(STEP_LIMIT):
            runnable = ~(self.done | self.waiting | self.parked)
            if not runnable.any():
                if self.release_barriers(place) or self.land():
                    refusals = 0
                elif self.asking.any() and refusals < 2:
                    self.refuse_tests(place)
                    refusals += 1
                elif self.done.all():
                    return
                else:
                    lane = int(np.nonzero(~self.done)[0][0])
                    text = program[place[lane]].text if self.parked[lane] else program[place[lane] - 1].text
                    raise Fault(
                        f"deadlock: {int((~self.done).sum())} threads wait, thread {lane} of the batch at: {text}"
                    )
                continue
            at = int(place[runnable].min())
            active = runnable & (place == at)
            if at >= len(program):
                raise Fault("execution runs past the end of the kernel")
            self.stay = None
            outcome = self.step(program[at], None if active.all() else active)
            if self.stay is not None:
                self.parked |= self.stay
                active = active & ~self.stay
            place[active] = at + 1
            taken = self.active_mask
            if outcome == "exit":
                self.done |= taken
                self.end_blocks()
            elif outcome == "barrier":
                self.waiting |= taken
            elif outcome is not None:
                place[taken] = self.program.labels[outcome]
        raise Fault(f"still running after {STEP_LIMIT} instructions")

    def end_blocks(self) -> None:
        self.shared.ended[:] = self.done.reshape(len(self.shared.ended), -1).all(1)
        if self.shared.landing.reshape(len(self.shared.ended), -1)[self.shared.ended].any():
            raise Fault("a block ends while a bulk copy to its shared memory is on its way")
        for number in range(len(self.cluster_barriers)):
            self.complete_cluster_barrier(number)

    def release_barriers(self, place: Array) -> bool:
        """Lets the threads of complete barriers go on; whether there were any."""
        released = False
        for block in np.unique(self.block[self.waiting]).tolist():
            here = self.block == block
            for number in np.unique(self.barrier_number[self.waiting & here]).tolist():
                lanes = self.waiting & here & (self.barrier_number == number)
                (count, *others) = np.unique(self.barrier_count[lanes]).tolist()
                if others:
                    raise Fault(f"threads wait at barrier {number} for {count} and for {others[0]} threads")
                early = self.arrivals.get((block, number), [])
                present = int(lanes.sum()) + WARP * len(early)
                if present < (count or int((here & ~self.done).sum())):
                    continue
                if count and present > count:
                    raise Fault(f"{present} threads are at barrier {number} of {count}")
                if not count and len(np.unique(place[lanes])) > 1:
                    raise Fault("threads of a block wait at different bar.sync")
                self.arrivals.pop((block, number), None)
                agents = np.unique(self.shared.agent[lanes]).tolist()
                self.shared.meet(block // self.cluster, agents, early)
                self.waiting &= ~lanes
                released = True
        return released

    def refuse_tests(self, place: Array) -> None:
        """No time is left: who only asked is told that the phase is not complete."""
        lanes = np.nonzero(self.asking)[0]
        for lane in lanes.tolist():
            wait = self.program.instructions[place[lane]]
            self.mask, self.tainted = np.arange(self.lanes) == lane, None
            self.write(wait.operands[0], np.zeros(self.lanes, bool))
        place[lanes] += 1
        self.parked[lanes] = self.asking[lanes] = False

    # mbarriers

    def bar_at(self, lane: int, address: int) -> Mbarrier:
        """The mbarrier at an address of a lane's block or cluster; the lane's warp must know that it is initialised."""
        block, rank = int(self.block[lane]), address >> WINDOW
        if rank:
            block, address = block // self.cluster * self.cluster + rank - 1, address & (1 << WINDOW) - 1
        bar = self.bars.get((block, address))
        if bar is None:
            raise Fault(f"there is no mbarrier at shared address {address}")
        me, cluster = int(self.shared.agent[lane]), int(self.shared.of_cluster[lane])
        if me != bar.maker and self.shared.knows[cluster, me, bar.maker] < bar.made_at:
            raise Fault(f"race: warp {me} uses an mbarrier, and does not know that warp {bar.maker} initialised it")
        return bar

    def arrive(self, lane: int, bar: Mbarrier, count: int, expected: int = 0) -> int:
        """Arrivals of a thread; returns the phase."""
        phase, cluster = bar.phase, int(self.shared.of_cluster[lane])
        if count > bar.pending:
            raise Fault(f"{count} arrivals at an mbarrier that waits for {bar.pending} more")
        bar.bytes += expected
        bar.pending -= count
        np.maximum(bar.known, self.shared.give(cluster, int(self.shared.agent[lane])), out=bar.known)
        self.complete(bar)
        return phase

    def complete(self, bar: Mbarrier) -> None:
        if abs(bar.bytes) > MOST_PENDING:
            raise Fault(f"an mbarrier expects {bar.bytes} bytes: at most {MOST_PENDING}")
        if bar.pending or bar.bytes:
            return
        bar.known_before, bar.known = bar.known, np.zeros_like(bar.known)
        bar.known_before[bar.agent] = bar.phase + 1
        bar.phase, bar.pending = bar.phase + 1, bar.count
        for lane in np.nonzero(self.parked)[0].tolist():
            if self.parked_for[lane] is bar:
                self.parked[lane] = self.asking[lane] = False

    def land(self) -> bool:
        """One bulk copy ends; whether there was any."""
        if not self.bulk:
            return False
        copy = self.bulk.pop(-1 if self.newest_first else 0)
        self.shared.end_bulk(copy.place, copy.data, copy.bar.agent, copy.bar.phase)
        copy.bar.bytes -= copy.data.size
        self.complete(copy.bar)
        return True

    def announce(self) -> None:
        """The mbarriers that the active warps initialised become visible to bulk copies."""
        lanes = self.active.tolist()
        active = {(int(self.shared.of_cluster[lane]), int(self.shared.agent[lane])) for lane in lanes}
        for (block, _), bar in self.bars.items():
            bar.announced |= (block // self.cluster, bar.maker) in active

    def fence(self) -> None:
        super().fence()
        self.announce()

    # Barriers of a cluster

    def complete_cluster_barrier(self, number: int) -> None:
        barrier = self.cluster_barriers[number]
        members = (self.shared.of_cluster == number) & ~self.done
        if not members.any() or not barrier.arrived[members].all():
            return
        barrier.known_before, barrier.known = barrier.known, np.zeros_like(barrier.known)
        barrier.arrived[:] = False
        barrier.phase += 1
        self.parked[members & [waits is None for waits in self.parked_for]] = False


def concurrent(program: Program) -> bool:
    """Whether a program has threads that wait for anything but ``bar.sync 0``."""
    names = ("mbarrier", "barrier.cluster", "cp.async.bulk", "bar.arrive", "barrier.cta.arrive", "mapa")
    return any(
        i.name.startswith(names) or (i.name in BARRIERS and (i.operands[0] != "0" or len(i.operands) > 1))
        for i in program.instructions
    )


BARRIERS = ("bar.sync", "barrier.sync", "barrier.cta.sync")


def of_machine(m: Machine) -> ConcurrentMachine:
    if not isinstance(m, ConcurrentMachine):
        raise Fault("not without a cluster or an mbarrier")
    return m


# ---------------------------------------------------------------------------------------------------------------------
# Barriers of some threads of a block


@instruction(*BARRIERS, accepts="aligned")
def block_barrier(m: Machine, i: Instruction) -> str:
    if isinstance(m, ConcurrentMachine):
        number, count = barrier_of(m, i)
        m.barrier_number[m.active], m.barrier_count[m.active] = number[m.active], count[m.active]
    return "barrier"


@instruction("bar.arrive", "barrier.arrive", "barrier.cta.arrive", accepts="aligned")
def arrive_at_block_barrier(m: Machine, i: Instruction) -> None:
    machine = of_machine(m)
    number, _ = barrier_of(m, i)
    for lane in m.active[::WARP].tolist():
        known = machine.shared.give(int(machine.shared.of_cluster[lane]), int(machine.shared.agent[lane]))
        machine.arrivals.setdefault((int(m.block[lane]), int(number[lane])), []).append(known)


def barrier_of(m: Machine, i: Instruction) -> tuple[Array, Array]:
    """Number and threads (0: all of the block) of a barrier, for each lane."""
    m.whole(WARP, "warp")
    number, count = (m.read(operand, "b32").astype(np.int64) for operand in (i.operands[0], (*i.operands, "0")[1]))
    m.require_defined()
    if (number[m.active] > 15).any():
        raise Fault(f"a block has barriers 0 to 15: got {int(number[m.active].max())}")
    if (count[m.active] % WARP).any():
        raise Fault(f"a barrier's threads must be a multiple of {WARP}: got {int(count[m.active].max())}")
    return number, count


# ---------------------------------------------------------------------------------------------------------------------
# mbarriers


def addressed(m: Machine, operand: Operand) -> list[tuple[int, int]]:
    """(lane, address) of the active threads."""
    return list(zip(m.active.tolist(), m.address(operand)[m.active].tolist(), strict=True))


@instruction("mbarrier.init", accepts="shared shared::cta b64")
def initialise(m: Machine, i: Instruction) -> None:
    machine, counts = of_machine(m), m.read(i.operands[1], "b32")
    memory = machine.shared
    for lane, address in addressed(m, i.operands[0]):
        block, cluster, me = int(m.block[lane]), int(memory.of_cluster[lane]), int(memory.agent[lane])
        one = np.array([lane])
        at = memory.check_store(one, np.array([address]), 8)
        memory.opaque[memory.words(at, 8)] = True
        if (block, address) in machine.bars:
            raise Fault(f"the mbarrier at shared address {address} is initialised twice")
        if not 1 <= int(counts[lane]) <= MOST_PENDING:
            raise Fault(f"an mbarrier waits for 1 to {MOST_PENDING} arrivals: got {int(counts[lane])}")
        number = int(memory.mbarriers[cluster])
        if number == MOST_MBARRIERS:
            raise Fault(f"more than {MOST_MBARRIERS} mbarriers of a cluster are not modelled")
        memory.mbarriers[cluster] += 1
        agent = memory.cluster * memory.warps + number
        machine.bars[block, address] = Mbarrier(
            agent, int(counts[lane]), me, int(memory.knows[cluster, me, me]), np.zeros(memory.knows.shape[2], np.int64)
        )


@instruction("fence.mbarrier_init", accepts="release cluster")
def fence_initialisation(m: Machine, i: Instruction) -> None:
    of_machine(m).announce()


@instruction("mbarrier.arrive", "mbarrier.arrive.expect_tx", "mbarrier.expect_tx",
             accepts="shared shared::cta shared::cluster b64 release relaxed cta cluster noComplete")  # fmt: skip
def arrive(m: Machine, i: Instruction) -> None:
    """``state, [address]{, count}`` or ``{state,} [address], bytes``."""
    machine = of_machine(m)
    operands = list(i.operands)
    state = operands.pop(0) if not isinstance(operands[0], Address) else "_"
    expects = "expect_tx" in i.name
    given = m.read(operands[1], "b32").astype(np.int64) if len(operands) > 1 else np.ones(m.lanes, np.int64)
    m.require_defined()
    phases = np.zeros(m.lanes, np.uint64)
    for lane, address in addressed(m, operands[0]):
        bar = machine.bar_at(lane, address)
        if i.name == "mbarrier.expect_tx":
            bar.bytes += int(given[lane])
        else:
            count, expected = (1, int(given[lane])) if expects else (int(given[lane]), 0)
            phases[lane] = machine.arrive(lane, bar, count, expected)
    m.write(state, phases)


@instruction("mbarrier.try_wait", "mbarrier.test_wait", "mbarrier.try_wait.parity", "mbarrier.test_wait.parity",
             accepts="shared shared::cta b64 acquire relaxed cta cluster")  # fmt: skip
def wait(m: Machine, i: Instruction) -> None:
    """``complete, [address], parity or state {, time}``"""
    machine = of_machine(m)
    wanted = m.read(i.operands[2], "b32" if "parity" in i.name else "b64")
    m.require_defined()
    complete, stay = np.zeros(m.lanes, bool), np.zeros(m.lanes, bool)
    memory, learned = machine.shared, list[tuple[int, int, Array]]()
    for lane, address in addressed(m, i.operands[1]):
        bar = machine.bar_at(lane, address)
        ready = bar.phase % 2 != int(wanted[lane]) % 2 if "parity" in i.name else bar.phase > int(wanted[lane])
        cluster, agent = int(memory.of_cluster[lane]), int(memory.agent[lane])
        known = bar.known_before if ready else None
        sure = ready and (known is None or bool((known <= memory.knows[cluster, agent]).all()))
        attempt = bar.agent, bar.phase - ready
        if not sure and machine.failed.get(lane) != attempt:  # the phase could also be complete later
            machine.failed[lane] = attempt
        elif not ready:
            stay[lane], machine.parked_for[lane] = True, bar
            machine.asking[lane] = "test_wait" in i.name
        else:
            complete[lane] = True
            if known is not None and not sure and "relaxed" not in i.modifiers:
                learned.append((cluster, agent, known))
    for cluster, agent, known in learned:
        memory.take(cluster, agent, known)
    m.write(i.operands[0], complete)
    if stay.any():
        machine.stay = stay


# ---------------------------------------------------------------------------------------------------------------------
# Bulk copies of tensors


class TensorMap:
    """What ``cuTensorMapEncodeTiled`` makes: of a tensor, and how a box of it is copied.

    Args:
        tensor: a tensor or an array; its last axis is contiguous.
        box: how many elements a copy has along each axis of ``tensor``.
        swizzle: bytes, 0, 32, 64 or 128: 16-byte pieces of as many bytes are exchanged in shared memory, by XOR with
            the number of the row of 128 bytes.
    """

    def __init__(self, tensor: Any, box: Sequence[int], swizzle: int = 0) -> None:
        if not isinstance(tensor, np.ndarray):  # bfloat16 is not known to numpy
            import torch

            tensor = tensor.view(torch.int16).numpy() if tensor.element_size() == 2 else tensor.numpy()
        self.array: Array = tensor
        self.box, self.swizzle = tuple(box), swizzle
        size, row = tensor.itemsize, self.box[-1] * tensor.itemsize
        if not 1 <= tensor.ndim <= 5 or len(self.box) != tensor.ndim:
            raise Fault(f"a tensor map has 1 to 5 axes, and its box as many: got {tensor.ndim} and {len(self.box)}")
        if tensor.strides[-1] != size or any(stride % 16 for stride in tensor.strides[:-1]):
            raise Fault(f"rows of a tensor map begin at multiples of 16 bytes: got strides {tensor.strides}")
        if tensor.ctypes.data % 16:
            raise Fault("a tensor map begins at a multiple of 16 bytes")
        if not all(1 <= n <= 256 for n in self.box) or row % 16:
            raise Fault(f"a box has 1 to 256 elements along an axis, and rows of 16-byte pieces: got {self.box}")
        if swizzle not in (0, 32, 64, 128) or (swizzle and row > swizzle):
            raise Fault(f"a row of a box is at most as long as the swizzle: got {row} and {swizzle} bytes")

    def read(self, corner: Sequence[int]) -> Array:
        """(pieces of 16 bytes, 16): the box at ``corner``, whose last axis comes first; zeros outside the tensor."""
        starts = tuple(corner)[::-1]
        data = np.zeros(self.box, self.array.dtype)
        inside = [(max(0, s), min(n, s + b)) for s, b, n in zip(starts, self.box, self.array.shape, strict=True)]
        if all(low < high for low, high in inside):
            to = tuple(slice(low - s, high - s) for (low, high), s in zip(inside, starts, strict=True))
            data[to] = self.array[tuple(slice(low, high) for low, high in inside)]
        return data.reshape(-1).view(np.uint8).reshape(-1, 16)

    def place(self, start: int) -> Array:
        """Shared addresses of the pieces of a box that is copied to ``start``."""
        address = start + 16 * np.arange(math.prod(self.box) * self.array.itemsize // 16)
        if start % 128:
            raise Fault(f"a box is copied to a multiple of 128 bytes: got {start}")
        return address ^ ((address >> 7 & self.swizzle // 16 - 1) << 4) if self.swizzle else address


@instruction(*(f"cp.async.bulk.tensor.{n}d" for n in range(1, 6)),
             accepts="shared::cluster shared::cta global tile mbarrier::complete_tx::bytes L2::cache_hint")  # fmt: skip
def copy_box(m: Machine, i: Instruction) -> None:
    """``[to], [map, {coordinates}], [mbarrier]``: reads now, writes when :meth:`ConcurrentMachine.land` says so."""
    machine = of_machine(m)
    to, source, signal = i.operands[:3]
    if i.modifiers[:2] not in (("shared::cluster", "global"), ("shared::cta", "global")):
        raise Fault("a bulk copy from shared memory is not modelled")
    if not isinstance(source, BoxAddress):
        raise Fault(f"unknown source {source}")
    maps, corners = m.read(source.tensor, "b64"), [m.read(c, "b32").view(np.int32) for c in source.coordinates]
    m.require_defined()
    targets, bars = m.address(to), m.address(signal)
    machine.shared.whole_cluster = True
    for lane in m.active.tolist():
        tensor = machine.tensors.get(int(maps[lane]))
        if tensor is None:
            raise Fault(f"there is no tensor map at {int(maps[lane]):#x}")
        bar = machine.bar_at(lane, int(bars[lane]))
        if not bar.announced:
            raise Fault("a bulk copy uses an mbarrier that no fence made visible to it: fence.mbarrier_init")
        data = tensor.read([int(corner[lane]) for corner in corners])
        place = machine.shared.begin_bulk(lane, tensor.place(int(targets[lane])), 16)
        machine.bulk.append(BulkCopy(place, data, bar))
    machine.shared.whole_cluster = False


@instruction("prefetch.tensormap", accepts="param global")
def prefetch_map(m: Machine, i: Instruction) -> None:
    pass


# ---------------------------------------------------------------------------------------------------------------------
# Clusters and warps


@instruction("mapa", accepts="shared::cluster")
def map_to_block(m: Machine, i: Instruction) -> None:
    """The address, in the cluster, of what is at an address of this block, but in the block of another rank."""
    machine = of_machine(m)
    address, rank = (m.read(operand, "b32").astype(np.int64) for operand in i.operands[1:])
    if (rank[m.active] >= machine.cluster).any():
        raise Fault(f"a cluster has {machine.cluster} blocks: no rank {int(rank[m.active].max())}")
    m.write(i.operands[0], (address & (1 << WINDOW) - 1 | rank + 1 << WINDOW).astype(UNSIGNED[4]))


@instruction("barrier.cluster.arrive", accepts="release relaxed aligned")
def arrive_at_cluster_barrier(m: Machine, i: Instruction) -> None:
    machine = of_machine(m)
    memory = machine.shared
    for lane in m.active.tolist():
        barrier = machine.cluster_barriers[memory.of_cluster[lane]]
        if machine.cluster_phase[lane] > machine.cluster_waited[lane]:
            raise Fault("a thread arrives twice at a barrier of its cluster, and does not wait between")
        barrier.arrived[lane] = True
        machine.cluster_phase[lane] += 1
    for warp in np.unique(m.active // WARP).tolist() if "relaxed" not in i.modifiers else ():
        cluster, agent = int(memory.of_cluster[warp * WARP]), int(memory.agent[warp * WARP])
        known = machine.cluster_barriers[cluster].known
        np.maximum(known, memory.give(cluster, agent), out=known)
    for number in np.unique(memory.of_cluster[m.active]).tolist():
        machine.complete_cluster_barrier(number)


@instruction("barrier.cluster.wait", accepts="acquire aligned")
def wait_for_cluster(m: Machine, i: Instruction) -> None:
    machine = of_machine(m)
    memory = machine.shared
    phases = np.array([barrier.phase for barrier in machine.cluster_barriers])[memory.of_cluster]
    stay = m.active_mask & (phases < machine.cluster_phase)
    going = m.active_mask & ~stay
    machine.cluster_waited[going] = machine.cluster_phase[going]
    for warp in np.unique(np.nonzero(going)[0] // WARP).tolist():
        cluster = int(memory.of_cluster[warp * WARP])
        known = machine.cluster_barriers[cluster].known_before
        if known is None:
            raise Fault("a thread waits for a barrier of its cluster at which it has not arrived")
        memory.take(cluster, int(memory.agent[warp * WARP]), known)
    for lane in np.nonzero(stay)[0].tolist():
        machine.parked_for[lane] = None
    if stay.any():
        machine.stay = stay


@instruction("elect.sync")
def elect(m: Machine, i: Instruction) -> None:
    """``lane|elected, mask``: one thread of a warp; here the first."""
    m.whole(WARP, "warp")
    register, _, predicate = str(i.operands[0]).partition("|")
    m.write(register, np.zeros(m.lanes, np.uint32))
    m.write(predicate, m.special["%laneid"] == 0)


@instruction("setmaxnreg.inc.sync.aligned", "setmaxnreg.dec.sync.aligned")
def set_registers(m: Machine, i: Instruction) -> None:
    m.whole(WARPGROUP, "warpgroup")
    count = int(str(i.operands[0]))
    if not 24 <= count <= 256 or count % 8:
        raise Fault(f"a thread has 24 to 256 registers, a multiple of 8: got {count}")
