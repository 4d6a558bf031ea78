"""Reads the machine code of NVIDIA GPUs: control flow, loops, instructions on a way.

`Code` cuts a function into basic blocks and finds its loops: a loop is the natural loop of its back edges in the
control-flow graph, so a block that the assembler puts behind the function still belongs to the loop that it returns to,
and a block in the middle that never returns does not. Blocks that only a `BRA.DIV` reaches (a warp whose threads have
come apart) are left out.

What is counted is what a warp issues: instructions whose predicate is off count, as do those of the uniform datapath
(they take the same issue slots); NOPs do not. A call counts its callee.
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
    "UBLKCP": "a bulk copy, whose bytes the instruction does not tell",
    "UTMALDG": "a tensor copy, whose bytes the instruction does not tell",
}


SHORT = 4  # instructions of a way around a block that make it one that may be skipped


class SassError(ValueError):
    """The code holds something that this reader cannot count."""


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
        """Control may pass on to the next instruction."""
        on = self.predicate not in ("", "PT", "UPT")
        if self.name == "BRA":
            return on or "," in self.operands or bool({"DIV", "CONV"} & set(self.modifiers))
        return on

    @property
    def bytes(self) -> int:
        """Bytes that a thread moves by this load or store; LDGSTS: by the copy."""
        for word, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if word in self.modifiers:
                return size
        return 4


def parse(text: str) -> list[Instruction]:
    """The instructions of one function from lines of cuobjdump --dump-sass."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match:
            address, predicate, opcode, operands = match.groups()
            found.append(Instruction(int(address, 16), predicate or "", opcode, operands))
    return found


def is_uniform(i: Instruction) -> bool:
    """Of the uniform datapath."""
    return i.name[0] == "U" or i.name in ("R2UR", "VOTEU", "S2UR")


def shifts(instructions: list[Instruction]) -> int:
    """Instructions that move data by a distance known at run time."""
    count = 0
    for i in instructions:
        words = [w.strip() for w in i.operands.split(",")]
        by_register = len(words) > 2 and re.match(r"U?R\d", words[2]) is not None
        count += by_register and (i.name == "PRMT" or (i.name == "SHF" and "W" in i.modifiers))
    return count


def loads_in_flight(instructions: list[Instruction]) -> int:
    """16-byte loads from global memory that a pass issues before it needs what one of them brings; copies all count."""
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
    """What one pass through a loop, or one run of a function, issues."""

    instructions: list[Instruction]
    count: int  # of them, callees included
    end: int  # the last block


@dataclass
class Loop:
    """Blocks of a natural loop; `own` without those of the loops inside it."""

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
        """Instructions that may follow instruction n; `barriers`: where each convergence barrier leads."""
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
        """Successors of each reachable instruction. A BSYNC goes where the BSSYs that reach it say."""
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
        """Basic blocks, numbered by their first instruction; only reachable ones."""
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
        """Blocks in reverse post-order, and the dominators of each."""
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
        """Natural loops, outer ones first; loops of one header are one."""
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
                        f"{self.blocks[h][0].address:#x}: a loop of two entries, no natural loop"
                    )
        ordered = sorted(found.values(), key=lambda loop: -len(loop.body))
        for n, loop in enumerate(ordered):
            around = [o for o in ordered[:n] if loop.body < o.body]
            if around:
                loop.outer = around[-1]
                loop.outer.inner.append(loop)
        return ordered

    def once(self, rank) -> Loop:
        """The function outside its loops, as a loop that runs once: from the entry to the exit where the way ends that
        `rank` wants most (see `path`)."""
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
        """Blocks that every pass of the loop comes through, in their order."""
        common = set.intersection(*(self.dominators[latch] for latch in loop.latches))
        return [b for b in self.order if b in common & loop.body]

    def path(self, loop: Loop, rank) -> "Way":
        """A way from the loop's header to a latch; inner loops are passed over and cost nothing.

        `rank`: block -> (shun, want). Of all ways the one with the fewest instructions of blocks to shun, then with the
        most that is wanted, then with the fewest instructions that it could pass by, then the longest: where a branch
        has two sides, the longer one counts. A block can be passed by if a way around it of at most SHORT instructions
        joins the two blocks that it lies between and that every pass comes through.
        """
        return self._search(loop, rank, self._skippable(loop))

    def longest(self, loop: Loop, rank) -> "Way":
        """The same, but the longest way: nothing is passed by."""
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
        """Blocks of the loop, an inner loop as its header alone, each behind those that lead to it."""
        inside = set().union(*(inner.body - {inner.header} for inner in loop.inner), set())
        return [b for b in self.order if b in loop.body - inside]

    def _after(self, loop: Loop, node: int, entry: dict[int, int]):
        body = {b for b, header in entry.items() if header == node} or {node}
        for b in sorted(body):
            for t in self.next[b]:
                if t in loop.body and t not in body and t != loop.header:
                    yield entry.get(t, t)

    def _skippable(self, loop: Loop) -> set[int]:
        """Blocks that a pass may go around by a short way."""
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
