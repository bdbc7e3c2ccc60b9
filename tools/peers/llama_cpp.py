#!/usr/bin/env python3
"""Times Handmill and llama.cpp on the same file and token ids, in turn, and prints tokens per second with their ratio.

    pip install --only-binary :all: xllamacpp gguf
    tools/peers/llama_cpp.py [--variants as-is,q4_0,f32] [--rounds 5] [--threads 2] [--record FILE.jsonl]

Two figures: reading a prompt of 512 tokens (prefill, llama.cpp's pp512) and choosing 128 more after one token, the most
probable each time (decode, tg128). A round is Handmill, then llama.cpp, each warmed up first; the medians over rounds
are compared. What both say of the prompt's next token is compared before anything is timed: where they choose
different ones, the run ends with exit code 1. Other work on the machine spoils the figures; the load is recorded.

Variants are made of the model's own values: `q4_0` has the layers' matrices in Q4_0, `f32` has everything in F32. With
4-bit weights llama.cpp rounds activations to 8 bits and Handmill does not, so logits differ by some tenths; in f32 they
differ by some thousandths, as llama.cpp keeps keys and values in f16. Texts chosen part ways where two tokens are close.
llama.cpp is driven through the server inside xllamacpp (llama-cpp-python publishes no wheels), its own clock is read,
and its settings are the defaults: flash attention where it can, weights repacked for the processor.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.dont_write_bytecode = True
try:
    import common
    import gguf  # common.make_variant needs it
    import xllamacpp
except ImportError as missing:
    sys.exit(f"llama_cpp.py: {missing}: pip install --only-binary :all: xllamacpp gguf")

from common import Failed, spread


class Handmill:
    def __init__(self, binary, model, args):
        self.command = [binary, "--model", str(model), "--json", "--rounds", "1"]
        self.command += ["--prefill", str(args.prefill), "--decode", str(args.decode)]
        self.environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}

    def run(self):
        done = subprocess.run(self.command, env=self.environment, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise Failed("handmill's benchmark failed (see above)")
        return json.loads(done.stdout)


class LlamaCpp:
    """llama.cpp's own server over the model, one slot, nothing cached from one request to the next."""

    def __init__(self, model, args):
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.verbosity, params.port = 2 * (args.prefill + args.decode), 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
        params.cache_prompt, params.cache_ram_mib, params.n_ctx_checkpoints = False, 0, 0
        self.server = xllamacpp.Server(params)
        self.args = args

    def ask(self, prompt, tokens, **more):
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        url = self.server.listening_address + "/completion"
        body = json.dumps(body | {"return_tokens": True} | more).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})) as reply:
            return json.load(reply)

    def run(self, ids):
        """Tokens per second of prefill and decode, and the tokens chosen."""
        for _ in range(2):  # the first to warm up
            prefill = self.ask(ids, 1)["timings"]
            decode = self.ask(ids[:1], self.args.decode + 1)
        if prefill["prompt_n"] != len(ids) or len(decode["tokens"]) != self.args.decode + 1:
            raise Failed("llama.cpp did not read or choose as many tokens as it was asked for")
        # The first token comes of the prompt and takes no pass of its own.
        passes = (decode["timings"]["predicted_n"] - 1) / decode["timings"]["predicted_ms"] * 1e3
        return prefill["prompt_n"] / prefill["prompt_ms"] * 1e3, passes, decode["tokens"]


def compare(ours, theirs):
    """Whether both choose the same next token, the two, and how far apart logits in both lists are, relative to it."""
    top = theirs["completion_probabilities"][0]["top_logprobs"]
    a, b = dict(ours["top"]), {entry["id"]: entry["logprob"] for entry in top}
    first, other = ours["top"][0][0], top[0]["id"]
    if first not in b:
        return False, first, other, None
    shared = [abs((a[id] - a[first]) - (b[id] - b[first])) for id in a if id in b]
    return first == other, first, other, max(shared)


