#!/usr/bin/env python3
"""Times steps of a LoRA fine-tune by PEFT on a card, then Handmill's from the same adapter; losses are compared first.

    peft_cuda.py --handmill PROGRAM --model DIR --data ROWS.jsonl [--device cuda:0] [--record FILE.jsonl]

DIR is a Hugging Face directory, a row of the data {"input_ids": [..], "labels": [..]}, all as long. A step is one row
forth, back and through AdamW: r 8, alpha 16, all seven projections, f32 without TF32, nothing compiled; once over the
weights as they are, and once over them in nf4 where bitsandbytes is installed. The first steps are not timed. Losses
must agree to 5e-5 at the first step and 5e-3 later (in nf4 to 1e-3 and 1e-2: a weight in the middle between two levels
may become either), or no time is told. `--device cpu` runs both on the CPU. Without torch, transformers, peft or a
card it says so, claims nothing and ends with exit code 0.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.dont_write_bytecode = True
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATE, DECAY = 8, 16, 1e-3, 0.01
WARM = 2  # steps that are not timed
LIMITS = {"f32": (5e-5, 5e-3), "nf4": (1e-3, 1e-2)}


class Failed(Exception):
    """Told in one sentence."""


def read(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows or any(len(row["input_ids"]) != len(rows[0]["input_ids"]) for row in rows):
        raise Failed(f"{path}: rows must be as long as one another")
    return rows


def peft_steps(args, arm, rows, start):
    """Losses and seconds of each step by PEFT; draws and saves the adapter to begin with where it is not there yet."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    place = "cpu" if args.device == "cpu" else "cuda"
    more = {}
    if arm == "nf4":
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, device_map=place, **more)
    base.config.use_cache = False
    if (start / "adapter_config.json").is_file():
        network = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    else:
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS,
                                 task_type="CAUSAL_LM")  # fmt: skip
        network = peft.get_peft_model(base, config)
        torch.manual_seed(1234)
        with torch.no_grad():
            for name, p in network.named_parameters():
                if p.requires_grad:
                    p.normal_(0, p.shape[1] ** -0.5 if "lora_A" in name else 0.01)
        network.save_pretrained(start)
    trained = [p for p in network.parameters() if p.requires_grad]
    batches = [{key: torch.tensor([row[key]], device=place) for key in ("input_ids", "labels")} for row in rows]
    network.train()
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY, eps=1e-8, fused=True)
    losses, seconds = [], []
    for step in range(args.steps):
        began = time.perf_counter()
        loss = network(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Waits for the card.
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    del network, base, optimizer, trained
    gc.collect()
    if place == "cuda":
        torch.cuda.empty_cache()
    return losses, seconds


def handmill_steps(args, arm, start, out):
    """The same by Handmill."""
    command = [args.handmill, "finetune", "--device", args.device, "--model", args.model, "--data", args.data]
    command += ["--out", out, "--adapter-init", start, "--steps", args.steps, "--save-every", args.steps]
    command += ["--no-shuffle", "--restart", "--lr", RATE, "--weight-decay", DECAY, "--max-len", 4096]
    command += ["--quant", "nf4"] if arm == "nf4" else []
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False)  # fmt: skip
    if done.returncode != 0:
        raise Failed(f"handmill finetune: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines], [line["tokens"] / line["tokens_per_s"] for line in lines]


def apart(arm, ours, theirs):
    """How far the losses are from each other, first and at most; an error where they tell of different work."""
    if len(ours) != len(theirs):
        raise Failed(f"{arm}: Handmill took {len(ours)} steps, PEFT {len(theirs)}")
    each = [abs(a - b) for a, b in zip(ours, theirs)]
    if not (each[0] < LIMITS[arm][0] and max(each) < LIMITS[arm][1]):
        what = f"{arm}: Handmill's losses {ours[0]:.6f} .. {ours[-1]:.6f}, PEFT's {theirs[0]:.6f} .. {theirs[-1]:.6f}"
        raise Failed(f"{what}: nothing is told of times")
    return {"first_step": each[0], "largest": max(each)}


def spread(tokens, seconds):
    rates = [tokens / second for second in seconds[WARM:]]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "samples": rates}


def measure(args, packages):
    import torch

    rows = read(args.data)
    tokens = len(rows[0]["input_ids"])
    rates, distances, losses = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start")
        for arm in ["f32", "nf4"]:
            if arm == "nf4" and "bitsandbytes" not in packages:
                print("peft_cuda.py: without bitsandbytes nothing is compared in nf4", file=sys.stderr)
                continue
            # Whatever another library raises takes no other arm with it.
            try:
                theirs, their_seconds = peft_steps(args, arm, rows, start)
                ours, our_seconds = handmill_steps(args, arm, start, Path(folder, arm))
                distances[arm] = apart(arm, ours, theirs)
            except Exception as error:
                said = f"{error}".strip().splitlines() or [type(error).__name__]
                print(f"peft_cuda.py: {arm}: {said[0][:300]}", file=sys.stderr)
                continue
            losses[arm] = {"handmill": ours, "PEFT": theirs}
            rates[f"handmill {arm}"], rates[f"PEFT {arm}"] = spread(tokens, our_seconds), spread(tokens, their_seconds)
    if not rates:
        return None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "what": f"LoRA step of 1x{tokens} tokens, tokens/s",
        "model": args.name or args.model.name,
        "processor": "CPU" if args.device == "cpu" else torch.cuda.get_device_name(0),
        "device": args.device,
        "steps": args.steps,
        "versions": {**packages, "CUDA": torch.version.cuda},
        "losses_apart": distances,
        "losses": losses,
        "tokens_per_s": rates,
    }


def installed():
    """Versions of what this needs; an error names what is missing."""
    found = {}
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as missing:
            if package != "bitsandbytes":
                raise Failed(f"{package} is not installed: nothing is compared with PEFT") from missing
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--handmill", required=True, metavar="PROGRAM")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data", required=True, type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--device", default="cuda:0", help="as Handmill names it")
    parser.add_argument("--steps", type=int, default=12, help=f"the first {WARM} are not timed")
    parser.add_argument("--name", help="what the record calls the model")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl", help="append a line of JSON")
    args = parser.parse_args()
    if not WARM < args.steps <= 20:
        parser.error(f"--steps is {WARM + 1} to 20")
    warnings.filterwarnings("ignore")  # other libraries' of their own futures
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        packages = installed()
        import torch

        if args.device != "cpu" and not torch.cuda.is_available():
            raise Failed("torch finds no card: nothing is compared with PEFT")
    except (Failed, ImportError) as error:
        print(f"peft_cuda.py: {error}", file=sys.stderr)
        return
    try:
        row = measure(args, packages)
    except (Failed, OSError, ValueError, KeyError) as error:
        sys.exit(f"peft_cuda.py: {error}")
    if row is None:
        sys.exit(1)
    for name, rate in row["tokens_per_s"].items():
        print(f"{name:<16} {rate['median']:>10.1f} tokens/s ({rate['min']:.1f} to {rate['max']:.1f})", flush=True)
    for arm, distance in row["losses_apart"].items():
        print(f"{arm}: losses {distance['first_step']:.1e} apart at the first step, {distance['largest']:.1e} at most")
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        with open(args.record, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
