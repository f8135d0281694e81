"""Labels of positions: which units a position along an axis belongs to, and which units are the same.

A *label array* ``[layers, positions]`` says for each position along an axis to which nodes it belongs. The
position stays only if all these nodes stay. −1 means no node; a position without any node always stays.

A node stands for a unit until more is known. It may turn out to be the same unit as another node
(:meth:`Labels.unify`), or to be a product: position (i, j) of an axis that is split into heads and head size
belongs to the i-th head and to the j-th place of all heads. Label arrays that hold the node then have the new
meaning (:meth:`Labels.resolve`).
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

NONE = -1


class Labels:
    """Nodes, their unions and their products, and which of them cannot be removed, or not exactly."""

    def __init__(self) -> None:
        self.count = 0
        self.parent = np.zeros(1024, np.int64)
        # What a root means instead of itself, if it is a product: two other nodes (or one and NONE)
        self.product = np.full((2, 1024), NONE)
        # Factors that the same split has made: units of one kind
        self.birth = np.full(1024, NONE)
        self.births = 0
        self.frozen: list[tuple[np.ndarray, str]] = []
        self.inexact: list[tuple[np.ndarray, str]] = []

    def fresh(self, size: int, *, born: bool = False) -> np.ndarray:
        """Makes a label array ``[1, size]`` of new nodes."""
        nodes = np.arange(self.count, self.count + size)
        self.count += size
        if self.count > len(self.parent):
            more = max(self.count, 2 * len(self.parent)) - len(self.parent)
            self.parent = np.pad(self.parent, (0, more))
            self.product = np.pad(self.product, ((0, 0), (0, more)), constant_values=NONE)
            self.birth = np.pad(self.birth, (0, more), constant_values=NONE)
        self.parent[nodes] = nodes
        if born:
            self.birth[nodes] = self.births
            self.births += 1
        return nodes[None]

    def find(self, nodes: np.ndarray) -> np.ndarray:
        """Returns the roots of nodes; NONE stays NONE."""
        roots = nodes
        while True:
            above = np.where(roots < 0, NONE, self.parent[roots])
            if np.array_equal(above, roots):
                break
            roots = above
        held = nodes >= 0
        self.parent[nodes[held]] = roots[held]
        return roots

    def resolve(self, labels: np.ndarray) -> np.ndarray:
        """Returns what a label array means now: roots that are no products, each once per position."""
        labels = self.find(labels)
        while labels.size:
            products = (labels >= 0) & (self.product[0][labels] >= 0)
            if not products.any():
                break
            left = np.where(products, self.product[0][labels], labels)
            right = np.where(products, self.product[1][labels], NONE)
            labels = self.find(np.stack([left, right], 1).reshape(-1, labels.shape[1]))
        for i in range(1, len(labels)):
            labels[i, (labels[:i] == labels[i]).any(0)] = NONE
        return labels[(labels >= 0).any(1)]

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """Notes that these nodes must stay."""
        if (labels >= 0).any():
            self.frozen.append((np.unique(labels), reason))

    def mark(self, labels: np.ndarray, reason: str) -> None:
        """Notes that removing these nodes changes the outputs, compared with setting them to zero."""
        if (labels >= 0).any():
            self.inexact.append((np.unique(labels), reason))

    def unify(self, a: np.ndarray, b: np.ndarray, reason: str) -> None:
        """Ties two axes: position p of one axis stays if and only if position p of the other stays."""
        if a is b:
            return
        while True:
            a, b = self.resolve(a), self.resolve(b)
            # Nodes that both have agree already
            common_a = (a[:, None] == b[None]).any(1)
            common_b = (b[:, None] == a[None]).any(1)
            a, b = np.where(common_a, NONE, a), np.where(common_b, NONE, b)
            in_a, in_b = (a >= 0).sum(0), (b >= 0).sum(0)
            self.freeze(a[:, in_b == 0], f"tied to the outside by {reason}")
            self.freeze(b[:, in_a == 0], f"tied to the outside by {reason}")
            open_ = (in_a > 0) & (in_b > 0)
            if not open_.any():
                return
            if not self._step(a[:, open_], b[:, open_], in_a[open_], in_b[open_]):
                self.freeze(a[:, open_], f"split in different ways by {reason}")
                self.freeze(b[:, open_], f"split in different ways by {reason}")
                return

    def _step(self, a: np.ndarray, b: np.ndarray, in_a: np.ndarray, in_b: np.ndarray) -> bool:
        """Makes some of the open positions agree, and says whether it could."""
        single = (in_a == 1) & (in_b == 1)
        if single.any():
            self._union(a[:, single].max(0), b[:, single].max(0))
            return True
        for one, many, n in ((a, b, in_a), (b, a, in_b)):
            for layers in (2, 3, 4):
                place = (n == 1) & ((many >= 0).sum(0) == layers)
                if place.any():
                    self._expand(one[:, place].max(0), _compact(many[:, place]))
                    return True
        kinds = np.unique(np.concatenate([a >= 0, b >= 0]), axis=1)
        here = (np.concatenate([a >= 0, b >= 0]) == kinds[:, :1]).all(0)
        return self._match(_compact(a[:, here]), _compact(b[:, here]))

    def _match(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Pairs layers, or a layer with several layers, that distinguish the positions in the same way."""
        for one, many in ((a, b), (b, a)):
            for layer in one:
                for size in range(1, len(many) + 1):
                    for chosen in combinations(range(len(many)), size):
                        if _same_pattern(layer, many[list(chosen)]):
                            if size == 1:
                                self._union(layer, many[chosen[0]])
                            else:
                                self._expand(layer, many[list(chosen)])
                            return True
        return False

    def _union(self, a: np.ndarray, b: np.ndarray) -> None:
        while True:
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            # Of two writes to one root the last holds; the next round sees to the other
            self.parent[np.maximum(a, b)] = np.minimum(a, b)

    def _expand(self, nodes: np.ndarray, factors: np.ndarray) -> None:
        """Makes node ``nodes[p]`` mean ``factors[:, p]``, the first one if the node occurs twice."""
        nodes, first = np.unique(nodes, return_index=True)
        factors = factors[:, first]
        # Nothing may be a part of itself: what stands on both sides waits for the next round
        ready = ~np.isin(nodes, factors)
        ready[0] |= not ready.any()
        nodes, factors = nodes[ready], factors[:, ready]
        while len(factors) > 2:  # Products have two factors: nest them
            pair = self.fresh(len(nodes))[0]
            self.product[:, pair] = factors[-2:]
            factors = np.concatenate([factors[:-2], pair[None]])
        self.product[:, nodes] = factors

    def split(self, labels: np.ndarray, sizes: Sequence[int], reason: str) -> list[np.ndarray]:
        """Returns the labels of the axes into which an axis of ``prod(sizes)`` positions is split, row-major."""
        parts: list[list[np.ndarray]] = [[] for _ in sizes]
        for layer in self.resolve(labels):
            grid = layer.reshape(sizes)
            varies = [d for d in range(len(sizes)) if (grid != grid.take([0], d)).any()]
            if len(varies) > 1:
                factors = [self.fresh(sizes[d], born=True) for d in varies]
                for d, factor in zip(varies, factors, strict=True):
                    parts[d].append(factor[0])
                full: list[np.ndarray] = [np.zeros((0, n), np.int64) for n in sizes]
                for d, factor in zip(varies, factors, strict=True):
                    full[d] = factor
                self.unify(layer[None], merge(full), reason)
            else:
                d = varies[0] if varies else int(np.argmax(np.array(sizes) > 1))
                parts[d].append(grid[tuple(slice(None) if i == d else 0 for i in range(grid.ndim))])
        return [
            np.stack(part) if part else np.zeros((0, n), np.int64)
            for part, n in zip(parts, sizes, strict=True)
        ]


