#!/usr/bin/env python3
"""Times torch on a card on the inputs of `handmill bench`, and writes rows that stand beside Handmill's.

    handmill bench --device cuda:0 --quick --out OUT --save-inputs INPUTS
    tools/peers/torch_cuda.py --inputs INPUTS --record OUT/peers.jsonl
    handmill bench report OUT/bench.jsonl --peers OUT/peers.jsonl --out OUT

What is timed, where it is installed (torch is all that is needed):

    qmatmul, qmatmul_t      the weights in bf16 beforehand, then torch.matmul (cuBLAS), x in bf16
                            the same with the weights expanded from their codes each time, by torch's own ops
    qmatmul in q4           triton_q4.py, a kernel in Triton that expands codes as it multiplies, x in bf16
    qmatmul in nf4          bitsandbytes' matmul_4bit: its own kernel for one row, else its dequantize and cuBLAS
    cosine_topk             one product (TF32 off; f16 rows in f16), then torch.topk

Inputs are those that `bench` drew, with what its f64 oracle says of them: a result that is further off than bf16's
rounding allows (topk: f32's, f16's) has no time. Times are the device's, by events; operands outlast the L2 cache, sets
of them being taken in turn; the median of samples with what a fifth lies below and above. `--dry-run` tells what would
be done, without a card. Without torch or a card it says so, claims nothing and ends with exit code 0. Each peer fails
alone, with a sentence. `--device cpu` compares the results of what runs there and tells no times; Triton's kernel then
needs TRITON_INTERPRET=1.
"""

import argparse
import importlib.metadata
import json
import math
import sys
from pathlib import Path

sys.dont_write_bytecode = True
SECONDS = 0.1  # of samples for a row
LEAST = 100e-6  # a sample lasts at least so long
OVERHANG = 1.25  # how much more than the cache the sets hold
MOST_BYTES = 4 << 30
NUMPY = {"f32": "<f4", "f64": "<f8", "f16": "<f2", "bf16": "<u2", "u32": "<u4", "i32": "<i4", "u8": "u1", "i8": "i1"}
# The quantiles of QLoRA, arXiv 2305.14314, as bitsandbytes has them.
LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
          1.0]  # fmt: skip


class Failed(Exception):
    """Told in one sentence; nothing is claimed of the case."""


def lines(path):
    """The cases of an inputs.jsonl."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}: run `handmill bench --save-inputs DIR` first") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            case = json.loads(line)
            assert {"op", "case", "act", "args", "flops", "bytes"} <= set(case)
        except (ValueError, AssertionError, TypeError) as error:
            raise Failed(f"{path}: line {number} is not from `handmill bench --save-inputs`") from error
        found.append(case)
    return found


def format_of(case):
    return case["op"].rsplit("_", 1)[1]


def plans(case):
    """What is done with a case: names of peers' kernels."""
    op, form = case["op"].rsplit("_", 1)
    if case["act"] not in ("f32", "bf16"):
        return []
    if op in ("qmatmul", "qmatmul_t"):
        plan = ["torch.matmul bf16"]
        if form in ("q4", "q8", "nf4"):
            plan.append("dequantize + torch.matmul bf16")
        if (op, form) == ("qmatmul", "q4"):
            plan.append("Triton q4_matmul bf16")
        if (op, form) == ("qmatmul", "nf4"):
            plan.append("bitsandbytes matmul_4bit bf16")
        return plan
    if op == "cosine_topk" and form in ("f32", "f16"):
        return [f"torch.mm + torch.topk {form}"]
    return []


def chosen(cases):
    """Each case once, whatever the activations of Handmill's kernel were."""
    seen = {}
    for case in cases:
        if plans(case):
            seen.setdefault((case["op"], case["case"]), case)
    return list(seen.values())


