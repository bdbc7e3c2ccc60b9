#!/usr/bin/env python3
"""Tests of what torch_cuda.py compares, on the CPU: right results agree, wrong ones have no time.

    VENV/bin/python tools/peers/test_peers.py      where VENV has torch and numpy, and perhaps triton and bitsandbytes
"""

import json
import os
import sys
import tempfile
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
os.environ["TRITON_INTERPRET"] = "1"
try:
    import numpy as np
    import torch
except ImportError as missing:
    sys.exit(f"test_peers.py: {missing}: pip install torch numpy")

import torch_cuda

M, N, K = 7, 33, 64


def case(folder, op, dims, tensors, result):
    """Writes a case as `handmill bench --save-inputs` does and returns its line."""
    args = []
    kinds = {"float32": "f32", "float64": "f64", "float16": "f16", "uint8": "u8", "int8": "i8"}
    for name, values in [*tensors.items(), *result.items()]:
        values.tofile(folder / f"{op}-{name}.bin")
        args.append({"name": name, "dtype": kinds[str(values.dtype)], "period": values.shape, "shape": values.shape,
                     "output": name in result, "file": f"{op}-{name}.bin"})  # fmt: skip
    line = {"op": op, "case": dims, "shape": "a test's", "act": "f32", "flops": 1, "bytes": 1, "args": args}
    with open(folder / "inputs.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    return line


def products(folder, draw):
    """A case of each packed format, with what its bytes stand for."""
    x = draw.standard_normal((M, K)).astype("f4")
    scales, mins = (draw.random((N, K // 32)).astype("f2") for _ in range(2))
    bytes_ = draw.integers(0, 256, (N, K // 2), dtype="u1")
    low, high = bytes_ & 15, bytes_ >> 4
    spread = lambda groups: np.repeat(groups.astype("f8"), 32, axis=1)

    q4 = np.stack([low, high], -1).reshape(N, K) * spread(scales) + spread(mins)
    found = [case(folder, "qmatmul_q4", f"M={M} N={N} K={K} G=32",
                  {"x": x, "codes": bytes_, "scales": scales, "mins": mins}, {"y": x.astype("f8") @ q4.T})]  # fmt: skip
    codes = draw.integers(-127, 128, (N, K), dtype="i1")
    q8 = codes * spread(scales)
    none = np.zeros((0, K // 32), "f2")
    found += [case(folder, "qmatmul_q8", f"M={M} N={N} K={K} G=32",
                   {"x": x, "codes": codes, "scales": scales, "mins": none}, {"y": x.astype("f8") @ q8.T})]  # fmt: skip
    absmax = draw.random((N, K // 64)).astype("f4")
    levels = np.array(torch_cuda.LEVELS)
    nf4 = levels[np.stack([high, low], -1).reshape(N, K)] * np.repeat(absmax.astype("f8"), 64, axis=1)
    found += [case(folder, "qmatmul_nf4", f"M={M} N={N} K={K}",
                   {"x": x, "codes": bytes_, "absmax": absmax}, {"y": x.astype("f8") @ nf4.T})]  # fmt: skip
    return found


def search(folder, draw):
    """The best of unit rows, by scores alone."""
    unit = lambda a: (a / np.linalg.norm(a, axis=1, keepdims=True)).astype("f4")
    q, rows = unit(draw.standard_normal((3, K))), unit(draw.standard_normal((200, K)))
    scores = -np.sort(-(q.astype("f8") @ rows.astype("f8").T), axis=1)[:, :5]
    return [case(folder, "cosine_topk_f32", f"Q=3 N=200 D={K} K=5 S=1", {"q": q, "rows": rows},
                 {"scores": scores.reshape(3, 1, 5)})]  # fmt: skip


class Compared(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        draw = np.random.default_rng(1)
        self.cases = products(self.folder, draw) + search(self.folder, draw)

    def each(self):
        for line in torch_cuda.chosen(torch_cuda.lines(self.folder / "inputs.jsonl")):
            for name in torch_cuda.plans(line):
                yield line, name

    def measured(self, line, name):
        """What is told of a case, or a test left out where the peer is not installed."""
        try:
            return torch_cuda.measure(torch, self.folder, line, name, "cpu")
        except ImportError as missing:
            self.skipTest(str(missing))

    def test_right_results_agree(self):
        names = set()
        for line, name in self.each():
            with self.subTest(op=line["op"], peer=name):
                names.add(name)
                found = self.measured(line, name)
                self.assertLessEqual(found["error"], found["tolerance"])
        self.assertEqual(len(names), 5)

    def test_wrong_results_have_no_time(self):
        """A result of the oracle that is another one: of the last row and column, as of a tail that was left out."""
        for line, name in self.each():
            (arg,) = [arg for arg in line["args"] if arg["output"]]
            path = self.folder / arg["file"]
            right = np.fromfile(path, "<f8")
            for wrong in (1e3, float("nan")):
                with self.subTest(op=line["op"], peer=name, wrong=wrong):
                    spoilt = right.copy()
                    # Not the best of a list, which any floor may have cut.
                    spoilt[-1] += wrong
                    spoilt.tofile(path)
                    if np.isnan(wrong) and "scores" == arg["name"]:
                        continue
                    with self.assertRaises(torch_cuda.Failed):
                        self.measured(line, name)
            right.tofile(path)


if __name__ == "__main__":
    unittest.main()
