"""Parse SASS, the machine code of NVIDIA GPUs: control flow, loops, instructions on a path.

`Code` splits a function into basic blocks and finds its natural loops in the control-flow graph. A block that the
assembler placed after the function therefore belongs to the loop that it branches back to, and a block in the middle
that never branches back does not. Blocks that only a `BRA.DIV` reaches (a diverged warp) are ignored.

Counts are instructions that a warp issues. Predicated-off instructions and those of the uniform datapath count, since
they take issue slots; NOPs do not. A call counts its callee.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
NO_SUCCESSOR = {"EXIT", "RET", "KILL", "BPT"}
UNREADABLE = {
    "BRX": "an indirect branch",
    "JMX": "an indirect branch",
    "BRXU": "an indirect branch",
    "UBLKCP": "a bulk copy, whose size is not in the instruction",
    "UTMALDG": "a tensor copy, whose size is not in the instruction",
}


SHORT = 4  # a block can be skipped if the path around it has at most this many instructions


class SassError(ValueError):
    """The code contains something that cannot be counted."""


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "", "P0", "!P0", "UP0"
    opcode: str  # with its modifiers: "LDG.E.EF.128"
    operands: str

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def target(self) -> int | None:
        found = re.findall(r"\b0x([0-9a-f]+)$", self.operands)
        return int(found[0], 16) if found else None

    @property
    def conditional(self) -> bool:
        """True if control may fall through to the next instruction."""
        on = self.predicate not in ("", "PT", "UPT")
        if self.name == "BRA":
            return on or "," in self.operands or bool({"DIV", "CONV"} & set(self.modifiers))
        return on

    @property
    def bytes(self) -> int:
        """Bytes per thread of a load, store or LDGSTS copy."""
        for word, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if word in self.modifiers:
                return size
        return 4


def parse(text: str) -> list[Instruction]:
    """The instructions of one function in the output of cuobjdump --dump-sass."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match:
            address, predicate, opcode, operands = match.groups()
            found.append(Instruction(int(address, 16), predicate or "", opcode, operands))
    return found


def is_uniform(i: Instruction) -> bool:
    """True for the uniform datapath."""
    return i.name[0] == "U" or i.name in ("R2UR", "VOTEU", "S2UR")


def shifts(instructions: list[Instruction]) -> int:
    """Number of shifts and permutations by a register."""
    count = 0
    for i in instructions:
        words = [w.strip() for w in i.operands.split(",")]
        by_register = len(words) > 2 and re.match(r"U?R\d", words[2]) is not None
        count += by_register and (i.name == "PRMT" or (i.name == "SHF" and "W" in i.modifiers))
    return count


def loads_in_flight(instructions: list[Instruction]) -> int:
    """16-byte global loads that a pass issues before it uses the result of one; all LDGSTS copies count."""
    most = 0
    starts = [n for n, i in enumerate(instructions) if i.name == "LDG" and i.bytes == 16]
    for start in starts:
        count, awaited = 0, set()
        for i in instructions[start:] + instructions[:start]:
            registers = [int(r) for r in re.findall(r"\bR(\d+)", i.operands)]
            is_load = i.name == "LDG" and i.bytes == 16
            if awaited & set(registers[1:] if is_load else registers):
                break
            if is_load:
                count += 1
                awaited |= set(range(registers[0], registers[0] + 4))
        most = max(most, count)
    return most or sum(i.name == "LDGSTS" and i.bytes == 16 for i in instructions)


@dataclass(frozen=True)
class Way:
    """The instructions that one pass through a loop, or one run of a function, issues."""

    instructions: list[Instruction]
    count: int  # of instructions, callees included
    end: int  # last block


@dataclass
class Loop:
    """A natural loop. `own`: its blocks without those of inner loops."""

    header: int
    body: set[int]
    latches: set[int]
    inner: list["Loop"] = field(default_factory=list)
    outer: "Loop | None" = None

    @property
    def own(self) -> set[int]:
        return self.body - set().union(*(loop.body for loop in self.inner), set())