class Inputs:
    """A case's arguments on the card, at their full size."""

    def __init__(self, torch, folder, case, place):
        import numpy as np

        self.torch, self.case, self.place, self.expected = torch, case, place, {}
        for arg in case["args"]:
            path = folder / arg["file"]
            values = np.fromfile(path, dtype=NUMPY[arg["dtype"]])
            if values.size != math.prod(arg["period"]):
                raise Failed(f"{path} has {values.size} elements, not {arg['period']}")
            values = values.reshape(arg["period"])
            if arg["output"]:
                self.expected[arg["name"]] = values
                continue
            if arg["dtype"] == "bf16":
                tensor = torch.from_numpy(values.astype(np.int32) << 16).view(torch.float32).to(torch.bfloat16)
            elif arg["dtype"] == "u32":
                tensor = torch.from_numpy(values.astype(np.int64))
            else:
                tensor = torch.from_numpy(values.copy())
            tensor = tensor.to(place)
            for axis, size in enumerate(arg["shape"]):
                if size != tensor.shape[axis]:
                    index = torch.arange(size, device=place) % tensor.shape[axis]
                    tensor = tensor.index_select(axis, index)
            setattr(self, arg["name"], tensor.contiguous())

    def weights(self, dtype):
        """W, expanded by torch's own ops."""
        torch, form = self.torch, format_of(self.case)
        if form in ("f32", "f16", "bf16"):
            return self.w.to(dtype)
        if form == "q8":
            codes = self.codes.to(dtype)
        else:
            low, high = (self.codes & 15), (self.codes >> 4)
            # q4 has the even column in the low half, nf4 in the high one.
            pair = (low, high) if form == "q4" else (high, low)
            codes = torch.stack(pair, dim=-1).reshape(self.codes.shape[0], -1)
        if form == "nf4":
            levels = torch.tensor(LEVELS, device=self.place, dtype=dtype)
            rows, columns = codes.shape
            blocks = levels[codes.int()].reshape(rows, -1, 64) * self.absmax.to(dtype).unsqueeze(-1)
            return blocks.reshape(rows, columns)
        rows, columns = codes.shape
        groups = self.scales.shape[1]
        values = codes.to(dtype).reshape(rows, groups, columns // groups) * self.scales.to(dtype).unsqueeze(-1)
        if form == "q4" or self.mins.numel():
            values = values + self.mins.to(dtype).unsqueeze(-1)
        return values.reshape(rows, columns)


def product(inputs, name):
    """A function of one set of operands, and the operands; x · Wᵀ or dy · W in bf16."""
    torch = inputs.torch
    back = inputs.case["op"].startswith("qmatmul_t_")
    x = (inputs.dy if back else inputs.x).to(torch.bfloat16)
    multiply = (lambda x, w: x @ w) if back else (lambda x, w: x @ w.T)
    if back and inputs.ds.numel():
        # The rank's term, which Handmill adds in the same launch.
        ds, a = inputs.ds.to(torch.bfloat16), inputs.lora_a.to(torch.bfloat16)
        multiply = lambda x, w: torch.addmm(ds @ a, x, w)
    if name.startswith("torch.matmul"):
        return multiply, [x, inputs.weights(torch.bfloat16)]
    if name.startswith("Triton"):
        import triton_q4

        return triton_q4.matmul, [x, inputs.codes, inputs.scales, inputs.mins]
    if name.startswith("bitsandbytes"):
        import bitsandbytes
        from bitsandbytes.functional import QuantState

        rows, columns = inputs.codes.shape[0], 2 * inputs.codes.shape[1]
        code = torch.tensor(LEVELS, device=inputs.place)
        state = QuantState(inputs.absmax.reshape(-1), shape=torch.Size([rows, columns]), code=code, blocksize=64,
                           quant_type="nf4", dtype=torch.bfloat16)  # fmt: skip
        # As its Linear4bit calls it.
        multiply = lambda x, codes: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)
        return multiply, [x, inputs.codes.reshape(-1, 1)]

    def expand(x, codes):
        inputs.codes = codes
        return multiply(x, inputs.weights(torch.bfloat16))

    return expand, [x, inputs.codes]