def measure(binary, model, variant, args):
    load = common.load()
    handmill, llama = Handmill(binary, model, args), LlamaCpp(model, args)
    samples = {"handmill": ([], []), "llama.cpp": ([], [])}
    first = handmill.run()
    ids = first["ids"]
    equal, ours, theirs, apart = compare(first, llama.ask(ids, 1, n_probs=10))
    if not equal:
        raise Failed(f"{variant}: Handmill goes on with token {ours}, llama.cpp with {theirs}: nothing is timed")
    for turn in range(args.rounds):
        print(f"{variant}: round {turn + 1} of {args.rounds}", file=sys.stderr)
        own = handmill.run()
        *rates, chosen = llama.run(ids)
        for name, pair in [("handmill", [own[key]["median"] for key in ("prefill", "decode")]), ("llama.cpp", rates)]:
            for row, rate in zip(samples[name], pair):
                row.append(rate)
    same = next((i for i, (a, b) in enumerate(zip(own["chosen"], chosen)) if a != b), len(chosen))
    row = {
        "date": common.now(),
        "what": "prefill and decode, tokens/s",
        "model": Path(args.model).name,
        "variant": variant,
        "sha256": common.sha256(model),
        "cpu": own["device"],
        "processor": common.processor(),
        "threads": args.threads,
        "load_before": load,
        "versions": {
            "handmill": own["version"],
            "commit": common.commit(),
            "xllamacpp": importlib.metadata.version("xllamacpp"),
            "llama.cpp": xllamacpp.BUILD_INFO,
            "features": str(xllamacpp.get_system_info()).strip(),
            "system": platform.platform(),
        },
        "first_token": {"id": ours, "equal": True, "largest_logit_difference_of_top_10": apart},
        "same_tokens": f"first {same} of {len(chosen)} chosen",
        "handmill_peak_bytes": own["peak_bytes"],
    }
    for i, (key, count) in enumerate([("prefill", args.prefill), ("decode", args.decode)]):
        mine, other = spread(samples["handmill"][i]), spread(samples["llama.cpp"][i])
        ratio = mine["median"] / other["median"]
        row[key] = {"tokens": count, "handmill": mine, "llama.cpp": other, "ratio": ratio}
    return row


def show(row, rounds):
    print(f"\n{row['model']} ({row['variant']}) on {row['cpu']}, {rounds} rounds")
    first = row["first_token"]
    apart = first["largest_logit_difference_of_top_10"]
    print(f"same next token; logits of the ten best differ by at most {apart:.3f}; {row['same_tokens']} alike\n")
    print(f"{'tokens/s':<14} {'Handmill':>26} {'llama.cpp':>26} {'ratio':>7}")
    for key in ("prefill", "decode"):
        part = row[key]
        text = lambda s: f"{s['median']:.1f} ({s['min']:.1f} to {s['max']:.1f})"
        name = f"{key} {part['tokens']}"
        print(f"{name:<14} {text(part['handmill']):>26} {text(part['llama.cpp']):>26} {part['ratio']:>6.2f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = common.smollm2()
    parser.add_argument("--model", default=model, metavar="FILE", help="a .gguf file; SmolLM2 of tools/fetch_models")
    parser.add_argument("--variants", default="as-is", metavar="LIST", help="of as-is, q4_0, f32, with commas (as-is)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--decode", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl", help="append a line of JSON for each variant")
    args = parser.parse_args()
    variants = args.variants.split(",")
    if unknown := [variant for variant in variants if variant not in ("as-is", "q4_0", "f32")]:
        parser.error(f"--variants {unknown[0]}: give as-is, q4_0 or f32")
    if min(args.rounds, args.threads, args.prefill, args.decode) < 1:
        parser.error("rounds, threads and tokens begin at 1")
    try:
        if not Path(args.model).is_file():
            raise Failed(f"{args.model} is missing: run tools/fetch_models, or give --model")
        binary = common.build("bench", "--no-run", "--bench", "model")
        with tempfile.TemporaryDirectory() as folder:
            for variant in variants:
                model = args.model
                if variant != "as-is":
                    model = Path(folder, variant + ".gguf")
                    common.make_variant(args.model, variant, model)
                row = measure(binary, model, variant, args)
                show(row, args.rounds)
                if args.record:
                    common.append(args.record, row)
                if variant != "as-is":
                    model.unlink()
    except (Failed, OSError) as error:
        sys.exit(f"llama_cpp.py: {error}")


if __name__ == "__main__":
    main()
