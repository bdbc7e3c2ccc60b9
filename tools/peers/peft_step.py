#!/usr/bin/env python3
"""Times steps of a LoRA fine-tune by Handmill and by PEFT from the same start, in turn, and prints their ratio.

    python3 -m venv VENV && VENV/bin/pip install torch transformers peft gguf safetensors accelerate
    VENV/bin/python tools/peers/peft_step.py [--arms as-is,f32,nf4] [--rounds 5] [--steps 12] [--record FILE.jsonl]

A step is one row of 256 tokens forth, back and through AdamW: r 8, alpha 16, all seven projections, every activation
kept, nothing compiled. PEFT runs transformers in f32 over the values that the file's weights stand for, with fused
AdamW, its model's defaults otherwise. Handmill runs its weights as they are packed (`as-is`), the same values in f32
(`f32`), and quantized (`nf4`). A round is each of them, then PEFT, all from one adapter drawn here; what the first
steps of a process take is left out. Medians of each round's steps are compared by their medians over rounds.

Losses are compared before times are told: one step's must agree to 5e-5 and twenty's to 5e-3, as tests/train/peft.rs
has them; of nf4 the difference is told. Other work on the machine spoils the figures; the load is recorded.
Memory is the most that each process held, and for PEFT also the most while it trained, without loading.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
try:
    import common
    import gguf  # common.make_variant needs it
    from safetensors import numpy as safetensors
except ImportError as missing:
    sys.exit(f"peft_step.py: {missing}: pip install torch transformers peft gguf safetensors accelerate")

from common import ROOT, Failed, spread

TEXT = ROOT / "tests/fixtures/smollm2_transformers_fp32.safetensors"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATE, DECAY = 8, 16, 1e-3, 0.01
WINDOWS, TOKENS, MASKED = 4, 256, 32
WARM = 2  # steps of a process that are not timed
# The first step's losses differ by roundings of 30 layers; AdamW makes those of later ones grow.
CLOSE, LATER, QUANTIZED = 5e-5, 5e-3, 0.5


def rows():
    """Windows of the text, the first tokens of each not predicted."""
    ids = safetensors.load_file(TEXT)["ppl.ids"].tolist()
    windows = [ids[TOKENS * k : TOKENS * (k + 1)] for k in range(WINDOWS)]
    return [{"input_ids": ids, "labels": [-100] * MASKED + ids[MASKED:]} for ids in windows]


def memory(field):
    """Bytes of this process, as the system counts them; none where it does not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return None


