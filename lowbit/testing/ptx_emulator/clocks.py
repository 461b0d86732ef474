"""Shared memory of clusters of blocks, where what happens before what is known from vector clocks.

A warp has a clock, and knows of every other warp up to which time its accesses happen before its own. It learns by
synchronisation: who arrives at a barrier gives what it knows, who has waited for the barrier takes it. An access that
meets another one of the same word, one of them a write, must know of it; if not, they are a race, in whatever order
they ran here. A bulk copy writes as an agent of its own: its mbarrier, whose phases are its times. So only who has
waited for that phase of that mbarrier knows of the copy.

Of each word (4 bytes): the last writer and its time, and the time at which each warp last read it. Accesses of two
warps to different bytes of a word count as meeting. L. Lamport, "Time, clocks, and the ordering of events in a
distributed system", CACM 21(7), 1978; C. Flanagan, S. Freund, "FastTrack: efficient and precise dynamic race
detection", PLDI 2009.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowbit.testing.ptx_emulator.memory import WARP, SharedMemory
from lowbit.testing.ptx_emulator.values import UNSIGNED, Array, Fault

WORD = 4
MOST_MBARRIERS = 64  # of a cluster
WINDOW = 24  # an address in ``shared::cluster`` has the block's rank in the cluster, plus one, above this many bits


class OrderedMemory(SharedMemory):
    """See the module. An agent is a warp of a cluster, or one of its mbarriers."""

    def __init__(self, blocks: int, threads: int, size: int, cluster: int) -> None:
        super().__init__(blocks, threads, size)
        self.cluster, self.warps = cluster, threads // WARP
        self.of_cluster = self.block // cluster  # of each lane
        self.agent = self.block % cluster * self.warps + self.warp - 1
        agents, words = cluster * self.warps, self.data.size // WORD
        self.mbarriers = np.zeros(blocks // cluster, np.int64)  # how many have been initialised
        self.knows = np.zeros((blocks // cluster, agents, agents + MOST_MBARRIERS), np.int64)
        self.knows[:, np.arange(agents), np.arange(agents)] = 1
        self.writer_of, self.written_at = np.full(words, -1, np.int16), np.zeros(words, np.int32)
        self.read_at = np.zeros((agents, words), np.int32)
        self.landing = np.zeros(words, bool)  # a bulk copy to it is on its way
        self.holders = np.zeros(words, np.int16)  # matrix products in flight that read it
        self.opaque = np.zeros(words, bool)  # a part of an mbarrier
        self.ended = np.zeros(blocks, bool)

    # Clocks

    def give(self, cluster: int, agent: int) -> Array:
        """What an agent knows; what it does next is later than that."""
        known: Array = self.knows[cluster, agent].copy()
        self.knows[cluster, agent, agent] += 1
        return known

    def take(self, cluster: int, agent: int, known: Array) -> None:
        np.maximum(self.knows[cluster, agent], known, out=self.knows[cluster, agent])

    def meet(self, cluster: int, agents: Sequence[int], others: Sequence[Array]) -> None:
        """A barrier: everyone takes what everyone gives, and what others gave before."""
        known = np.max([*others, *(self.give(cluster, agent) for agent in agents)], axis=0)
        for agent in agents:
            self.take(cluster, agent, known)

    # Accesses

    def locate(self, lanes: Array, addresses: Array, size: int) -> Array:
        rank = addresses >> WINDOW
        if not rank.any():
            return super().locate(lanes, addresses, size)
        if not self.whole_cluster:
            raise Fault(f"shared address {int(addresses[rank != 0][0]):#x} is of another block: use shared::cluster")
        own = self.block[lanes]
        blocks = np.where(rank > 0, own // self.cluster * self.cluster + rank - 1, own)
        if (rank > self.cluster).any():
            raise Fault(f"a cluster has {self.cluster} blocks: no rank {int(rank.max()) - 1}")
        if (self.ended[blocks] & (blocks != own)).any():
            raise Fault("shared memory of a block that has ended")
        super().locate(lanes, addresses & (1 << WINDOW) - 1, size)
        found: Array = (blocks * self.pitch + (addresses & (1 << WINDOW) - 1)) // size
        return found

    @staticmethod
    def words(at: Array, size: int) -> Array:
        """(accesses, words) of the accesses of ``size`` bytes at ``at``, which :meth:`locate` gave."""
        found: Array = (at * size // WORD)[:, None] + np.arange(max(1, size // WORD))
        return found

    def where(self, word: int) -> str:
        block, offset = divmod(int(word) * WORD, self.pitch)
        return f"shared address {offset} (block {block} of the batch)"

    def agent_name(self, agent: int) -> str:
        own = self.cluster * self.warps
        return f"warp {agent}" if agent < own else f"a bulk copy to mbarrier {agent - own}"

    def order(self, clusters: Array, agents: Array, words: Array, writes: bool) -> None:
        """Refuses accesses of ``agents``, one for each row of ``words``, that race."""
        what = "writes" if writes else "reads"
        for bad, why in (
            (self.opaque, "is a part of an mbarrier"),
            (self.landing, "is accessed while a bulk copy to it is on its way"),
            (self.holders if writes else None, "is written while a matrix product in flight reads it"),
        ):
            if bad is not None and (found := bad[words] != 0).any():
                raise Fault(f"{self.where(words[found][0])} {why}")
        writer, me = self.writer_of[words], agents[:, None]
        known = self.knows[clusters[:, None], me, np.maximum(writer, 0)]
        race = (writer >= 0) & (writer != me) & (self.written_at[words] > known)
        if race.any():
            row = int(np.nonzero(race.any(1))[0][0])
            raise Fault(
                f"race: {self.where(words[race][0])}: warp {agents[row]} {what} what "
                f"{self.agent_name(int(writer[race][0]))} wrote, and does not know of it"
            )
        if not writes:
            return
        for reader in range(len(self.read_at)):
            known = self.knows[clusters, agents, reader][:, None]
            race = (self.read_at[reader][words] > known) & (me != reader)
            if race.any():
                row = int(np.nonzero(race.any(1))[0][0])
                raise Fault(
                    f"race: {self.where(words[race][0])}: warp {agents[row]} writes what warp {reader} read, "
                    "and does not know of it"
                )

    def load(self, lanes: Array, addresses: Array, size: int) -> Array:
        at = self.locate(lanes, addresses, size)
        words, agents, clusters = self.words(at, size), self.agent[lanes], self.of_cluster[lanes]
        self.order(clusters, agents, words, False)
        self.refuse(self.written.reshape(-1, size)[at] == 0, addresses, lanes, "read before it is written")
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, addresses, lanes, "read with a cp.async in flight")
        self.read_at[agents[:, None], words] = self.knows[clusters, agents, agents][:, None]
        return self.data.reshape(-1, size)[at]

    def check_store(self, lanes: Array, addresses: Array, size: int) -> Array:
        at = self.locate(lanes, addresses, size)
        self.order(self.of_cluster[lanes], self.agent[lanes], self.words(at, size), True)
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, addresses, lanes, "written with a cp.async in flight")
        return at

    def put(self, at: Array, lanes: Array, addresses: Array, data: Array) -> None:
        size = data.shape[1]
        words, agents, clusters = self.words(at, size), self.agent[lanes][:, None], self.of_cluster[lanes][:, None]
        memory = self.data.reshape(-1, size)
        memory[at], self.written.reshape(-1, size)[at] = data, 1
        self.writer_of[words], self.written_at[words] = agents, self.knows[clusters, agents, agents]
        lost = self.writer_of[words] != agents
        if lost.any():
            raise Fault(f"race: {self.where(words[lost][0])}: two warps write it at once")
        self.conflicts += int((memory[at] != data).sum())

    # Matrix products, which read for the four warps of a warpgroup and until they are waited for

    def read_matrix(self, lanes: Array, addresses: Array, size: int) -> tuple[Array, Array]:
        flat = addresses.reshape(-1)
        of_lane = np.repeat(lanes, flat.size // max(1, len(lanes)))
        at = self.locate(of_lane, flat, size)
        for warp in range(4):
            warps = of_lane + warp * WARP
            self.order(self.of_cluster[warps], self.agent[warps], self.words(at, size), False)
        self.refuse(self.written.reshape(-1, size)[at] == 0, flat, of_lane, "read before it is written")
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, flat, of_lane, "read with a cp.async in flight")
        self.refuse(self.unfenced.reshape(-1, size)[at] != 0, flat, of_lane, "stored since the last fence.proxy.async")
        return self.data.view(UNSIGNED[size])[at].reshape(addresses.shape), np.unique(self.words(at, size))

    def hold(self, touched: list[Array]) -> None:
        for words in touched:
            self.holders[words] += 1

    def let_go(self, touched: list[Array], lanes: Array) -> None:
        for words in touched:
            self.holders[words] -= 1
            block = words * WORD // self.pitch
            for warp in np.unique(np.nonzero(lanes)[0] // WARP):
                lane = int(warp) * WARP
                agent, cluster = self.agent[lane], self.of_cluster[lane]
                self.read_at[agent, words[block == self.block[lane]]] = self.knows[cluster, agent, agent]

    def fence(self, lanes: Array) -> None:
        """Only the threads that stored can make their stores visible to matrix products and bulk copies."""
        for lane in np.unique(lanes // WARP) * WARP:
            block = slice(self.block[lane] * self.pitch, (self.block[lane] + 1) * self.pitch)
            writer = np.repeat(self.writer_of[block.start // WORD : block.stop // WORD], WORD)
            self.unfenced[block][writer == self.agent[lane]] = 0

    # Bulk copies

    def begin_bulk(self, lane: int, addresses: Array, size: int) -> Array:
        """A thread issues a copy to ``addresses``, and must know of every access to what is there. Their places."""
        lanes = np.full(len(addresses), lane)
        at = self.locate(lanes, addresses, size)
        words = self.words(at, size)
        self.order(self.of_cluster[lanes], self.agent[lanes], words, True)
        what = "is stored since the last fence.proxy.async, and overwritten by a bulk copy"
        self.refuse(self.unfenced.reshape(-1, size)[at] != 0, addresses, lanes, what)
        self.landing[words] = True
        return at

    def end_bulk(self, at: Array, data: Array, agent: int, phase: int) -> None:
        size = data.shape[1]
        words = self.words(at, size)
        self.data.reshape(-1, size)[at] = data
        self.written.reshape(-1, size)[at] = 1
        self.landing[words] = False
        self.writer_of[words], self.written_at[words] = agent, phase + 1
