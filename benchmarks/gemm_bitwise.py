"""Is a logit of the library's GEMM bitwise identical in products of other shapes? Part of `make gpu-quick`.

    python benchmarks/gemm_bitwise.py --out gemm_bitwise.json [--device cpu|cuda] [--tiny]

The linear ops cut their rows into chunks. The length of a chunk depends on the workspace preset and on the number of
rows, which differs between a batch, a micro-batch and the rows that a mask leaves. The log-prob of a row is bitwise
identical in all of them only if its product is. This multiplies the rows of one batch in every such chunk, at two
positions, and compares with the chunks of the fast preset at all rows; also in one product, and in the blocks of
`blocks.py`. Differences are a result; the exit status is 1 only if a repeated product differs from itself.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import blocks
from fastrlhf.ops import _gemms
from fastrlhf.ops._gemms import gemms_for
from harness import machine, plain

SIZES = (8192, 4096, 128256)  # N, H, V
TINY = (256, 64, 262144 // 4)  # for a dry run: several chunks of each preset on a CPU
SHARES = (1.0, 0.4, 0.1)  # of the rows, per call


def product(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 logits, computed as in the linear ops."""
    gemms = gemms_for(x, weight)
    return gemms.logits(gemms.operand(x), gemms.operand(weight), None, None)


def chunks(preset: str, x: Tensor, rows: int, weight: Tensor) -> list[slice]:
    """The chunks that an op uses for `rows` rows."""
    gemms = gemms_for(x, weight)
    step = _gemms.chunk_rows(gemms.logits_bytes[preset], len(weight), gemms.acc)
    return _gemms.cuts(rows, step)


class Comparison:
    """Compares products of other shapes with those of the fast preset's chunks of all rows."""

    def __init__(self, x: Tensor, weight: Tensor):
        self.x, self.weight = x, weight
        self.home = chunks("fast", x, len(x), weight)

    def compare(self, rows: slice, columns: slice | None = None) -> dict:
        """Compare one product of `rows` x `columns`: number of differing logits, and the largest difference."""
        columns = slice(0, len(self.weight)) if columns is None else columns
        found = product(self.x[rows], self.weight[columns])
        differing, largest = 0, 0.0
        for chunk in self.home:
            start, stop = max(chunk.start, rows.start), min(chunk.stop, rows.stop)
            if start >= stop:
                continue
            whole = product(self.x[chunk], self.weight)
            expected = whole[start - chunk.start : stop - chunk.start, columns]
            difference = found[start - rows.start : stop - rows.start] - expected
            differing += int(torch.count_nonzero(difference))
            largest = max(largest, difference.abs().max().item())
        size = {"rows": rows.stop - rows.start, "columns": columns.stop - columns.start}
        size |= {"first_row": rows.start, "first_column": columns.start}
        return size | {"equal": not differing, "differing": differing, "largest": largest}


def measure(sizes: tuple[int, int, int], device: str) -> list[dict]:
    n, h, v = sizes
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, h, generator=generator, device=device).bfloat16()
    weight = (torch.randn(v, h, generator=generator, device=device) / h**0.5).bfloat16()
    shapes = Comparison(x, weight)
    rows = [{"what": "the same product again"} | shapes.compare(shapes.home[0])]
    for preset in _gemms.Gemms.logits_bytes:
        for share in SHARES:
            cut = chunks(preset, x, int(share * n), weight)
            for chunk in {c.stop - c.start: c for c in (cut[-1], cut[0])}.values():
                size = chunk.stop - chunk.start
                for first in (chunk.start, n - size):
                    what = {"what": "chunk", "preset": preset, "tokens": int(share * n)}
                    rows.append(what | shapes.compare(slice(first, first + size)))
    rows.append({"what": "one product"} | shapes.compare(slice(0, n)))
    for shape in blocks.shapes(*blocks.device_limits(x.device), sizes):
        last = blocks.cuts(n, shape[0])[-1], blocks.cuts(v, shape[1])[-1]
        first = slice(0, min(shape[0], n)), slice(0, min(shape[1], v))
        rows += [{"what": "block"} | shapes.compare(*place) for place in (first, last)]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = measure(TINY if arguments.tiny else SIZES, arguments.device)
    document = {"device": arguments.device, "machine": machine(arguments.device)}
    document |= {"shape": TINY if arguments.tiny else SIZES, "rows": rows}
    document["chunks_equal"] = all(row["equal"] for row in rows if row["what"] == "chunk")
    arguments.out.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
    for row in rows:
        result = "identical"
        if not row["equal"]:
            result = f"{row['differing']} logits differ, by at most {row['largest']:.2g}"
        where = f"{row['rows']}x{row['columns']} at {row['first_row']}"
        print(f"{row['what']} {row.get('preset', '')} {where}: {result}")
    return int(not rows[0]["equal"])


if __name__ == "__main__":
    sys.exit(main())