def topk(inputs, name):
    torch = inputs.torch
    places = inputs.case_k
    rows = inputs.rows
    q = inputs.q.to(rows.dtype)
    return (lambda q, rows: torch.topk(q @ rows.T, places, dim=1)), [q, rows]


def check_product(inputs, result, name):
    """The worst |got - expected| and what bf16 allows there: two roundings of factors each, and one of the result."""
    torch = inputs.torch
    key = "dx" if "dx" in inputs.expected else "y"
    expected = inputs.expected[key]
    got = result.float()[: expected.shape[0], : expected.shape[1]].double().cpu().numpy()
    back = key == "dx"
    x = (inputs.dy if back else inputs.x)[: expected.shape[0]].double().abs()
    w = inputs.weights(torch.float32)
    w = (w if back else w[: expected.shape[1]].T).double().abs()
    size = x @ w
    if back and inputs.ds.numel():
        size = size + inputs.ds[: expected.shape[0]].double().abs() @ inputs.lora_a.double().abs()
    # Expanding in bf16 rounds codes, scale, min and their sum once each, or levels and their scale.
    roundings = 6 if name.startswith(("dequantize", "bitsandbytes")) else 4
    return worst(got, expected, roundings * 2.0**-8 * size.cpu().numpy())


def check_topk(inputs, result, name):
    """Scores of the best K beside the oracle's, which come in lists for each split."""
    import numpy as np

    expected = inputs.expected["scores"]
    queries = expected.shape[0]
    best = -np.sort(-expected.reshape(queries, -1), axis=1)[:, : inputs.case_k]
    got = result.values[:queries].double().cpu().numpy()
    unit = 2.0**-10 if name.endswith("f16") else 2.0**-23
    # Where a floor cut the list the oracle has no more to say.
    best = np.where(np.isfinite(best), best, np.minimum(got, best))
    known = np.isfinite(best)
    allowed = np.full(got.shape, 4 * unit * math.sqrt(inputs.q.shape[1]))
    return worst(np.where(known, got, 0), np.where(known, best, 0), allowed)


def worst(got, expected, allowed):
    import numpy as np

    error = np.abs(got - expected)
    share = np.where(error == 0, 0, error / np.maximum(allowed, 1e-30))
    at = np.unravel_index(np.argmax(np.nan_to_num(share, nan=np.inf)), share.shape)
    return float(error[at]), float(allowed[at])


