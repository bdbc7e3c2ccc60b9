"""What the peers' timings share: variants of a model, what a record tells of the machine, samples and their spread."""

import datetime
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUSY = 0.3  # load of the machine above which its figures should not be quoted


class Failed(Exception):
    """Told in one sentence; exit code 1."""


def smollm2():
    """Where tools/fetch_models puts it."""
    models = os.environ.get("HANDMILL_MODELS") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "handmill/models"
    )
    return Path(models, "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def make_variant(source, variant, path):
    """Writes the model at `source` with matrices in another type; values come from the file's own."""
    import gguf

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


def build(*words):
    """Builds with cargo and returns the path of the one program that `words` ask for."""
    command = ["cargo", *words, "--locked", "--message-format", "json-render-diagnostics"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Failed(f"`{' '.join(command[:3])}` does not build (see above)")
    messages = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    paths = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == words[-1]]
    return paths[-1]


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


def load():
    """The machine's load, with a warning where it is too high for figures that are to be quoted."""
    now = os.getloadavg()[0]
    if now > BUSY:
        print(f"the machine is busy (load {now:.2f}): do not quote these figures", file=sys.stderr)
    return now


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def spread(samples):
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "samples": samples}


def append(path, row):
    """A line of JSON more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
