"""The parameter server in plain Python and numpy: no blocks, no slabs, no kernels, one dictionary of dense tables."""

import math

import numpy as np

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
F = np.float32


def mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def checksum(data: bytes) -> int:
    """The 64 bits that guard a piece of a journal: four lanes over words of 8 bytes, what is left over one by one."""
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data) & -8, 8)]
    tail = data[len(words) * 8 :]
    lanes = [1, 2, 3, 4]
    whole = len(words) - len(words) % 4
    for i, word in enumerate(words[:whole]):
        mixed = ((lanes[i % 4] ^ word) * 0x9FB21C651E98DF25) & MASK
        lanes[i % 4] = mixed ^ (mixed >> 29)
    total = 0
    for value in (*lanes, *words[whole:], *tail, len(words) << 3 ^ len(tail)):
        total = mix64(total ^ value)
    return total


def permute(row: int, n: int, key: int) -> int:
    """Four Feistel rounds over the bits of n - 1, walked until the result is below n."""
    bits = (n - 1).bit_length()
    left, right = bits // 2, bits - bits // 2
    words = [mix64((key + i * GOLDEN) & MASK) for i in (1, 2)]
    keys = [part for word in words for part in (word & 0xFFFFFFFF, word >> 32)]

    def scramble(half: int, key: int) -> int:
        z = (half ^ key) * 0x9E3779B1
        z = ((z ^ (z >> 32)) & 0xFFFFFFFF) * 0x85EBCA77
        return z >> 20

    while True:
        high, low = row >> right, row & ((1 << right) - 1)
        for i, key in enumerate(keys):
            if i % 2 == 0:
                high ^= scramble(low, key) & ((1 << left) - 1)
            else:
                low ^= scramble(high, key) & ((1 << right) - 1)
        row = (high << right) | low
        if row < n:
            return row


def place(row: int, n: int, key: int, blocks: int) -> tuple[int, int]:
    """(block, place) of a row."""
    position = permute(row, n, key)
    return (position + key % blocks) % blocks, position // blocks


def initial_row(spec, row: int, seed: int) -> np.ndarray:
    """Initial values of one row of a TableSpec: float32 [width]."""
    stream = mix64(mix64((seed + GOLDEN) & MASK) ^ spec.key)
    counter = mix64((stream + row * GOLDEN) & MASK)

    def unit(i: int) -> float:
        return ((mix64((counter + i * GOLDEN) & MASK) >> 11) + 0.5) * 2.0**-53

    kind, scale = spec.initializer.kind, spec.initializer.scale
    if kind == "uniform":
        values = [(2.0 * unit(j + 1) - 1.0) * scale for j in range(spec.width)]
    elif kind == "normal":
        values = [
            math.sqrt(-2.0 * math.log(unit(2 * j + 1))) * math.cos(2.0 * math.pi * unit(2 * j + 2)) * scale
            for j in range(spec.width)
        ]
    else:
        values = [scale] * spec.width
    return np.array(values, np.float32)


def mean_square(grad: np.ndarray) -> np.float32:
    """Mean of g^2 in eight partial sums, as the shard adds them; what is left over goes first into the first."""
    partial = [F(0)] * 8
    whole = len(grad) - len(grad) % 8
    for g in grad[whole:]:
        partial[0] = F(partial[0] + g * g)
    for j, g in enumerate(grad[:whole]):
        partial[j % 8] = F(partial[j % 8] + g * g)
    a, b, c, d, e, f, g, h = partial
    return F(F(F(a + e) + F(c + g)) + F(F(b + f) + F(d + h))) / F(len(grad))


def update(optimizer, weight: np.ndarray, state: np.ndarray, grad: np.ndarray, rate: float) -> None:
    """One row in place: weight [width], state [state width], grad [width], all float32."""
    rate, eps, width = F(rate), F(optimizer.eps), len(weight)
    if optimizer.kind == "sgd":
        weight -= rate * grad
    elif optimizer.kind == "adagrad":
        state += grad * grad
        weight -= rate * (grad / (np.sqrt(state) + eps))
    elif optimizer.kind == "rowwise_adagrad":
        state[0] += mean_square(grad)
        weight -= rate / (np.sqrt(state[0]) + eps) * grad
    else:
        beta1, beta2 = F(optimizer.beta1), F(optimizer.beta2)
        state[2 * width] += F(1)
        step = float(state[2 * width])
        state[:width] = beta1 * state[:width] + (F(1) - beta1) * grad
        state[width : 2 * width] = beta2 * state[width : 2 * width] + (F(1) - beta2) * (grad * grad)
        factor = F(float(rate) / (1.0 - float(beta1) ** step))
        root = F(math.sqrt(1.0 - float(beta2) ** step))
        weight -= factor * (state[:width] / (np.sqrt(state[width : 2 * width]) / root + eps))


class DenseTables:
    """Tables as plain arrays; a push applies to them once, by its number."""

    def __init__(self, specs, seed: int) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.weight = {s.name: np.stack([initial_row(s, r, seed) for r in range(s.rows)]) for s in specs}
        start = {s.name: s.optimizer.initial_accumulator if "adagrad" in s.optimizer.kind else 0.0 for s in specs}
        self.state = {
            s.name: np.full((s.rows, s.optimizer.state_width(s.width)), start[s.name], np.float32) for s in specs
        }

    def push(self, name: str, rows, grads: np.ndarray, rate: float) -> None:
        for row, grad in zip(rows, grads, strict=True):
            update(self.specs[name].optimizer, self.weight[name][row], self.state[name][row], grad, rate)


class SetLedger:
    """The ledger as a set of what was marked, and the highest number."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen: dict[tuple[int, int], set[int]] = {}

    def check(self, client: int, sequence: int, block: int) -> int:
        seen = self.seen.get((client, block), set())
        if sequence in seen and max(seen) - sequence < self.window:
            return 1
        return 2 if seen and max(seen) - sequence >= self.window else 0

    def mark(self, client: int, sequence: int, block: int) -> None:
        self.seen.setdefault((client, block), set()).add(sequence)
