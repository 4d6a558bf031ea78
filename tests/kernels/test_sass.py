"""The counter of instructions per logit, on handwritten machine code and on a kernel of known cost."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import cubin  # noqa: E402
import walks  # noqa: E402
from sass import Code, SassError, parse  # noqa: E402

sys.path.remove(str(BENCHMARKS))

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def code(text):
    """Parses lines `LABEL: @P0 OPCODE operands`; a label as the last operand is replaced by its address."""
    lines = [line.strip() for line in text.strip().splitlines()]
    labels, bare = {}, []
    for n, line in enumerate(lines):
        named = re.match(r"(\w+):\s*(.*)", line)
        if named:
            labels[named[1]], line = 16 * n, named[2]
        bare.append(line)
    sass = []
    for n, line in enumerate(bare):
        for label, address in labels.items():
            line = re.sub(rf"\b{label}$", hex(address), line)
        sass.append(f"        /*{16 * n:04x}*/          {line} ;   /* 0x0 */")
    return Code(parse("\n".join(sass)))


def parse_lines(lines):
    return parse("\n".join(f"/*{16 * n:04x}*/ {line} ;" for n, line in enumerate(lines)))


def the_loop(found, header=None):
    loops = [x for x in found.loops if header in (None, found.blocks[x.header][0].address)]
    assert len(loops) == 1
    return loops[0]


def ways(found, header=None):
    loop = the_loop(found, header)
    plain = lambda block: (False, 0)  # noqa: E731
    return found.longest(loop, plain).count, found.path(loop, plain).count


EX2 = "\n".join(["MUFU.EX2 R9, R9"] * 8)
TILE = walks.Division(32, tiles=True)


def one_walk(ex2=1, **division):
    of = walks.Phase(ex2, walks.Division(**division) if division else TILE)
    return {"maximum": walks.Phase(0, of.division), "statistics": of}


def test_instructions_are_parsed():
    text = """
        /*0000*/                   LDG.E.EF.128 R4, desc[UR6][R4.64+-0x8] ;          /* 0x0 */
                                                                                     /* 0x1 */
        /*0010*/              @!P3 LDG.E.U16 R23, desc[UR6][R2.64] ;
        /*0020*/              @!P2 BRA !P0, 0x10 ;
        /*0030*/                   BRA 0x30;
    """
    vector, single, branch, last = parse(text)
    assert (vector.name, vector.predicate, vector.bytes) == ("LDG", "", 16)
    assert (single.predicate, single.bytes) == ("!P3", 2)
    assert branch.conditional and branch.target == 0x10
    assert not last.conditional and last.target == 0x30


def test_a_rare_block_out_of_line_belongs_to_the_loop():
    found = code(f"""
        MOV R1, R1
        TOP: LDG.E.128 R4, [R2.64]
        FSETP.GT.AND P0, PT, R4, R5, PT
        @P0 BRA RARE
        BACK: {EX2}
        IADD3 R2, R2, 0x10, RZ
        ISETP.GE.AND P1, PT, R2, R3, PT
        @!P1 BRA TOP
        EXIT
        RARE: FMUL R6, R6, R7
        FMUL R6, R6, R7
        BRA BACK
    """)
    assert ways(found) == (3 + 8 + 3 + 3, 3 + 8 + 3)
    figure = walks.count_row(found, 1024, 2, one_walk())
    assert figure.instructions == pytest.approx(17 / 8)
    assert figure.rare == pytest.approx(3 / 8)
    assert figure.ex2 == 1


def test_a_block_that_leaves_the_loop_is_not_part_of_it():
    """Even if its address is inside the loop."""
    found = code("""
        TOP: LDG.E.128 R4, [R2.64]
        @P0 BRA ON
        FMUL R6, R6, R7
        FMUL R6, R6, R7
        EXIT
        ON: IADD3 R2, R2, 0x10, RZ
        @!P1 BRA TOP
        EXIT
    """)
    assert ways(found) == (4, 4)


def test_the_longer_of_two_branches_counts():
    found = code("""
        TOP: LDG.E.128 R4, [R2.64]
        @P0 BRA OTHER
        FMUL R6, R6, R7
        FMUL R6, R6, R7
        FMUL R6, R6, R7
        FMUL R6, R6, R7
        FMUL R6, R6, R7
        FMUL R6, R6, R7
        BRA ON
        OTHER: FADD R6, R6, R7
        FADD R6, R6, R7
        FADD R6, R6, R7
        FADD R6, R6, R7
        FADD R6, R6, R7
        ON: @!P1 BRA TOP
        EXIT
    """)
    assert ways(found) == (2 + 7 + 1, 2 + 7 + 1)  # the paths are of similar length: neither is rare


def test_nested_loops_are_counted_separately():
    found = code(f"""
        MOV R1, R1
        OUTER: MOV R2, R2
        MOV R2, R2
        INNER: LDG.E.128 R4, [R2.64]
        {EX2}
        @P0 BRA INNER
        IADD3 R2, R2, 0x10, RZ
        @P1 BRA OUTER
        EXIT
    """)
    outer, inner = found.loops
    assert outer.inner == [inner] and inner.outer is outer
    assert ways(found, 0x30) == (10, 10)
    assert ways(found, 0x10) == (4, 4)
    # Two pieces of a row, 128 vectors each, over 32 threads; the outer loop runs once per piece.
    figure = walks.count_row(found, 2048, 2, one_walk(lanes=32, pieces=2))
    assert figure.instructions == pytest.approx((256 * 10 + 2 * 32 * 4) / 2048)


def test_backward_branches_of_every_form():
    for branch, exit_ in (
        ("@P0 BRA TOP", "NOP"),
        ("BRA P0, TOP", "NOP"),
        ("@!P2 BRA !P0, TOP", "NOP"),
        ("BRA.U UP0, TOP", "NOP"),
        ("@UP0 BRA TOP", "NOP"),
        ("BRA TOP", "@P0 EXIT"),
    ):
        found = code(
            f"TOP: LDG.E.128 R4, [R2.64]\n{exit_}\nFADD R4, R4, R5\n{branch}\nEXIT\nBRA 0x50"
        )
        assert ways(found)[0] == 3 + (exit_ != "NOP"), branch


def test_bsync_continues_after_its_bssy_region():
    """Even if the BSYNC is in another part of the code."""
    found = code("""
        TOP: BSSY B0, ON
        @P0 BRA FAR
        BSYNC B0
        ON: LDG.E.128 R4, [R2.64]
        @P1 BRA TOP
        EXIT
        FAR: FADD R4, R4, R5
        FADD R4, R4, R5
        BSYNC B0
    """)
    assert ways(found) == (2 + 3 + 2, 2 + 1 + 2)


def test_uniform_instructions_count_and_nops_do_not():
    found = code("TOP: LDG.E.128 R4, [R2.64]\nUIADD3 UR4, UR4, 0x1, URZ\nNOP\n@P0 BRA TOP\nEXIT")
    assert ways(found)[0] == 3
    figure = walks.count_row(
        code(f"TOP: LDG.E.128 R4, [R2.64]\nUIADD3 UR4, UR4, 0x1, URZ\n{EX2}\n@P0 BRA TOP\nEXIT"),
        1024,
        2,
        one_walk(),
    )
    assert figure.instructions == pytest.approx(11 / 8)
    assert figure.uniform == pytest.approx(1 / 8)


def test_calls_count_their_callee_and_divergent_warps_do_not():
    found = code("""
        TOP: LDG.E.128 R4, [R2.64]
        BRA.DIV UR4, APART
        CALL.REL.NOINC SUB
        ON: @P0 BRA TOP
        EXIT
        SUB: FADD R4, R4, R5
        RET.REL.NODEC R20 0x0
        APART: WARPSYNC.COLLECTIVE R15, APART
        BRA ON
    """)
    assert ways(found)[0] == 4 + 2


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(SassError, match="indirect branch"):
        code("BRX R2 -0x10\nEXIT")
    with pytest.raises(SassError, match="bulk copy"):
        code("UBLKCP.S.G [UR4], [UR6], UR8\nEXIT")
    with pytest.raises(SassError, match="two entries"):
        _ = code("@P0 BRA B\nA: NOP\nB: FADD R1, R1, R1\n@P1 BRA A\nEXIT").loops
    with pytest.raises(SassError, match="holds? 3 exponentials|with 3 exponentials"):
        walks.count_row(
            code("TOP: LDG.E.128 R4, [R2.64]\n" + "MUFU.EX2 R9, R9\n" * 3 + "@P0 BRA TOP\nEXIT"),
            1024,
            2,
            one_walk(),
        )


def test_alternative_loads_of_the_same_logits_count_once():
    """Predicated loads: one vector, or eight single elements."""
    singles = "\n".join(["@P3 LDG.E.U16 R8, [R2.64]"] * 8)
    found = code(f"TOP: @!P3 LDG.E.128 R4, [R2.64]\n{singles}\n{EX2}\n@P0 BRA TOP\nEXIT")
    figure = walks.count_row(found, 1024, 2, one_walk(lanes=32))
    assert figure.instructions == pytest.approx(18 / 8)


WHOLE = "\n".join(["LDG.E.128 R4, [R2.64]"] * 2) + "\n" + EX2 + "\n" + EX2
MASKED = "\n".join(["@P4 LDG.E.128 R4, [R2.64]"] * 2) + "\nSEL R4, R4, R5, P4\n" + EX2 + "\n" + EX2


def test_a_masked_last_tile_takes_the_rest():
    """A row of 4.5 tiles of 32 lanes x 16 logits."""
    both = f"TOP: {WHOLE}\n@P0 BRA TOP\n@P1 BRA LAST\nEXIT\nLAST: {MASKED}"
    for last in ("\n@P2 BRA LAST\nEXIT", "\nEXIT"):  # a loop, or straight code
        figure = walks.count_row(code(both + last), 32 * 72, 2, one_walk())
        assert figure.instructions == pytest.approx(32 * (4 * 19 + 20) / (32 * 72))
        assert [logits for _, logits, _ in figure.parts] == [4 * 512, 256]
    with pytest.raises(SassError, match="no loop takes the last 256 of 2304 logits"):
        walks.count_row(code(f"TOP: {WHOLE}\n@P0 BRA TOP\nEXIT"), 32 * 72, 2, one_walk())


def test_a_last_tile_that_is_padded_or_guarded():
    """Without conditional accesses: in the loop of the other tiles, or in a more expensive one after it."""
    padded = code(f"TOP: {WHOLE}\n@P0 BRA TOP\nEXIT")
    guard = f"NEXT: {WHOLE}\nSEL R4, R4, R5, P4\n@P0 BRA NEXT\nEXIT"
    guarded = code(f"TOP: {WHOLE}\n@P0 BRA TOP\n{guard}")
    for found, last, cost in ((padded, "padded", 5 * 19), (guarded, "guarded", 4 * 19 + 20)):
        phases = one_walk(lanes=32, tiles=True, last=last)
        figure = walks.count_row(found, 32 * 72, 2, phases)
        assert figure.instructions == pytest.approx(32 * cost / (32 * 72))


def test_loops_of_misaligned_rows():
    """Recognised by funnel shifts or by overlapping vectors; used by misaligned rows only, which use no other loops."""
    shift = "\n".join(["SHF.R.W.U32 R4, R4, R20, R5"] * 8)
    aligned = f"@P6 BRA ODD\nTOP: {WHOLE}\n@P0 BRA TOP\nEXIT\n"
    by_shift = f"ODD: {WHOLE}\n{shift}\n@P0 BRA ODD\nEXIT"
    overlapping = f"ODD: {WHOLE}\nLDG.E.128 R4, [R2.64]\n@P0 BRA ODD\nEXIT"
    for special, count in ((by_shift, 27), (overlapping, 20)):
        found = code(aligned + special)
        assert walks.count_row(found, 4096, 2, one_walk()).instructions == pytest.approx(19 / 16)
        odd = walks.count_row(found, 4096, 2, one_walk(), aligned=False)
        assert odd.instructions == pytest.approx(count / 16)


def test_misaligned_rows_of_single_elements():
    """Many elements per iteration beside a vector loop: misaligned rows only. One per iteration: a head or a tail."""
    singles = "\n".join(["LDG.E R4, [R2.64]"] * 8)
    found = code(f"""
        @P6 BRA ODD
        TOP: {WHOLE.replace(EX2, "MUFU.EX2 R9, R9")}
        {"MUFU.EX2 R9, R9" + chr(10) + EX2[: -len("MUFU.EX2 R9, R9") - 1]}
        @P0 BRA TOP
        EXIT
        ODD: {singles}
        {EX2}
        @P0 BRA ODD
        TAIL: LDG.E R4, [R2.64]
        MUFU.EX2 R9, R9
        @P0 BRA TAIL
        EXIT
    """)
    aligned = walks.count_row(found, 4096, 4, one_walk())
    assert [w.take for _, _, w in aligned.parts] == [8]
    odd = walks.count_row(found, 4097, 4, one_walk(), aligned=False)
    assert [(w.take, logits) for _, logits, w in odd.parts] == [(8, 4096), (1, 1)]
    assert odd.instructions == pytest.approx((512 * 17 + 32 * 3) / 4097)


def test_far_rows_are_left_out_where_the_table_says_so():
    near = f"TOP: {WHOLE}\n@P0 BRA TOP\n@P5 BRA FAR\nEXIT\n"
    far = f"FAR: {WHOLE}\n" + "\n".join(["FMUL R4, R4, R5"] * 16) + "\n@P0 BRA FAR\nEXIT"
    again = f"FAR: {WHOLE}\n" + "\n".join(["FADD R4, R4, R5"] * 16) + "\n@P0 BRA FAR\nEXIT"
    for second, said, cost in ((far, True, 19), (far, False, 19 + 35), (again, True, 19 + 35)):
        phases = {"statistics": walks.Phase(1, TILE, far=said)}
        figure = walks.count_row(code(near + second), 4096, 2, phases)
        assert figure.instructions == pytest.approx(cost / 16)
        assert len(figure.unused) == (cost == 19)
    compared = f"FAR: {WHOLE.replace('MUFU.EX2 R9, R9', 'FSETP.EQ.AND P1, PT, R4, R5, PT')}\n@P0 BRA FAR\nEXIT"
    for said, cost in ((True, 19), (False, 19 + 19)):
        phases = {
            name: walks.Phase(ex2, TILE, said) for name, ex2 in (("maximum", 0), ("statistics", 1))
        }
        figure = walks.count_row(code(near + compared), 4096, 2, phases)
        assert figure.instructions == pytest.approx(cost / 16)


def test_loads_in_flight():
    loads = [f"LDG.E.128 R{n}, [R2.64+{16 * n:#x}]" for n in range(4, 36, 4)]
    use = "FADD R40, R4, R40"
    assert walks.loads_in_flight(parse_lines([*loads, use])) == 8
    # The last five of one iteration and the first three of the next.
    assert walks.loads_in_flight(parse_lines([*loads[:3], use, *loads[3:]])) == 8
    in_turn = [loads[0], use, loads[1], use.replace("R4,", "R8,")]
    assert walks.loads_in_flight(parse_lines(in_turn)) == 1
    assert walks.loads_in_flight(parse_lines(["LDGSTS.E.BYPASS.128 [R1], [R2.64]"] * 4)) == 4


def test_a_pass_without_exponentials_counts():
    """A separate loop for the maximum, and copies to shared memory."""
    maximum = "FIRST: LDG.E.128 R4, [R2.64]\nHMNMX2 R4, R4, R5, PT\n@P0 BRA FIRST\n"
    found = code(f"{maximum}TOP: {WHOLE}\n@P0 BRA TOP\nEXIT")
    assert walks.count_row(found, 4096, 2, one_walk()).instructions == pytest.approx(
        3 / 8 + 19 / 16
    )
    copy = "FIRST: LDGSTS.E.BYPASS.128 [R1], [R2.64]\nIADD3 R2, R2, R3, RZ\n@P0 BRA FIRST\n"
    walk = WHOLE.replace("LDG.E.128 R4, [R2.64]", "LDS.128 R4, [R2]")
    found = code(f"{copy}LDGDEPBAR\nTOP: {walk}\n@P0 BRA TOP\nEXIT")
    phases = {"copy": walks.Phase(0, TILE)} | one_walk()
    assert walks.count_row(found, 4096, 2, phases).instructions == pytest.approx(3 / 8 + 19 / 16)


def test_two_passes_over_a_row_cost_twice():
    twice = f"TOP: {WHOLE}\n@P0 BRA TOP\nNEXT: {WHOLE}\n@P0 BRA NEXT\nEXIT"
    either = f"@P5 BRA NEXT\nTOP: {WHOLE}\n@P0 BRA TOP\nEXIT\nNEXT: {WHOLE}\nNOP\nFADD R1, R1, R1\n@P0 BRA NEXT\nEXIT"
    assert walks.count_row(code(twice), 4096, 2, one_walk()).instructions == pytest.approx(38 / 16)
    assert walks.count_row(code(either), 4096, 2, one_walk()).instructions == pytest.approx(20 / 16)


def test_an_unrolled_loop_and_its_remainder_share_a_row():
    """7 vectors for each of 32 threads; an iteration of the unrolled loop takes 2."""
    found = code(
        f"TOP: {WHOLE}\n@P0 BRA TOP\nREST: LDG.E.128 R4, [R2.64]\n{EX2}\n@P1 BRA REST\nEXIT"
    )
    figure = walks.count_row(found, 32 * 7 * 8, 2, one_walk(lanes=32))
    assert figure.instructions == pytest.approx((3 * 19 + 10) / 56)


def test_gradients_are_a_separate_phase():
    read = f"TOP: {WHOLE}\n@P0 BRA TOP\n"
    zero = "ZERO: STG.E.128 [R2.64], RZ\n@P1 BRA ZERO\nEXIT\n"
    write = f"GRAD: LDG.E.128 R4, [R2.64]\n{EX2}\nSTG.E.128 [R2.64], R4\n@P1 BRA GRAD\nEXIT"
    found = code(f"{read}@P2 BRA GRAD\n{zero}{write}")
    assert walks.count_row(found, 4096, 2, one_walk()).instructions == pytest.approx(19 / 16)
    phases = {"gradient": walks.Phase(1, TILE)}
    assert walks.count_row(found, 4096, 2, phases).instructions == pytest.approx(11 / 8)
    with pytest.raises(SassError, match="no walker"):
        walks.count_row(code("FADD R1, R1, R1\nEXIT"), 4096, 2, phases)


def test_a_gradient_may_be_stored_in_fewer_bytes():
    """fp32 logits, 16-bit gradient: 16 bytes are stored as 8, or one by one if the alignments differ."""
    four = "\n".join(["MUFU.EX2 R9, R9"] * 4)
    wide = f"TOP: LDG.E.128 R4, [R2.64]\n{four}\nSTG.E.64 [R8.64], R4\n@P1 BRA TOP\nEXIT\n"
    ones = "\n".join(["STG.E.U16 [R8.64], R4"] * 4)
    single = f"ODD: LDG.E.128 R4, [R2.64]\n{four}\n{ones}\n@P1 BRA ODD\nEXIT"
    phases = {"gradient": walks.Phase(1, TILE)}
    for text, each in ((wide, 7), (single.replace("ODD", "TOP"), 10)):
        figure = walks.count_row(code(text), 4096, 4, phases, stored=2)
        assert figure.instructions == pytest.approx(each / 4)
        assert [w.take for _, _, w in figure.parts] == [4]
    # Counted as fp32, such an iteration takes only 2 logits.
    figure = walks.count_row(code(wide), 4096, 4, phases)
    assert [w.take for _, _, w in figure.parts] == [2]


TOY = """
#include <cuda_bf16.h>
// Reads a row of n vectors of 8 bf16 logits, with EXTRA instructions per vector that the compiler cannot remove.
__global__ void __launch_bounds__(256) toy_kernel(const int4* row, float* out, int n) {
  float sum = 0;
#pragma unroll 1
  for (int v = threadIdx.x; v < n; v += 256) {
    const int4 x = __ldcs(row + v);
    const unsigned words[4] = {(unsigned)x.x, (unsigned)x.y, (unsigned)x.z, (unsigned)x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low, high;
      asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(low) : "f"(__uint_as_float(words[i] << 16)));
      asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(high) : "f"(__uint_as_float(words[i] & 0xffff0000u)));
      sum += low + high;
    }
