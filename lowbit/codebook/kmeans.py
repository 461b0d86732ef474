"""One-dimensional (weighted) k-means for many small tables at once: k-means++ and Lloyd, or the exact optimum.

Values are sorted once per table. A cluster is then a range of neighbours. Its mean and its squared error follow from
its two ends, by prefix sums of h, h*x and h*x**2. So a Lloyd round costs one search per cluster boundary, for any
number of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.backends.cpu import native

__all__ = ["boundaries", "kmeans", "optimal"]


@torch.no_grad()
def kmeans(
    values: Tensor, weights: Tensor | None, clusters: int, *, iterations: int = 10, seed: int = 0, first_row: int = 0
) -> Tensor:
    """Centroids ``[R, clusters]``, float32 and ascending, of each row of ``values`` ``[R, n]``.

    First k-means++ (Arthur & Vassilvitskii, SODA 2007): each next centroid is drawn from the values, with probability
    proportional to h times the squared distance to the nearest centroid so far. Then ``iterations`` Lloyd rounds. A
    cluster that loses all its values keeps its centroid, so that no round increases the error. A row's random numbers
    follow from the seed and the row's number, so its result does not depend on the other rows. A row of at most
    ``clusters`` distinct values gets these, the largest one repeated.

    Args:
        values: float32; ``inf`` marks an element that does not exist.
        weights: h > 0, float32 ``[R, n]``; ``None``: all 1.
        first_row: the number of the first row.
    """
    points = _Points.of(values, weights)
    generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers wherever the values are
    start, step = torch.rand(2, clusters, dtype=torch.float64, device="cpu", generator=generator)
    rows = torch.arange(first_row, first_row + len(values), dtype=torch.float64, device="cpu").unsqueeze(1)
    centroids = points.plus_plus((start + rows * step).frac().to(values.device))
    for _ in range(iterations):
        centroids = points.means(points.edges(centroids), centroids)
    return points.with_few_values(centroids)


@torch.no_grad()
def optimal(values: Tensor, weights: Tensor | None, clusters: int) -> Tensor:
    """The centroids of least squared error; arguments and result are those of :func:`kmeans`.

    Dynamic programming over the sorted values, F_j(i) = min_l F_{j-1}(l) + error(l, i). The best l never falls as i
    grows, so each F_j costs O(n log n) (Grønlund et al., arXiv 1701.07204). It runs in the compiled library, or in
    numpy where there is none.
    """
    if values.device.type == "cpu" and native.load() is None:
        x, h = _sorted(values, weights)
        found: Tensor = torch.ops.lowbit_native.kmeans_optimal(x, h, clusters)
        return found
    points = _Points.of(values, weights)
    edges = _optimal_edges(points, clusters).to(points.x.device)
    return points.with_few_values(points.means(edges, None))


def boundaries(tables: Tensor) -> Tensor:
    """Float32 ``[..., L-1]`` between neighbours of ascending float32 ``tables`` ``[..., L]``: a float32 value above
    boundary j is nearer to table[j+1] than to table[j], and any other is not."""
    middle = (tables[..., 1:].double() + tables[..., :-1].double()) / 2
    rounded = middle.float()
    # Rounded down: no float32 lies between the two, so comparing with either is the same.
    return torch.where(rounded.double() > middle, rounded.nextafter(torch.full_like(rounded, -torch.inf)), rounded)


def _sorted(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    values = values.contiguous()
    if weights is not None:
        x, order = values.sort(dim=1)
        return x, weights.gather(1, order)
    if values.device.type == "cpu":  # numpy sorts about ten times as fast
        return torch.from_numpy(np.sort(values.numpy(), axis=1)), None
    return values.sort(dim=1).values, None


@dataclass
class _Points:
    """Rows of sorted values x [R, n], those that do not exist last (as inf), and sums over their first i [R, n + 1].

    The sums are float64 and of x - ``center``, so that a narrow row far from 0 loses no digits.
    """

    x: Tensor
    count: Tensor  # values that exist [R, 1]
    center: Tensor  # [R, 1]
    mass: Tensor  # sum h
    first: Tensor  # sum h (x - center)
    second: Tensor  # sum h (x - center)**2

    @staticmethod
    def of(values: Tensor, weights: Tensor | None) -> _Points:
        x, h = _sorted(values, weights)
        exists = torch.isfinite(x)
        count = exists.sum(1, keepdim=True)
        center = x.gather(1, count // 2).double().nan_to_num(posinf=0)
        sums = x.new_zeros(3, x.shape[0], x.shape[1] + 1, dtype=torch.float64)
        mass, first, second = sums[:, :, 1:]  # in place: of a whole tensor they are large
        mass.copy_(exists if h is None else h.mul(exists))
        torch.sub(x, center, out=first).masked_fill_(exists.logical_not_(), 0)
        torch.mul(first, first, out=second).mul_(mass)
        first.mul_(mass)
        for part in (mass, first, second):
            part.cumsum_(1)
        return _Points(x, count, center, *sums)

    def edges(self, centroids: Tensor) -> Tensor:
        """[R, L + 1]: cluster j, the values nearest to centroid j, is x[edges[j]:edges[j + 1]]."""
        ends = torch.searchsorted(self.x, boundaries(centroids), right=True)
        return torch.cat([torch.zeros_like(self.count), ends.minimum(self.count), self.count], 1)

    def means(self, edges: Tensor, otherwise: Tensor | None) -> Tensor:
        """Every cluster's mean in float32; an empty one has ``otherwise``, or the mean before it."""
        mass = self.mass.gather(1, edges).diff(dim=1)
        mean = self.first.gather(1, edges).diff(dim=1) / mass + self.center
        last = self.mass.shape[1] - 2
        # Within its values: exact where they are all equal, and ascending whatever the rounding.
        low, high = (self.x.gather(1, at.clamp(0, last)).double() for at in (edges[:, :-1], edges[:, 1:] - 1))
        mean = mean.clamp(low, high).float()
        if otherwise is None:
            otherwise = mean.masked_fill(mass <= 0, -torch.inf).cummax(1).values
        return torch.where(mass > 0, mean, otherwise)

    def plus_plus(self, uniform: Tensor) -> Tensor:
        """The centroids [R, L], ascending, with which k-means++ starts; ``uniform`` [R, L] are numbers in [0, 1)."""
        drawn = torch.searchsorted(self.mass, uniform[:, :1] * self.mass[:, -1:], right=True) - 1
        centroids = self.x.gather(1, drawn.clamp_(max=self.x.shape[1] - 1))
        edges = self.edges(centroids)
        for u in uniform[:, 1:].split(1, dim=1):
            sums = self.errors(edges, centroids).cumsum(1)
            target = u * sums[:, -1:]
            cluster = torch.searchsorted(sums, target, right=True).clamp_(max=centroids.shape[1] - 1)
            inside = target - torch.nn.functional.pad(sums, (1, 0)).gather(1, cluster)
            drawn = self.draw(edges, centroids, cluster, inside)
            centroids, edges = self.insert(self.x.gather(1, drawn), centroids, edges)
        return centroids

    def errors(self, edges: Tensor, centroids: Tensor) -> Tensor:
        """[R, L]: sum h (x - centroid)**2 of every cluster."""
        c = centroids.double() - self.center
        mass, first, second = (s.gather(1, edges).diff(dim=1) for s in (self.mass, self.first, self.second))
        return (second - c * (2 * first - c * mass)).clamp_(min=0)

    def draw(self, edges: Tensor, centroids: Tensor, cluster: Tensor, target: Tensor) -> Tensor:
        """The first value of a cluster [R, 1] at which its summed error exceeds ``target``, by bisection."""
        start, end = edges.gather(1, cluster), edges.gather(1, cluster + 1)
        c = centroids.gather(1, cluster).double() - self.center
        mass, first, second = (s.gather(1, start) for s in (self.mass, self.first, self.second))
        high = (end - 1).clamp_(min=0)
        low = start.minimum(high)
        for _ in range(self.x.shape[1].bit_length()):
            at = (low + high) // 2
            m, f, s = (sums.gather(1, at + 1) for sums in (self.mass, self.first, self.second))
            exceeds = s - second - c * (2 * (f - first) - c * (m - mass)) > target
            low, high = torch.where(exceeds, low, at + 1).minimum(high), torch.where(exceeds, at, high)
        return low

    def insert(self, new: Tensor, centroids: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """(centroids, edges) with one more centroid [R, 1]: two edges replace the one between its neighbours."""
        rank = torch.searchsorted(centroids, new)
        centroids = torch.cat([centroids, new], 1).sort(1).values
        around = torch.nn.functional.pad(centroids, (1, 0), value=-torch.inf)
        around = torch.nn.functional.pad(around, (0, 1), value=torch.inf)
        around = around.gather(1, rank + torch.arange(3, device=rank.device))
        ends = torch.searchsorted(self.x, boundaries(around), right=True).minimum(self.count)
        edges = edges.scatter(1, rank, ends[:, :1])
        return centroids, torch.cat([edges, ends[:, 1:]], 1).sort(1).values

    def with_few_values(self, centroids: Tensor) -> Tensor:
        """``centroids``, but a row of no more distinct values than these has exactly its values."""
        clusters = centroids.shape[1]
        fresh = torch.isfinite(self.x)
        fresh[:, 1:] &= self.x[:, 1:] != self.x[:, :-1]
        few = fresh.sum(1) <= clusters
        if bool(few.any()):
            x, fresh = self.x[few], fresh[few]
            rank = (fresh.cumsum(1) - 1).clamp_(0, clusters - 1)
            exact = torch.full((len(x), clusters), -torch.inf, dtype=x.dtype, device=x.device)
            exact.scatter_reduce_(1, rank, x.masked_fill(~torch.isfinite(x), -torch.inf), "amax")
            centroids = centroids.clone()
            centroids[few] = exact.cummax(1).values
        # Only a row without any value has centroids that are not finite.
        return centroids.masked_fill(~torch.isfinite(centroids), 0)


def _optimal_edges(points: _Points, clusters: int) -> Tensor:
    """The edges [R, clusters + 1] of least error, for rows of any number of values; empty clusters are allowed."""
    mass, first, second = (s.cpu().numpy().ravel() for s in (points.mass, points.first, points.second))
    rows, ends = points.mass.shape
    offset = np.arange(rows)[:, None] * ends

    def error(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        m, f = mass[end] - mass[start], first[end] - first[start]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(m > 0, np.maximum(second[end] - second[start] - f * f / m, 0), 0)

    cost = error(np.repeat(offset, ends, 1), offset + np.arange(ends))  # F_1(i)
    choices = []
    for _ in range(clusters - 1):
        choice, least = np.zeros((rows, ends), np.int64), np.zeros((rows, ends))
        # Odd multiples of a step lie between two multiples of the double step, and so does their best l.
        step = 1 << (ends - 1).bit_length()
        while step := step // 2:
            i = np.arange(step, ends, 2 * step)
            low = choice[:, i - step]
            high = np.broadcast_to(i, low.shape).copy()
            inner = i + step < ends
            high[:, inner] = np.minimum(high[:, inner], choice[:, i[inner] + step])
            choice[:, i], least[:, i] = _best(cost.ravel(), error, offset, low, high, i)
        choices.append(choice)
        cost = least
    edges = [np.full(rows, ends - 1)]
    for choice in reversed(choices):
        edges.append(choice[np.arange(rows), edges[-1]])
    found = torch.from_numpy(np.stack([np.zeros(rows, np.int64), *reversed(edges)], 1))
    return found.minimum(points.count.cpu())


def _best(
    cost: np.ndarray,
    error: Callable[[np.ndarray, np.ndarray], np.ndarray],
    offset: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    i: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(the first l in low..high of least cost[l] + error(l, i), that cost), [rows, len(i)]."""
    counts = (high - low + 1).ravel()
    starts = counts.cumsum() - counts
    start = np.arange(counts.sum()) + np.repeat((low + offset).ravel() - starts, counts)
    total = cost[start] + error(start, np.repeat((offset + i).ravel(), counts))
    least = np.minimum.reduceat(total, starts)
    hits = np.flatnonzero(total == np.repeat(least, counts))
    hits = hits[np.searchsorted(hits, starts)]
    return start[hits].reshape(low.shape) - offset, least.reshape(low.shape)
