"""Hybrid context parallelism: each sample has its own degree, chosen by its length.

A batch whose samples have very different lengths is cut over all ranks of dp x cp at once. A short
sample stays on one rank. A long sample is spread over as many ranks as its tokens and the balance of
work need, and no more. No groups are made: a micro-batch is one pack with one ``SequenceLayout``,
short samples need no communication, and every rank runs every micro-batch.

A sample spread over K ranks is cut zigzag: each part is a run from the front of the sample and a run
from its back, so that all parts have the same number of tokens and the same causal work.

(One degree for each sample comes from Megatron-LM's hybrid context parallelism and ByteScale, 2025.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from longspan.context_parallel.layout import SequenceLayout

#: (sample, start, stop): a run of one sample's tokens.
Piece = tuple[int, int, int]
MicroBatch = list[list[Piece]]

#: Balance is reached when the busiest rank's work, divided by the mean, is at most this number.
TOLERANCE = 1.05
#: The largest work of a sample's part, divided by a rank's mean work; tried in order until there is balance.
PART_SIZES = (1.0, 0.5, 0.25, 0.12, 0.06, 0.04)
#: The share of the ranks' room for tokens that micro-batches use if full micro-batches cannot be balanced.
FILL = 0.95
#: The most tokens that a rank may hold at first, divided by the mean. All ranks are padded to the fullest.
SPARE = 1.05


def schedule(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[MicroBatch]:
    """Which tokens of which sample each rank computes, micro-batch by micro-batch.

    Args:
        lengths: tokens of each sample.
        ranks: number of ranks of dp x cp; any number.
        max_tokens: the most tokens that a rank holds in a micro-batch.

    Returns:
        Micro-batches. Each has, for each rank, a list of pieces (sample, start, stop); together these hold
        every token exactly once.

    Raises:
        ValueError: a sample is longer than all ranks together can hold, or a number is too small.

    Bounds. Every rank holds at most ``max_tokens``. Let *mean* be a rank's mean causal work in a
    micro-batch. Parts are placed in the order of their work, the largest first, each on the least loaded
    rank with room. So if room is never the limit, the busiest rank has at most the work of the mean and one
    part (Graham 1969). The smallest parts that are tried have at most 0.04 of the mean, or are 1/ranks of
    their sample, so the busiest rank is within 1.05 of the mean. If no such placement is found, every sample
    is cut over all ranks, with numbers of tokens that differ by at most one. Each sample then adds at most
    about its length, which is the work of its last row, to the difference of two ranks. To reduce this
    difference, late rows of the busiest rank are swapped for early rows of the rank with the least work.
    """
    if ranks < 1 or max_tokens < 1:
        raise ValueError(f"ranks={ranks}, max_tokens={max_tokens}: both are at least 1.")
    for sample, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"sample {sample} has a length of {length}: not below 0.")
        if length > ranks * max_tokens:
            raise ValueError(
                f"sample {sample} has {length} tokens: more than {ranks} ranks x {max_tokens} tokens = {ranks * max_tokens}. "
                "Cut it (sequence_len), raise max_seqlen_per_dp_cp_rank, or use more ranks."
            )
    room = ranks * max_tokens
    for usable in (room, int(FILL * room)):
        plans = []
        for samples in _deal(lengths, usable, room):
            plan, balanced = _plan(lengths, samples, ranks, max_tokens)
            plans.append(plan)
            if not balanced and usable == room:
                # Ranks without a free row leave no choice, so the next round makes more micro-batches.
                break
        else:
            return plans
    raise AssertionError("the second round takes what it gets")


def layout_of(
    lengths: Sequence[int], micro_batch: MicroBatch, multiple_of: int = 1
) -> tuple[list[int], SequenceLayout]:
    """The micro-batch as one pack: its samples in order, and the layout of their tokens over the ranks.

    Args:
        multiple_of: every rank's rows are padded to a multiple of this number.

    Returns:
        The samples' numbers in rising order, and the layout, whose documents are these samples.
    """
    samples = sorted({sample for pieces in micro_batch for sample, _, _ in pieces})
    start_of, bounds = {}, [0]
    for sample in samples:
        start_of[sample] = bounds[-1]
        bounds.append(bounds[-1] + lengths[sample])
    spans = [
        sorted((start_of[sample] + start, start_of[sample] + stop) for sample, start, stop in pieces)
        for pieces in micro_batch
    ]
    return samples, SequenceLayout.from_spans(spans, bounds, name="hybrid", multiple_of=multiple_of)


def _deal(lengths: Sequence[int], usable: int, room: int) -> list[list[int]]:
    """Micro-batches with even work, each of at most ``usable`` tokens, or of one sample of up to ``room``."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    total = sum(lengths)
    usable = max(1, usable)
    batches: list[list[int]] = [[] for _ in range(-(-total // usable))]
    tokens, work = [0] * len(batches), [0] * len(batches)
    for i in order:
        fitting = [b for b, held in enumerate(tokens) if held + lengths[i] <= (usable if held else room)]
        if not fitting:
            batches.append([])
            tokens.append(0)
            work.append(0)
            fitting = [len(batches) - 1]
        best = min(fitting, key=lambda b: (work[b], b))
        batches[best].append(i)
        tokens[best] += lengths[i]
        work[best] += _work(lengths[i])
    return [sorted(batch) for batch in batches if batch]


def _work(rows: int) -> int:
    """Number of causal pairs of the first ``rows`` rows of a sample."""
    return rows * (rows + 1) // 2


def _plan(lengths: Sequence[int], samples: list[int], ranks: int, max_tokens: int) -> tuple[MicroBatch, bool]:
    """(the balanced placement that spreads samples least, True), or (the best placement found, False)."""
    mean = sum(_work(lengths[i]) for i in samples) / ranks
    tokens = sum(lengths[i] for i in samples)
    best: tuple[float, MicroBatch] | None = None
    for part in PART_SIZES:
        degrees = {
            i: min(
                ranks, max(-(-lengths[i] // max_tokens), math.ceil(_work(lengths[i]) / (part * mean) - 1e-9))
            )
            for i in samples
        }
        largest = max(-(-lengths[i] // degrees[i]) for i in samples)
        even = max(largest, math.ceil(SPARE * tokens / ranks))
        for room in sorted({min(even, max_tokens), max_tokens}):
            placed = _place(lengths, degrees, ranks, room)
            if placed is None:
                continue
            imbalance = _busiest(placed) / mean
            if best is None or imbalance < best[0]:
                best = (imbalance, placed)
            if imbalance <= TOLERANCE:
                return placed, True
    spread = _spread(lengths, samples, ranks)
    closest = spread if best is None or _busiest(spread) / mean < best[0] else best[1]
    return _even_out(closest, mean, max_tokens), False


def _busiest(placed: MicroBatch) -> int:
    return max(sum(_work(stop) - _work(start) for _, start, stop in pieces) for pieces in placed)


def _place(lengths: Sequence[int], degrees: dict[int, int], ranks: int, room: int) -> MicroBatch | None:
    """Places parts, largest work first, on the least loaded rank with room; None if a part finds no room."""
    parts = []
    for i, degree in degrees.items():
        sizes = [(p + 1) * lengths[i] // degree - p * lengths[i] // degree for p in range(degree)]
        for pieces in _zigzag(i, lengths[i], sizes):
            parts.append((sum(_work(b) - _work(a) for _, a, b in pieces), pieces))
    parts.sort(key=lambda part: (-part[0], part[1]))
    placed: MicroBatch = [[] for _ in range(ranks)]
    work, tokens = [0] * ranks, [0] * ranks
    for cost, pieces in parts:
        size = sum(stop - start for _, start, stop in pieces)
        fitting = [r for r in range(ranks) if tokens[r] + size <= room]
        if not fitting:
            return None
        best = min(fitting, key=work.__getitem__)
        placed[best] += pieces
        work[best] += cost
        tokens[best] += size
    return placed


def _even_out(placed: MicroBatch, mean: float, max_tokens: int) -> MicroBatch:
    """Moves late rows of the busiest rank to the rank with the least work; if that is full, swaps rows."""
    placed = [sorted(pieces) for pieces in placed]
    for _ in range(8 * len(placed)):
        work = [sum(_work(stop) - _work(start) for _, start, stop in pieces) for pieces in placed]
        busy, idle = work.index(max(work)), work.index(min(work))
        if work[busy] <= TOLERANCE * mean:
            break
        gap = work[busy] - work[idle]
        late = max(placed[busy], key=lambda piece: piece[2])
        room = max_tokens - sum(stop - start for _, start, stop in placed[idle])
        early = min(placed[idle], key=lambda piece: piece[1]) if placed[idle] else None
        if room and late[2] < gap:
            rows = min(room, late[2] - late[1], max(1, gap // 2 // late[2]))
            _give(placed, busy, idle, late, late[2] - rows, late[2])
        elif early and 0 < late[2] - 1 - early[1] < gap:
            most = min(late[2] - late[1], early[2] - early[1])
            rows = min(most, max(1, gap // 2 // (late[2] - early[1])))
            _give(placed, busy, idle, late, late[2] - rows, late[2])
            _give(placed, idle, busy, early, early[1], early[1] + rows)
        else:
            break
    return [_joined(pieces) for pieces in placed]


def _give(placed: MicroBatch, giver: int, taker: int, piece: Piece, start: int, stop: int) -> None:
    """Moves rows [start, stop) of a piece, at one of its ends, to another rank."""
    sample, first, last = piece
    placed[giver].remove(piece)
    placed[giver] += [(sample, a, b) for a, b in ((first, start), (stop, last)) if a < b]
    placed[taker].append((sample, start, stop))


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The pieces in order, with adjacent pieces joined."""
    joined: list[Piece] = []
    for sample, start, stop in sorted(pieces):
        if joined and joined[-1][0] == sample and joined[-1][2] == start:
            joined[-1] = (sample, joined[-1][1], stop)
        else:
            joined.append((sample, start, stop))
    return joined


def _spread(lengths: Sequence[int], samples: list[int], ranks: int) -> MicroBatch:
    """Cuts every sample over all ranks; they take remainders in turn, so tokens differ by at most one."""
    placed: MicroBatch = [[] for _ in range(ranks)]
    turn = 0
    for i in samples:
        each, over = divmod(lengths[i], ranks)
        sizes = [each + ((p - turn) % ranks < over) for p in range(ranks)]
        for rank, pieces in enumerate(_zigzag(i, lengths[i], sizes)):
            placed[rank] += pieces
        turn += over
    return placed


def _zigzag(sample: int, length: int, sizes: Sequence[int]) -> list[list[Piece]]:
    """Parts of these sizes, each half from the front and half from the back of the sample."""
    parts, front, back = [], 0, length
    for number, size in enumerate(sizes):
        # An odd token goes alternately to the front and to the back.
        head = (size + number % 2) // 2
        if number == len(sizes) - 1:
            pieces = [(sample, front, back)]
        else:
            pieces = [(sample, front, front + head), (sample, back - (size - head), back)]
            front, back = front + head, back - (size - head)
        parts.append([piece for piece in pieces if piece[1] < piece[2]])
    return parts