def times(torch, function, operands):
    """Seconds of each sample, by events, over sets of operands that outlast the L2; samples and launches in each."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(operand.numel() * operand.element_size() for operand in operands)
    count = max(2, math.ceil(OVERHANG * cache / max(size, 1)) + 1)
    count = max(1, min(count, MOST_BYTES // max(size, 1), 4096))
    sets = [operands] + [[operand.clone() for operand in operands] for _ in range(count - 1)]
    turn = 0

    def sample(launches):
        nonlocal turn
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(launches):
            function(*sets[turn % count])
            turn += 1
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / launches

    sample(3)
    once = sample(3)
    launches = max(1, math.ceil(LEAST / once))
    samples = max(5, min(301, int(SECONDS / (once * launches))))
    return sorted(sample(launches) for _ in range(samples)), launches, count


def quantile(values, share):
    at = share * (len(values) - 1)
    low, high = values[math.floor(at)], values[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))


def row(torch, case, name, seconds, launches, sets, error, device):
    """As `handmill bench --json` has it."""
    version = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    for package in ("triton", "bitsandbytes"):
        if name.lower().startswith(package):
            version += f", {package} {importlib.metadata.version(package)}"
    median = quantile(seconds, 0.5)
    words = dict(word.split("=") for word in case["case"].split())
    return dict(
        kind="peer", op=case["op"], kernel=name, device=device, adapter=torch.cuda.get_device_name(0), driver=None,
        roofline_fraction=None, case=case["case"],
        shape=case.get("shape"), m=int(words.get("M") or words.get("Q") or 1), cold=sets > 1, median_us=1e6 * median,
        p20_us=1e6 * quantile(seconds, 0.2), p80_us=1e6 * quantile(seconds, 0.8), n=len(seconds), launches=launches,
        gb_per_s=case["bytes"] / median / 1e9, tflop_per_s=case["flops"] / median / 1e12, error=error[0],
        tolerance=error[1], error_of="every element of a period", peer=version, act="bf16", bytes=case["bytes"],
        flops=case["flops"], sets=sets)  # fmt: skip


def compare(torch, folder, case, name, place):
    """A function that does the case's work, what it takes, and (error, what is allowed); fails where it is wrong."""
    inputs = Inputs(torch, folder, case, place)
    words = dict(word.split("=") for word in case["case"].split())
    inputs.case_k = int(words.get("K", 0))
    make, check = (topk, check_topk) if case["op"].startswith("cosine_topk") else (product, check_product)
    function, operands = make(inputs, name)
    error = check(inputs, function(*operands), name)
    if not error[0] <= error[1]:
        raise Failed(f"is off by {error[0]:.2e} where {error[1]:.2e} is allowed: no time is told")
    return function, operands, error


def measure(torch, folder, case, name, device):
    """A row of `handmill bench --json`; on the CPU only what was compared."""
    function, operands, error = compare(torch, folder, case, name, "cpu" if device == "cpu" else "cuda")
    if device == "cpu":
        return {"error": error[0], "tolerance": error[1]}
    return row(torch, case, name, *times(torch, function, operands), error, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, metavar="DIR", help="what `handmill bench --save-inputs` wrote")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl", help="append a row for each time")
    parser.add_argument("--device", default="cuda:0", help="the name that Handmill's rows have it under; cpu: no times")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be done")
    args = parser.parse_args()
    try:
        cases = chosen(lines(args.inputs / "inputs.jsonl")) if args.inputs else None
    except Failed as error:
        sys.exit(f"torch_cuda.py: {error}")
    if args.dry_run:
        for case in cases or []:
            print(f"{case['op']} ({case['case']}): {', '.join(plans(case))}")
        if cases is None:
            print("with --inputs: torch.matmul and topk, expanding and multiplying, Triton, bitsandbytes; see --help")
        return
    if cases is None:
        parser.error("give --inputs, or --dry-run")
    try:
        import torch
    except ImportError as missing:
        print(f"torch_cuda.py: {missing}: nothing is compared with torch", file=sys.stderr)
        return
    if args.device != "cpu" and not torch.cuda.is_available():
        print("torch_cuda.py: torch finds no card: nothing is compared with it", file=sys.stderr)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for case in cases:
        for name in plans(case):
            try:
                with torch.inference_mode():
                    found = measure(torch, args.inputs, case, name, args.device)
            except ImportError as missing:
                print(f"{name}: {missing}: left out", file=sys.stderr)
                continue
            # Whatever another library raises on one case takes no other with it.
            except Exception as error:
                said = f"{error}".strip().splitlines() or [type(error).__name__]
                print(f"{name}, {case['op']} ({case['case']}): {said[0][:300]}", file=sys.stderr)
                continue
            if args.device == "cpu":
                told = f"{name:<40} {case['op']:<16} {case['case']:<32}"
                print(f"{told} off by {found['error']:.1e} of {found['tolerance']:.1e}: no time on a CPU", flush=True)
                continue
            print(f"{name:<40} {case['op']:<16} {case['case']:<32} {found['median_us']:>10.1f} us", flush=True)
            if args.record:
                args.record.parent.mkdir(parents=True, exist_ok=True)
                with open(args.record, "a", encoding="utf-8") as out:
                    out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