#pragma unroll
    for (int i = 0; i < EXTRA; ++i) asm volatile("mul.f32 %0, %0, %0;" : "+f"(sum));
  }
  out[threadIdx.x] = sum;
}
"""


@needs_nvcc
def test_a_kernel_of_known_cost(tmp_path):
    """Per 8 logits: 1 load, 8 exponentials, 8 conversions, 8 additions; then 16 multiplications in addition."""
    figures = []
    for extra in (0, 16):
        (tmp_path / "toy.cu").write_text(TOY)
        command = ["nvcc", "-cubin", "-arch=sm_90", "-O3", f"-DEXTRA={extra}", "-o", tmp_path / "t"]
        subprocess.run([*command, tmp_path / "toy.cu"], check=True, capture_output=True)
        kernel = cubin.functions(tmp_path / "t")["toy_kernel"]
        assert (kernel.threads, kernel.spills, kernel.shared) == (256, 0, 0)
        figures.append(walks.count_row(kernel.code, 128256, 2, one_walk(lanes=256)))
    plain, more = figures
    assert plain.ex2 == more.ex2 == 1
    # 25 as above. Address, step, comparison and branch of the loop take one or two instructions each.
    assert 25 + 4 <= plain.instructions * 8 <= 25 + 8
    assert more.instructions - plain.instructions == pytest.approx(16 / 8)