class Code:
    """Control-flow graph of a function."""

    def __init__(self, instructions: list[Instruction]):
        if not instructions:
            raise SassError("no instructions")
        for i in instructions:
            if i.name in UNREADABLE:
                raise SassError(f"{i.address:#x} {i.opcode}: {UNREADABLE[i.name]}")
        self.instructions = instructions
        self.index = {i.address: n for n, i in enumerate(instructions)}
        self.successors_of = self._instruction_graph()
        self._cut()
        self._dominate()

    # ---- graph

    def _flow(self, n: int, barriers: dict[str, frozenset[int]]) -> list[int]:
        """Indices of possible successors of instruction n. `barriers`: targets of each convergence barrier."""
        i = self.instructions[n]
        following = [n + 1] if n + 1 < len(self.instructions) else []
        if i.name in NO_SUCCESSOR:
            return following if i.conditional else []
        if i.name == "BRA":
            if "DIV" in i.modifiers:
                return following
            target = [self.index[i.target]]
            return target + following if i.conditional else target
        if i.name == "BSYNC":
            register = i.operands.split()[-1]
            to = [self.index[t] for t in sorted(barriers.get(register, ()))] or following
            return to + following if i.conditional else to
        return following

    def _instruction_graph(self) -> list[list[int]]:
        """Successors of each reachable instruction. A BSYNC goes to the targets of the BSSYs that reach it."""
        graph: list[list[int]] = [[] for _ in self.instructions]
        state: list[dict | None] = [None] * len(graph)
        state[0] = {}
        work = [0]
        while work:
            n = work.pop()
            i, known = self.instructions[n], state[n]
            out = dict(known)
            if i.name == "BSSY":
                out[i.operands.split(",")[0].strip()] = frozenset([i.target])
            graph[n] = self._flow(n, known)
            for m in graph[n]:
                merged = out
                if state[m] is not None:
                    merged = {
                        k: state[m].get(k, frozenset()) | out.get(k, frozenset())
                        for k in state[m].keys() | out.keys()
                    }
                if merged != state[m]:
                    state[m] = dict(merged)
                    work.append(m)
        self.reached = [s is not None for s in state]
        return graph

    def _cut(self) -> None:
        """Find the reachable basic blocks, keyed by the index of their first instruction."""
        graph, reached = self.successors_of, self.reached
        entries = Counter(m for n, to in enumerate(graph) if reached[n] for m in to)
        leaders = {0}
        for n, to in enumerate(graph):
            if not reached[n]:
                continue
            if len(to) != 1 or to[0] != n + 1:
                leaders.update(to)
            leaders.update(m for m in to if entries[m] > 1)
        self.blocks: dict[int, list[Instruction]] = {}
        self.next: dict[int, list[int]] = {}
        for lead in sorted(leaders):
            n, held = lead, []
            while True:
                held.append(self.instructions[n])
                to = graph[n]
                if to != [n + 1] or n + 1 in leaders:
                    break
                n += 1
            self.blocks[lead], self.next[lead] = held, list(dict.fromkeys(to))
        self.previous: dict[int, list[int]] = {b: [] for b in self.blocks}
        for b, to in self.next.items():
            for t in to:
                self.previous[t].append(b)

    def _dominate(self) -> None:
        """Order the blocks in reverse post-order and compute their dominators."""
        order, seen, stack = [], {0}, [(0, iter(self.next[0]))]
        while stack:
            block, rest = stack[-1]
            for t in rest:
                if t not in seen:
                    seen.add(t)
                    stack.append((t, iter(self.next[t])))
                    break
            else:
                order.append(block)
                stack.pop()
        self.order = order[::-1]
        everything = set(self.order)
        self.dominators = {b: set(everything) for b in self.order}
        self.dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for b in self.order[1:]:
                new = set.intersection(*(self.dominators[p] for p in self.previous[b])) | {b}
                if new != self.dominators[b]:
                    self.dominators[b], changed = new, True

    # ---- loops

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, outer ones first; loops with the same header are merged."""
        place = {b: n for n, b in enumerate(self.order)}
        found: dict[int, Loop] = {}
        for b in self.order:
            for h in self.next[b]:
                if h in self.dominators[b]:
                    loop = found.setdefault(h, Loop(h, {h}, set()))
                    loop.latches.add(b)
                    work = [b]
                    while work:
                        n = work.pop()
                        if n not in loop.body:
                            loop.body.add(n)
                            work += self.previous[n]
                elif place[h] <= place[b]:
                    raise SassError(
                        f"{self.blocks[h][0].address:#x}: a loop with two entries is not a natural loop"
                    )
        ordered = sorted(found.values(), key=lambda loop: -len(loop.body))
        for n, loop in enumerate(ordered):
            around = [o for o in ordered[:n] if loop.body < o.body]
            if around:
                loop.outer = around[-1]
                loop.outer.inner.append(loop)
        return ordered

    def once(self, rank) -> Loop:
        """The code outside all loops, as a loop that runs once: from the entry to the exit of the path that `rank`
        prefers (see `path`)."""
        ends = {b for b in self.order if not self.next[b]}
        whole = Loop(0, set(self.order), ends, [loop for loop in self.loops if loop.outer is None])
        whole.latches = {self.longest(whole, rank).end}
        return whole

    def weight(self, block: int) -> int:
        """Instructions that a warp issues in a block, callees included."""
        count = 0
        for i in self.blocks[block]:
            count += i.name != "NOP"
            if i.name == "CALL" and i.target in self.index:
                count += self._callee(self.index[i.target])
        return count

    def _callee(self, n: int) -> int:
        """Instructions of a subroutine, all of its branches: from its entry up to its RETs."""
        seen, work = set(), [n]
        while work:
            n = work.pop()
            if n not in seen:
                seen.add(n)
                work += self._flow(n, {})
        return len(seen)

    def sure(self, loop: Loop) -> list[int]:
        """Blocks on every pass of the loop, in order."""
        common = set.intersection(*(self.dominators[latch] for latch in loop.latches))
        return [b for b in self.order if b in common & loop.body]

    def path(self, loop: Loop, rank) -> "Way":
        """The preferred path from the loop's header to a latch. Inner loops are stepped over at no cost.

        `rank`: block -> (shun, want). Minimize instructions in shunned blocks, then maximize `want`, then minimize
        instructions in skippable blocks, then maximize length, so that the longer side of a branch counts. A block is
        skippable if a path around it of at most SHORT instructions connects the mandatory blocks before and after it.
        """
        return self._search(loop, rank, self._skippable(loop))

    def longest(self, loop: Loop, rank) -> "Way":
        """As `path`, with no block skipped."""
        return self._search(loop, rank, set())

    def _search(self, loop: Loop, rank, skippable: set[int]) -> "Way":
        entry = {b: inner.header for inner in loop.inner for b in inner.body}
        start = entry.get(loop.header, loop.header)
        best: dict[int, tuple] = {}
        came: dict[int, int | None] = {start: None}
        for node in self._nodes(loop):
            if node not in came:
                continue
            mine = (0, 0, 0, 0)
            if node not in entry:
                weight, (shun, want) = self.weight(node), rank(node)
                rest = (-weight, 0) if node in skippable and not want else (0, weight)
                mine = (-weight if shun else 0, want, *(rest if not shun else (0, 0)))
            before = best.get(came[node], (0, 0, 0, 0))
            best[node] = tuple(a + b for a, b in zip(before, mine, strict=True))
            for t in self._after(loop, node, entry):
                if t not in came or best[came[t]] < best[node]:
                    came[t] = node
        latches = {entry.get(b, b) for b in loop.latches} & best.keys()
        node = max(latches, key=best.__getitem__)
        blocks = []
        while node is not None:
            if node not in entry:
                blocks.append(node)
            node = came[node]
        return Way(
            end=blocks[0] if blocks else loop.header,
            instructions=[i for b in reversed(blocks) for i in self.blocks[b] if i.name != "NOP"],
            count=sum(self.weight(b) for b in blocks),
        )

    def _nodes(self, loop: Loop) -> list[int]:
        """Blocks of the loop in topological order; an inner loop is represented by its header."""
        inside = set().union(*(inner.body - {inner.header} for inner in loop.inner), set())
        return [b for b in self.order if b in loop.body - inside]

    def _after(self, loop: Loop, node: int, entry: dict[int, int]):
        body = {b for b, header in entry.items() if header == node} or {node}
        for b in sorted(body):
            for t in self.next[b]:
                if t in loop.body and t not in body and t != loop.header:
                    yield entry.get(t, t)

    def _skippable(self, loop: Loop) -> set[int]:
        """Blocks that a short path bypasses."""
        entry = {b: inner.header for inner in loop.inner for b in inner.body}
        sure, nodes = self.sure(loop), self._nodes(loop)
        found = set()
        for a, b in zip(sure, sure[1:], strict=False):
            between = {n for n in nodes if a in self.dominators[n] and n not in (a, b)}
            between -= {n for n in nodes if b in self.dominators[n]}
            least = {a: 0}  # instructions of the shortest way from a
            for n in nodes:
                if n not in least:
                    continue
                for t in self._after(loop, n, entry):
                    step = least[n] + (self.weight(t) if t in between and t not in entry else 0)
                    if t in between | {b}:
                        least[t] = min(step, least.get(t, step))
            if least.get(b, SHORT + 1) <= SHORT:
                found |= between - entry.keys()
        return found
