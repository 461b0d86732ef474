"""Global memory, shared memory with a shadow that finds races, and groups of asynchronous operations."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.testing.ptx_emulator.values import UNSIGNED, Array, Fault

WARP = 32


class GlobalMemory:
    """The arrays of the arguments, each at an address of its own, far from the others.

    An address keeps its place within 64 bytes, so what is misaligned for the GPU is misaligned here.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[int, int, Array]] = []  # address, bytes, memory from 16-byte boundary on
        self.end = 0x7000_0000_0000

    def add(self, pointer: int, size: int) -> int:
        """Maps ``size`` bytes at ``pointer`` of this process; returns their address in the machine."""
        address = (self.end + 0x10_0000 & ~0xFFF) + pointer % 64
        self.end = address + size
        lead = pointer % 16
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (lead + size)).from_address(pointer - lead))
        self.buffers.append((address, size, memory))
        return address

    def rows(self, addresses: Array, size: int) -> Iterator[tuple[Array, Array, Array]]:
        """(memory in rows of ``size`` bytes, index of each access, which of ``addresses`` these are)."""
        if (addresses % size).any():
            bad = int(addresses[addresses % size != 0][0])
            raise Fault(f"global address {bad:#x} is misaligned for {size} bytes")
        left = np.ones(len(addresses), bool)
        for base, length, memory in self.buffers:
            inside = left & (addresses >= base) & (addresses + size <= base + length)
            if inside.any():
                usable = memory[: len(memory) // size * size].reshape(-1, size)
                yield usable, (addresses[inside] - (base - base % 16)) // size, inside
                left &= ~inside
                if not left.any():
                    return
        if left.any():
            address = int(addresses[left][0])
            base, length, _ = min(self.buffers, key=lambda b: abs(address - b[0]), default=(0, 0, None))
            raise Fault(
                f"global address {address:#x} is out of bounds: "
                f"{size} bytes at {address - base} of an argument of {length} bytes"
            )

    def load(self, lanes: Array, addresses: Array, size: int) -> Array:
        out = np.empty((len(addresses), size), np.uint8)
        for memory, index, which in self.rows(addresses, size):
            out[which] = memory[index]
        return out

    def store(self, lanes: Array, addresses: Array, data: Array) -> None:
        for memory, index, which in self.rows(addresses, data.shape[1]):
            memory[index] = data[which]


class SharedMemory:
    """The shared memory of a batch of blocks, with a shadow that finds unsynchronised accesses.

    For each byte: whether it was written, whether an asynchronous copy to it is in flight, which warp (number + 1)
    wrote or read it since the last barrier, and whether a store to it is still to be made visible to wgmma by a fence.
    """

    SEVERAL = 255

    def __init__(self, blocks: int, threads: int, size: int) -> None:
        self.size, self.pitch = size, max(128, -(-size // 128) * 128)
        self.block = np.repeat(np.arange(blocks), threads)
        self.warp = (np.tile(np.arange(threads), blocks) // WARP + 1).astype(np.uint8)
        self.data = np.full(blocks * self.pitch, 0xFF, np.uint8)
        self.written, self.in_flight, self.writer, self.reader, self.unfenced = (
            np.zeros(self.data.shape, np.uint8) for _ in range(5)
        )
        self.conflicts = 0
        self.whole_cluster = False  # whether the next addresses are of ``shared::cluster``
        self.held: list[Array] = []  # byte indices that asynchronous matrix products still read

    def locate(self, lanes: Array, addresses: Array, size: int) -> Array:
        bad = (addresses < 0) | (addresses + size > self.size)
        if bad.any():
            raise Fault(f"shared address {int(addresses[bad][0])} is out of bounds: {size} bytes of {self.size}")
        if (addresses % size).any():
            raise Fault(f"shared address {int(addresses[addresses % size != 0][0])} is misaligned for {size} bytes")
        return (self.block[lanes] * self.pitch + addresses) // size

    def refuse(self, bad: Array, addresses: Array, lanes: Array, what: str) -> None:
        if bad.any():
            at = int(np.nonzero(bad.reshape(len(addresses), -1).any(1))[0][0])
            lane = int(lanes[at])
            raise Fault(f"shared address {int(addresses[at])} (block {self.block[lane]} of the batch): {what}")

    def load(self, lanes: Array, addresses: Array, size: int) -> Array:
        at = self.locate(lanes, addresses, size)
        me = self.warp[lanes][:, None]
        self.refuse(self.written.reshape(-1, size)[at] == 0, addresses, lanes, "read before it is written")
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, addresses, lanes, "read with a cp.async in flight")
        writer = self.writer.reshape(-1, size)[at]
        self.refuse((writer != 0) & (writer != me), addresses, lanes, "written by another warp since the last bar.sync")
        reader = self.reader.reshape(-1, size)
        seen = reader[at]
        mine = np.where((seen == 0) | (seen == me), me, np.uint8(self.SEVERAL))
        reader[at] = mine
        lost = (reader[at] != mine).any(1)  # several warps read the same bytes at once: one of them was recorded
        reader[at[lost]] = self.SEVERAL
        return self.data.reshape(-1, size)[at]

    def check_store(self, lanes: Array, addresses: Array, size: int) -> Array:
        at = self.locate(lanes, addresses, size)
        me = self.warp[lanes][:, None]
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, addresses, lanes, "written with a cp.async in flight")
        reader = self.reader.reshape(-1, size)[at]
        what = "read by another warp since the last bar.sync, or by a wgmma in flight"
        self.refuse((reader != 0) & (reader != me), addresses, lanes, what)
        return at

    def store(self, lanes: Array, addresses: Array, data: Array) -> None:
        size = data.shape[1]
        at = self.check_store(lanes, addresses, size)
        self.put(at, lanes, addresses, data)
        self.unfenced.reshape(-1, size)[at] = 1

    def put(self, at: Array, lanes: Array, addresses: Array, data: Array) -> None:
        """Writes rows; several warps may write a byte without a barrier only if they all write the same value."""
        size = data.shape[1]
        me = self.warp[lanes][:, None]
        memory, writer = self.data.reshape(-1, size), self.writer.reshape(-1, size)
        before = writer[at]
        foreign = (before != 0) & (before != me) & (memory[at] != data)
        self.refuse(foreign, addresses, lanes, "written by two warps without a bar.sync between")
        memory[at], writer[at] = data, me
        lost, other_warp = memory[at] != data, writer[at] != me
        self.refuse(lost & other_warp, addresses, lanes, "written by two warps without a bar.sync between")
        self.conflicts += int((lost & ~other_warp).sum())
        self.written.reshape(-1, size)[at] = 1

    def begin_copy(self, lanes: Array, addresses: Array, size: int) -> None:
        self.in_flight.reshape(-1, size)[self.check_store(lanes, addresses, size)] = 1

    def end_copy(self, lanes: Array, addresses: Array, data: Array) -> None:
        at = self.locate(lanes, addresses, data.shape[1])
        self.in_flight.reshape(-1, data.shape[1])[at] = 0
        self.put(at, lanes, addresses, data)

    def read_matrix(self, lanes: Array, addresses: Array, size: int) -> tuple[Array, Array]:
        """Elements of ``size`` bytes read by the warpgroups of ``lanes``: raw values, and the indices of their bytes.

        ``addresses``: (warpgroups, ...). The whole warpgroup reads, so a barrier must follow the writes of any warp.
        """
        flat = addresses.reshape(-1)
        of_lane = np.repeat(lanes, flat.size // max(1, len(lanes)))
        at = self.locate(of_lane, flat, size)
        self.refuse(self.written.reshape(-1, size)[at] == 0, flat, of_lane, "read before it is written")
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, flat, of_lane, "read with a cp.async in flight")
        self.refuse(self.writer.reshape(-1, size)[at] != 0, flat, of_lane, "written since the last bar.sync")
        self.refuse(self.unfenced.reshape(-1, size)[at] != 0, flat, of_lane, "stored since the last fence.proxy.async")
        self.reader.reshape(-1, size)[at] = self.SEVERAL
        touched = np.unique(at)
        return (
            self.data.view(UNSIGNED[size])[at].reshape(addresses.shape),
            (touched[:, None] * size + np.arange(size)).reshape(-1),
        )

    def hold(self, touched: list[Array]) -> None:
        """A matrix product in flight reads these bytes (arrays of indices) until it is waited for."""
        self.held += touched

    def let_go(self, touched: list[Array], lanes: Array) -> None:
        """The product of the ``lanes`` (a mask) has been waited for."""
        self.held = [held for held in self.held if not any(held is other for other in touched)]

    def barrier(self, blocks: Array | None = None) -> None:
        """What came before is visible now to the whole block; ``None`` stands for all blocks."""
        which = slice(None) if blocks is None else blocks
        self.writer.reshape(-1, self.pitch)[which] = 0
        self.reader.reshape(-1, self.pitch)[which] = 0
        for held in self.held:
            self.reader[held] = self.SEVERAL

    def fence(self, lanes: Array) -> None:
        """Stores (``st``, ``stmatrix``) before a fence of ``lanes`` can be read by matrix products after it."""
        self.unfenced.reshape(-1, self.pitch)[np.unique(self.block[lanes])] = 0


@dataclass
class Group:
    item: Any
    number: Array  # of the group, per lane
    lanes: Array  # still in flight, as a mask


class AsyncGroups:
    """Operations that complete when a thread waits for the group into which it committed them."""

    def __init__(self, lanes: int) -> None:
        self.open = np.zeros(lanes, np.int64)
        self.groups: list[Group] = []

    def issue(self, item: Any, lanes: Array) -> None:
        self.groups.append(Group(item, self.open.copy(), lanes.copy()))

    def commit(self, lanes: Array) -> None:
        self.open[lanes] += 1

    def wait(self, lanes: Array, allowed: int | None) -> list[tuple[Any, Array]]:
        """Completes all but the ``allowed`` latest groups (None: everything, committed or not)."""
        completed = []
        for group in self.groups:
            now = group.lanes & lanes
            if allowed is not None:
                now &= group.number < self.open - allowed
            if now.any():
                group.lanes = group.lanes & ~now
                completed.append((group.item, now))
        self.groups = [group for group in self.groups if group.lanes.any()]
        return completed
