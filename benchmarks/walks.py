"""Instructions per logit: the instructions of the loops over a row of logits, weighted by their share of the row.

A **walker** is a loop, or straight code, that moves logits: from global memory (LDG), into shared memory (LDGSTS),
from shared memory that such copies filled (LDS), or to global memory (STG). The sizes of its loads and stores give the
logits per thread and pass: 16 bytes are 8 logits of 16 bits or 4 of 32. A gradient may have another size than its
logits. Accesses of another size under the opposite predicate are an alternative for the same logits. If a pass has
fewer exponentials than its loads need (misaligned rows are read by overlapping vectors), the exponentials give the
number of logits.

Walkers belong to **phases**, each of which covers the whole row: `copy` (LDGSTS only), `maximum` (loads, no
exponentials), `statistics` (loads and exponentials), `gradient` (loads, exponentials, stores), `scaling` (loads and
stores). `zero` (stores only: rows without a gradient) and phases that the table omits are not counted.

**Cost of a pass**: the longest path through it, without single-element blocks where these can be avoided. The longer
side of a branch counts. Blocks that a pass can bypass (a rescaling when the maximum moves) count and are reported as
`rare`. An inner loop is a walker of its own. A loop around walkers (the stages of a copy) costs its path outside them,
times its trip count.

**Shares.** Within a phase, the walker with the largest pass takes as many full passes as the row has, the next one
takes full passes of the rest, and so on. Code with conditional accesses (a masked last tile) takes a partial pass and
pays for a full one. What no vector covers goes to walkers of single elements. The kernel's `Division` says how its
threads divide a row. If two walkers could take the same share and neither can follow the other, they are alternatives
and the more expensive one counts; otherwise both count.

Walkers for misaligned rows are recognized by shifts (SHF.W, PRMT by a register, overlapping loads) or by many single
elements per pass next to walkers that move vectors. Aligned rows do not use them; misaligned rows use nothing else if
there are any. A kernel may have separate walkers for **far** rows, whose logits are so large that the common code
loses digits. If its `Phase` says so, walkers with one more multiplication per logit than the others, and those with
comparisons but no exponentials, are left out. Code outside all walkers (begin and end of a row, and loops around
walkers that run once per row) is reported as `rest` and has no budget.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sass import Code, Instruction, Loop, SassError, Way, is_uniform, loads_in_flight, shifts

GLOBAL_LOADS, COPIES, SHARED_LOADS, STORES = "LDG", "LDGSTS", "LDS", "STG"


@dataclass(frozen=True)
class Division:
    """How a kernel divides a row of V logits.

    `lanes`: threads per row. With `tiles`, a pass of `unit` threads takes consecutive logits, and the row is divided
    into passes. Otherwise 16-byte vectors are assigned to the lanes cyclically. `pieces`: trip count of a loop around
    the walkers (None: no such loop); the assignment restarts in each iteration.
    """

    lanes: int
    tiles: bool = False
    unit: int = 32
    pieces: int | None = None
    # The last tile, if no loop with conditional accesses takes it. "padded": processed as a full tile. "guarded": of
    # two loops with equal passes, the more expensive one takes the last tile and nothing else.
    last: str = ""
    # The code outside all loops is one walker: a thread processes what it loads there and exits.
    straight: bool = False


@dataclass(frozen=True)
class Phase:
    ex2: int  # exponentials per logit
    division: Division
    far: bool = False  # the kernel has walkers for far rows


def logits_moved(instructions: list[Instruction], kind: str, size: int, least: int) -> int:
    """Logits of `size` bytes that a pass moves with instructions `kind` of at least `least` bytes."""
    of: dict[str, Counter] = {}
    for i in instructions:
        if i.name == kind and i.bytes >= least:
            of.setdefault(i.predicate, Counter())[i.bytes] += i.bytes // size
    total = 0
    for register in {predicate.lstrip("!") for predicate in of}:
        on, off = of.get(register, Counter()), of.get("!" + register, Counter())
        one_way = {*on} == {*off} or not on or not off
        of_both = (on.total(), off.total())
        total += sum(of_both) if one_way else max(of_both)
    return total


def rank_of(code: Code, loop: Loop, moved: Callable) -> Callable:
    """`rank` for Code.path: prefer the path that moves most logits; shun single elements where vectors exist."""
    wide = {b: sum(moved(code.blocks[b], 2).values()) for b in loop.own}
    vectors = any(wide.values())

    def rank(block):
        single = sum(moved(code.blocks[block]).values()) - wide[block]
        return vectors and single > 1 and not wide[block], wide[block] or single

    return rank


@dataclass
class Walker:
    loop: Loop
    way: Way
    size: int
    phase: str
    take: int  # logits per thread and pass
    rare: int
    partial: bool  # may process fewer than `take`
    narrow: bool  # single elements from or to global memory
    misaligned: bool
    singles: bool  # only single elements, many per pass
    address: int

    @property
    def ex2(self) -> int:
        return exponentials(self.way)

    @property
    def mufu(self) -> int:
        return sum(i.name == "MUFU" for i in self.way.instructions) - self.ex2

    @property
    def in_flight(self) -> int:
        return loads_in_flight(self.way.instructions)

    @property
    def products(self) -> float:
        """Multiplications per logit, without fused multiply-adds."""
        return sum(i.name in ("FMUL", "DMUL") for i in self.way.instructions) / self.take

    @property
    def uniform(self) -> int:
        return sum(is_uniform(i) for i in self.way.instructions)


def exponentials(way: Way) -> int:
    return sum(i.opcode.startswith("MUFU.EX2") for i in way.instructions)


def walker(
    code: Code, loop: Loop, size: int, phases: dict[str, Phase], on_chip: bool, stored: int
) -> Walker | None:
    """The loop as a walker of logits of `size` bytes (`stored` bytes in the gradient); None if it moves none."""
    sizes = dict.fromkeys((GLOBAL_LOADS, COPIES, SHARED_LOADS), size) | {STORES: stored}
    kinds = {GLOBAL_LOADS: size, COPIES: 4, STORES: stored} | (
        {SHARED_LOADS: size} if on_chip else {}
    )

    def moved(instructions, least=0):
        """Logits by kind of instruction, in accesses of at least `least` logits."""
        return {
            k: logits_moved(instructions, k, sizes[k], max(kinds[k], least * sizes[k]))
            for k in kinds
        }

    rank = rank_of(code, loop, moved)
    way, straight = code.longest(loop, rank), code.path(loop, rank)
    of = moved(way.instructions)
    if not any(of.values()):
        return None
    from_vectors = logits_moved(way.instructions, SHARED_LOADS, size, 16) if on_chip else 0
    if from_vectors:  # other reads of shared memory are partial sums of a block
        of[SHARED_LOADS] = from_vectors
    wide = moved(way.instructions, 2)
    loads = max(of.get(k, 0) for k in (GLOBAL_LOADS, COPIES, SHARED_LOADS))
    take = min(loads, of[STORES]) if loads and of[STORES] else loads or of[STORES]
    found, overlapping = exponentials(way), False
    if of[STORES]:
        phase = "zero" if not loads else "gradient" if found else "scaling"
    elif of[COPIES] and not found and not from_vectors:
        phase, take = "copy", of[COPIES]
    else:
        phase = "statistics" if found else "maximum"
        # Partial sums of a block are also in shared memory, but are not read by vectors.
        if not found and not of[GLOBAL_LOADS] and not from_vectors:
            return None
    ex2 = phases[phase].ex2 if phase in phases else 0
    if found < ex2 * take:
        # Overlapping vectors, or shared memory without logits (partial sums of a block).
        if of.get(SHARED_LOADS) and (found < ex2 * 16 // size or not any(wide.values())):
            return None
        granule = 16 // size if any(wide.values()) else 1
        less = found // ex2 // granule * granule
        if less == 0:
            raise SassError(
                f"loop at {code.blocks[loop.header][0].address:#x} ({phase}) moves {take} logits per"
                f" pass with {found} exponentials; a logit needs {ex2}"
            )
        overlapping, take = True, less
    sure, least = set(code.sure(loop)), dict(kinds)
    if from_vectors:
        least[SHARED_LOADS] = 16
    if phase != "copy":  # copies next to reads of shared memory prefetch a later pass
        del least[COPIES]
    access = [
        (b, i)
        for b in loop.own
        for i in code.blocks[b]
        if i.name in least and i.bytes >= least[i.name]
    ]
    vectors = any(wide.values())
    # Logits in shared memory are always read by vectors.
    from_global = any(v for k, v in wide.items() if k != SHARED_LOADS)
    stores_singles = of[STORES] > 0 and not wide[STORES]
    return Walker(
        loop=loop,
        way=way,
        size=size,
        phase=phase,
        take=take,
        rare=way.count - straight.count,
        partial=any(b not in sure or i.predicate for b, i in access),
        narrow=stores_singles or not (from_global or of.get(SHARED_LOADS)),
        misaligned=overlapping or 4 * shifts(way.instructions) >= take,
        singles=not vectors and take * size >= 32,
        address=code.blocks[loop.header][0].address,
    )


@dataclass
class Figure:
    """Per logit of one row: issued instructions, of which exponentials and other MUFU."""

    instructions: float = 0.0
    ex2: float = 0.0
    mufu: float = 0.0
    rare: float = 0.0  # instructions in blocks that a pass can bypass
    uniform: float = 0.0  # instructions of the uniform datapath
    parts: list[tuple[str, float, Walker]] = field(default_factory=list)  # phase, logits, walker
    unused: list[Walker] = field(
        default_factory=list
    )  # walkers of the phases that this row does not use

    @property
    def in_flight(self) -> int:
        """16-byte loads in flight in the walker that reads most of the row from global memory."""
        shares = [(logits, w.in_flight) for _, logits, w in self.parts if w.in_flight]
        return max(shares, default=(0, 0))[1]

    def add(self, w: Walker, phase: str, passes: float, logits: float, width: int) -> None:
        """`passes`: total over the threads of the row."""
        for name, count in (
            ("instructions", w.way.count),
            ("ex2", w.ex2),
            ("mufu", w.mufu),
            ("rare", w.rare),
            ("uniform", w.uniform),
        ):
            setattr(self, name, getattr(self, name) + count * passes / width)
        if passes:
            self.parts.append((phase, logits, w))


def walkers(code: Code, size: int, phases: dict[str, Phase], stored: int) -> list[Walker]:
    on_chip = any(i.name == COPIES for i in code.instructions)
    if any(of.division.straight for of in phases.values()):
        moves = lambda b: (False, sum(i.name in (GLOBAL_LOADS, STORES) for i in code.blocks[b]))  # noqa: E731
        straight = [code.once(moves)]
    else:
        straight = straight_vectors(code, size)
    found = [walker(code, loop, size, phases, on_chip, stored) for loop in code.loops]
    conditional = [walker(code, loop, size, phases, on_chip, stored) for loop in straight]
    return [w for w in found if w] + [replace(w, partial=True) for w in conditional if w]


def straight_vectors(code: Code, size: int) -> list[Loop]:
    """Code outside all loops that loads at least a vector of logits (e.g. a last tile), as loops with one pass.

    A pass is the block with the loads and all blocks that it dominates, up to the next block that every run executes.
    """
    sure = code.sure(code.once(lambda b: (False, 0)))
    inside = set().union(*(loop.body for loop in code.loops), set())
    found: list[Loop] = []
    for head in code.order:
        if head in inside or any(head in loop.body for loop in found):
            continue
        loads = [i for i in code.blocks[head] if i.name in (GLOBAL_LOADS, COPIES)]
        if all(i.bytes < 16 for i in loads) and sum(i.bytes == size for i in loads) < 16 // size:
            continue
        behind = {b for a, b in zip(sure, sure[1:], strict=False) if a == head}
        body = {
            b for b in code.order if head in code.dominators[b] and not behind & code.dominators[b]
        }
        leaves = {b for b in body if not code.next[b] or not set(code.next[b]) <= body}
        inner = [loop for loop in code.loops if loop.outer is None and loop.body <= body]
        found.append(Loop(head, body, leaves, inner))
    return found


def follows(code: Code, first: Loop, second: Loop) -> bool:
    """True if control can reach `second` from `first` without leaving an outer loop of both."""
    around = first.outer.body if first.outer is not None and second.outer is first.outer else None
    seen, work = set(), [t for b in first.body for t in code.next[b] if t not in first.body]
    while work:
        b = work.pop()
        if b in second.body:
            return True
        if b not in seen and (around is None or (b in around and b != first.outer.header)):
            seen.add(b)
            work += code.next[b]
    return False


def chosen(code: Code, group: list[Walker]) -> list[Walker]:
    """Of walkers that could take the same share: all that can follow each other, else the most expensive."""
    in_turn = [
        w
        for w in group
        if any(
            w is not o and (follows(code, w.loop, o.loop) or follows(code, o.loop, w.loop))
            for o in group
        )
    ]
    return in_turn or [max(group, key=lambda w: w.way.count / w.take)]


def candidates(found: list[Walker], phase: str, far: bool, aligned: bool) -> list[Walker]:
    """The walkers of a phase that a row with this alignment uses."""
    of = [w for w in found if w.phase == phase]
    if far and phase in ("maximum", "scaling"):
        return []
    if far:
        near = min((w.products for w in of if w.take * w.size >= 16), default=0)
        of = [w for w in of if w.products < near + 0.9]
    beside_vectors = any(not w.narrow for w in of)
    special = [w for w in of if w.misaligned or (w.singles and beside_vectors)]
    common = [w for w in of if w not in special]
    if not aligned and special:
        return special + [w for w in common if w.narrow]
    return common


def by_take(group: list[Walker]) -> list[list[Walker]]:
    """Groups of walkers that could take the same share: vectors first, then single elements, by descending pass."""
    keys = sorted({(w.narrow, -w.take, w.partial) for w in group})
    return [[w for w in group if (w.narrow, -w.take, w.partial) == key] for key in keys]


def count_row(
    code: Code,
    width: int,
    size: int,
    phases: dict[str, Phase],
    aligned: bool = True,
    stored: int | None = None,
) -> Figure:
    """The figure of one row of `width` logits of `size` bytes over `phases`.

    `stored`: bytes per element of the gradient (default: `size`).
    """
    found = walkers(code, size, phases, stored or size)
    figure = Figure()
    for phase, of in phases.items():
        group = candidates(found, phase, of.far, aligned)
        if not group:
            continue
        share = share_by_tiles if of.division.tiles else share_by_vectors
        share(code, figure, phase, group, width, of.division)
    used = [id(w) for _, _, w in figure.parts]
    figure.unused = [w for w in found if w.phase in phases and id(w) not in used]
    if not any(w.phase in ("statistics", "gradient") for _, _, w in figure.parts):
        raise SassError(f"no walker of {[*phases]}: {[(hex(w.address), w.phase) for w in found]}")
    return figure


def share_by_tiles(code, figure, phase, group, width, division):
    rest = width
    for same in by_take(group):
        of_last = []
        if division.last == "guarded" and len(same) == 2:
            same = sorted(same, key=lambda w: w.way.count)
            same, of_last = same[:1], same[1:]
        for those, takes_all in ((same, division.last == "padded"), (of_last, True)):
            if not those:
                continue
            w = those[0]
            takes_all |= w.partial or (w.narrow and not w.singles)
            granule = 1 if w.narrow or division.last else 16 // w.size
            tile = division.unit * w.take
            logits = rest // granule * granule if takes_all else rest // tile * tile
            for w in chosen(code, those):
                figure.add(w, phase, -(-logits // tile) * division.unit, logits, width)
            rest -= logits
    used = [w for of, _, w in figure.parts if of == phase]
    share_of_loops_around(code, figure, phase, used, width, division)
    # Less than a vector at each end may be left to code outside the loops.
    if rest >= 16 // group[0].size:
        raise SassError(f"{phase}: no loop takes the last {rest} of {width} logits")


def share_by_vectors(code, figure, phase, group, width, division):
    vector = 16 // group[0].size
    lanes = division.lanes
    wide = [w for w in group if not w.narrow]
    outer = [w.loop.outer for w in wide if w.loop.outer is not None]
    around = [w for w in wide if any(w.loop is o for o in outer)]
    pieces = division.pieces or 1
    q, more = divmod(width // vector, lanes * pieces)
    for vectors, count in ((q + 1, more), (q, lanes * pieces - more)):
        rest = vectors * vector
        for same in by_take([w for w in wide if w not in around]):
            passes = rest // same[0].take
            for w in chosen(code, same):
                figure.add(w, phase, passes * count, passes * same[0].take * count, width)
            rest -= passes * same[0].take
        for w in around:  # once per piece, for the rest
            figure.add(w, phase, count, rest * count, width)
            rest -= min(rest, w.take)
        if rest:
            raise SassError(f"{phase}: no loop takes the last {rest} logits of a thread")
    others = [w for w in wide if w not in around]
    share_of_loops_around(code, figure, phase, others, width, division, [w.loop for w in around])


def share_of_loops_around(code, figure, phase, used, width, division, counted=()):
    """Add the own cost of loops around walkers, at every depth, if they run more than once per row."""
    around, work = {}, [w.loop.outer for w in used]
    while work:
        loop = work.pop()
        if loop is not None and id(loop) not in around:
            around[id(loop)] = loop
            work.append(loop.outer)
    if around and division.pieces is None:
        raise SassError(f"{phase}: a loop around the walkers has no trip count (Division.pieces)")
    for loop in around.values():
        # A loop that moves logits is a walker itself, and counted as one.
        is_walker = any(loop is w.loop for w in used) or any(loop is c for c in counted)
        if division.pieces > 1 and not is_walker:
            way = code.path(loop, lambda b: (False, 0))
            figure.instructions += way.count * division.pieces * division.lanes / width


def count_rest(
    code: Code, figure: Figure, phases: dict[str, Phase], threads: int, width: int
) -> float:
    """Instructions per logit outside the walkers, with `threads` threads per row.

    Includes loops around walkers that run once. Excludes loops that move no logits (reductions within a block).
    """

    def plain(block):
        return False, 0

    outer = {
        id(w.loop.outer): w.loop.outer
        for phase, _, w in figure.parts
        if w.loop.outer is not None and phases[phase].division.pieces == 1
    }
    ways = [code.path(code.once(plain), plain), *(code.path(x, plain) for x in outer.values())]
    return sum(way.count for way in ways) * threads / width