def work(model, start, threads):
    """The process that is PEFT: writes the adapter to begin with, then trains when told so, a line of JSON each."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = Path(model)
    base = transformers.AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    base.config.use_cache = False
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    network = peft.get_peft_model(base, config)
    torch.manual_seed(1234)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            p.normal_(0, p.shape[1] ** -0.5 if "lora_A" in name else 0.01)
    network.save_pretrained(start)
    first = {name: p.detach().clone() for name, p in trained.items()}
    batches = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows()]
    network.train()
    loaded = memory("VmHWM")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at what is held now
    except OSError:
        pass
    names = ("torch", "transformers", "peft", "gguf")
    versions = {name: importlib.metadata.version(name) for name in names}
    cpu = torch.backends.cpu.get_cpu_capability()
    about = {"versions": versions, "cpu": cpu, "parameters": sum(p.numel() for p in trained.values())}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(first[name])
                p.grad = None
        optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=DECAY, eps=1e-8, fused=True)
        losses, seconds = [], []
        for step in range(int(line)):
            began = time.perf_counter()
            loss = network(**batches[step % WINDOWS]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
        peak = memory("VmHWM")
        done = {"losses": losses, "seconds": seconds, "peak": peak, "whole": max(loaded or 0, peak or 0)}
        print(json.dumps(done), flush=True)


class Peft:
    def __init__(self, model, start, args):
        command = [sys.executable, __file__, "--worker", str(model), str(start), str(args.threads)]
        quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        environment = os.environ | quiet | {"OMP_NUM_THREADS": str(args.threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed("PEFT's process ended (see above)")
        return json.loads(line)

    def run(self, steps):
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        done = self.answer()
        rate = TOKENS / statistics.median(done["seconds"][WARM:])
        return rate, done["losses"], {"training": done["peak"], "process": done["whole"]}

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Handmill:
    def __init__(self, binary, model, words, start, folder, args):
        self.out = Path(folder, "run")
        data = Path(folder, "rows.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        self.command = [binary, "finetune", "--device", "cpu", "--model", model, "--data", data, "--out", self.out]
        self.command += ["--adapter-init", start, "--steps", args.steps, "--save-every", args.steps, "--no-shuffle"]
        self.command += ["--restart", "--lr", RATE, "--weight-decay", DECAY, "--max-len", TOKENS, *words]
        self.environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}

    def run(self, steps):
        command = [str(word) for word in self.command]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"handmill finetune failed:\n{done.stderr}")
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        if [line["tokens"] for line in lines] != [TOKENS] * steps:
            raise Failed("handmill trained on other rows than it was given")
        rate = statistics.median(line["tokens_per_s"] for line in lines[WARM:])
        return rate, [line["loss"] for line in lines], {"process": lines[-1]["peak_bytes"]}


def compare(arm, ours, theirs):
    """How far the losses are apart, at the first step and at most; an error where they tell of different work."""
    apart = [abs(a - b) for a, b in zip(ours, theirs)]
    first, most = apart[0], max(apart)
    limits = (QUANTIZED, QUANTIZED) if arm == "nf4" else (CLOSE, LATER)
    if not (first < limits[0] and most < limits[1]):
        what = f"{arm}: Handmill's losses {ours[0]:.6f} .. {ours[-1]:.6f}, PEFT's {theirs[0]:.6f} .. {theirs[-1]:.6f}"
        raise Failed(f"{what}: nothing is told of times")
    return {"first_step": first, "largest": most}


def measure(binary, args, folder):
    load = common.load()
    start = Path(folder, "start")
    peft = Peft(args.model, start, args)
    arms = {}
    for arm in args.arms:
        model, place = args.model, Path(folder, arm)
        place.mkdir()
        if arm == "f32":
            model = place / "f32.gguf"
            common.make_variant(args.model, "f32", model)
        words = ["--quant", "nf4"] if arm == "nf4" else []
        arms[arm] = Handmill(binary, model, words, start, place, args)
    arms["PEFT"] = peft
    rates, losses, peaks = {arm: [] for arm in arms}, {}, {}
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
        for arm, runner in arms.items():
            rate, losses[arm], peaks[arm] = runner.run(args.steps)
            rates[arm].append(rate)
        apart = {arm: compare(arm, losses[arm], losses["PEFT"]) for arm in args.arms}
    peft.close()
    row = {
        "date": common.now(),
        "what": "LoRA step of 1x256 tokens, tokens/s",
        "model": args.model.name,
        "sha256": common.sha256(args.model),
        "processor": common.processor(),
        "threads": args.threads,
        "load_before": load,
        "steps": args.steps,
        "parameters": peft.about["parameters"],
        "versions": {
            "handmill": subprocess.run([binary, "--version"], capture_output=True, text=True).stdout.split()[-1],
            "commit": None if args.handmill else common.commit(),  # of a program given, nothing is known
            **peft.about["versions"],
            "torch_cpu": peft.about["cpu"],
            "system": platform.platform(),
        },
        "losses_apart": apart,
        "loss": {arm: [losses[arm][0], losses[arm][-1]] for arm in arms},
        "peak_bytes": peaks,
        "tokens_per_s": {arm: spread(rates[arm]) for arm in arms},
    }
    median = {arm: row["tokens_per_s"][arm]["median"] for arm in arms}
    row["times_peft"] = {arm: median[arm] / median["PEFT"] for arm in args.arms}
    if "nf4" in arms:
        row["nf4_step_time"] = {arm: median[arm] / median["nf4"] for arm in args.arms if arm != "nf4"}
    return row


def show(row):
    print(f"\n{row['model']}, LoRA steps of 1x256 tokens, {row['threads']} threads, on {row['processor']}")
    print(f"\n{'':<14} {'tokens/s':>26} {'x PEFT':>7} {'peak MB':>8} {'loss, first':>12} {'apart':>9}")
    for arm, rate in row["tokens_per_s"].items():
        text = f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})"
        peak = row["peak_bytes"][arm].get("training") or row["peak_bytes"][arm]["process"] or 0
        times, apart = row["times_peft"].get(arm), row["losses_apart"].get(arm)
        name = arm if arm == "PEFT" else f"Handmill {arm}"
        tail = f"{apart['first_step']:>9.1e}" if apart else ""
        times = f"{times:.2f}x" if times else ""
        print(f"{name:<14} {text:>26} {times:>7} {peak / 1e6:>8.0f} {row['loss'][arm][0]:>12.6f} {tail}")
    for arm, ratio in row.get("nf4_step_time", {}).items():
        print(f"a step in nf4 takes {ratio:.2f} times one {arm}")


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=common.smollm2(), metavar="FILE", help="SmolLM2's .gguf file")
    parser.add_argument("--handmill", metavar="FILE", help="the tool; without it, it is built for release")
    parser.add_argument("--arms", default="as-is,f32,nf4", metavar="LIST", help="of as-is, f32, nf4, with commas (all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help=f"of a round; the first {WARM} are not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl", help="append a line of JSON")
    args = parser.parse_args()
    args.arms = args.arms.split(",")
    if unknown := [arm for arm in args.arms if arm not in ("as-is", "f32", "nf4")]:
        parser.error(f"--arms {unknown[0]}: give as-is, f32 or nf4")
    if min(args.rounds, args.threads) < 1 or not WARM < args.steps <= 20:
        parser.error(f"rounds and threads begin at 1, steps are {WARM + 1} to 20")
    try:
        if not args.model.is_file():
            raise Failed(f"{args.model} is missing: run tools/fetch_models, or give --model")
        binary = args.handmill or common.build("build", "--release", "--bin", "handmill")
        with tempfile.TemporaryDirectory() as folder:
            row = measure(binary, args, folder)
        show(row)
        if args.record:
            common.append(args.record, row)
    except (Failed, OSError) as error:
        sys.exit(f"peft_step.py: {error}")
    except KeyboardInterrupt:
        sys.exit("peft_step.py: stopped")


if __name__ == "__main__":
    main()
