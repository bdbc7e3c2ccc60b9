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
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

try:
    import gguf
    import xllamacpp
except ImportError as missing:
    sys.exit(f"llama_cpp.py: {missing}: pip install --only-binary :all: xllamacpp gguf")

ROOT = Path(__file__).resolve().parents[2]
BUSY = 0.3  # load of the machine above which its figures should not be quoted


class Failed(Exception):
    """Told in one sentence; exit code 1."""


def make_variant(source, variant, path):
    """Writes the model at `source` with matrices in another type; values come from the file's own."""
    kinds = gguf.GGMLQuantizationType
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if variant == "f32" and kind != kinds.F32:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, kind))
        elif variant == "q4_0" and tensor.name.startswith("blk.") and kind != kinds.F32:
            values = gguf.quants.dequantize(tensor.data, kind)
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kinds.Q4_0), raw_dtype=kinds.Q4_0)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build():
    """Handmill's benchmark of a whole model."""
    command = ["cargo", "bench", "--locked", "--bench", "model", "--no-run"]
    command += ["--message-format", "json-render-diagnostics"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Failed("the benchmark does not build (see above)")
    messages = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    paths = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "model"]
    return paths[-1]


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


def processor():
    """The name the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit():
    """Of this checkout, with a plus where files are changed; none outside a repository."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "-uno").stdout.strip() else "")


def spread(samples):
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "samples": samples}


def measure(binary, model, variant, args):
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"the machine is busy (load {load:.2f}): do not quote these figures", file=sys.stderr)
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
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "what": "prefill and decode, tokens/s",
        "model": Path(args.model).name,
        "variant": variant,
        "sha256": hashlib.sha256(Path(model).read_bytes()).hexdigest(),
        "cpu": own["device"],
        "processor": processor(),
        "threads": args.threads,
        "load_before": load,
        "versions": {
            "handmill": own["version"],
            "commit": commit(),
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
    models = os.environ.get("HANDMILL_MODELS") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "handmill/models"
    )
    default = Path(models, "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default, metavar="FILE", help="a .gguf file; SmolLM2 of tools/fetch_models")
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
        binary = build()
        with tempfile.TemporaryDirectory() as folder:
            for variant in variants:
                model = args.model
                if variant != "as-is":
                    model = Path(folder, variant + ".gguf")
                    make_variant(args.model, variant, model)
                row = measure(binary, model, variant, args)
                show(row, args.rounds)
                if args.record:
                    args.record.parent.mkdir(parents=True, exist_ok=True)
                    with open(args.record, "a", encoding="utf-8") as f:
                        f.write(json.dumps(row) + "\n")
                if variant != "as-is":
                    model.unlink()
    except (Failed, OSError) as error:
        sys.exit(f"llama_cpp.py: {error}")


if __name__ == "__main__":
    main()