def merge(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the labels of the axis into which several axes are merged, row-major."""
    sizes = [part.shape[1] for part in parts]
    layers = []
    for d, part in enumerate(parts):
        shape = [len(part)] + [n if i == d else 1 for i, n in enumerate(sizes)]
        layers.append(np.broadcast_to(part.reshape(shape), (len(part), *sizes)))
    return np.concatenate(layers).reshape(-1, int(np.prod(sizes)))


def append(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the labels of an axis in which several axes stand one after another."""
    depth = max(len(part) for part in parts)
    padded = [np.pad(part, ((0, depth - len(part)), (0, 0)), constant_values=NONE) for part in parts]
    return np.concatenate(padded, 1)


def _compact(labels: np.ndarray) -> np.ndarray:
    """Moves the nodes of each position to the first layers. All positions have equally many nodes."""
    order = np.argsort(labels < 0, axis=0, kind="stable")
    return np.take_along_axis(labels, order, 0)[: int((labels[:, 0] >= 0).sum())]


def _same_pattern(layer: np.ndarray, layers: np.ndarray) -> bool:
    def pattern(rows: np.ndarray) -> np.ndarray:
        return np.unique(rows, axis=1, return_inverse=True)[1].ravel()

    one, many = pattern(layer[None]), pattern(layers)
    pairs = len(np.unique(np.stack([one, many]), axis=1)[0])
    return pairs == one.max() + 1 == many.max() + 1
