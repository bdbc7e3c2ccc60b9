#!/usr/bin/env python3
"""Times Handmill's exact search and faiss on the same vectors, in turn, and prints milliseconds a batch and ratios.

    pip install --only-binary :all: faiss-cpu numpy        (into an environment of its own)
    tools/peers/faiss_topk.py [--corpus X.npy --queries Q.npy] [--rounds 5] [--threads 2] [--record FILE.jsonl]

Without files the corpus is random: unit rows of normal numbers. Before anything is timed every result is compared: the
ids of all of Handmill's formats must be those of numpy's products in f64, ties by the lower row, but where two scores
are within 1e-12; those of faiss in f32 may differ where scores are within 1e-6, and how many of the true hits its
formats of fewer bits find is told. A wrong result ends the run with exit code 1.

faiss is tuned to be exact and fast: IndexFlatIP, and BLAS for any batch (distance_compute_blas_threshold = 1). Its f16
and 8-bit scalar quantizers are timed as they are; numpy is one product and argpartition. A round is Handmill in each
format, then the others, each warmed up and repeated; medians over rounds are compared. Other work on the machine spoils
the figures; the load is recorded.
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
import common
from common import Failed, spread

FORMATS = ["f32", "f16", "i8"]


def random_vectors(count, d, seed):
    import numpy as np

    rows = np.random.default_rng(seed).standard_normal((count, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def true_hits(corpus, queries, k):
    """Ids and f64 scores of the best k + 1: products in f64, rounded to f32, ties by the lower row."""
    import numpy as np

    ids, scores = [], []
    for first in range(0, len(queries), 16):
        products = np.zeros((len(queries[first : first + 16]), len(corpus)))
        for row in range(0, len(corpus), 65536):
            some = corpus[row : row + 65536].astype(np.float64)
            products[:, row : row + 65536] = queries[first : first + 16].astype(np.float64) @ some.T
        for line in products:
            rounded = line.astype(np.float32)
            near = np.flatnonzero(rounded >= np.partition(rounded, -(k + 1))[-(k + 1)])
            order = near[np.lexsort((near, -rounded[near]))][: k + 1]
            ids.append(order)
            scores.append(line[order])
    return np.array(ids), np.array(scores)


class Handmill:
    def __init__(self, binary, files, format, args):
        corpus, queries, folder = files
        self.out = folder / f"ids-{format}.npy", folder / f"scores-{format}.npy"
        self.command = [str(binary), "search", "--corpus", corpus, "--queries", queries, "-k", str(args.k), "--json"]
        self.command += ["--device", "cpu", "--format", format, "--repeat", str(args.repeat)]
        self.command += ["--out-ids", self.out[0], "--out-scores", self.out[1]]
        self.environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}

    def run(self):
        """The report, with the median of the repeats."""
        done = subprocess.run(self.command, env=self.environment, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise Failed("handmill search failed (see above)")
        return json.loads(done.stdout)

    def results(self):
        import numpy as np

        return np.load(self.out[0]), np.load(self.out[1])


class Faiss:
    """An index by inner product of rows held in f32, f16 or 8 bits."""

    def __init__(self, corpus, format, args):
        import faiss

        d = corpus.shape[1]
        if format == "f32":
            self.index = faiss.IndexFlatIP(d)
        else:
            kind = faiss.ScalarQuantizer.QT_fp16 if format == "f16" else faiss.ScalarQuantizer.QT_8bit
            self.index = faiss.IndexScalarQuantizer(d, kind, faiss.METRIC_INNER_PRODUCT)
            self.index.train(corpus)
        self.index.add(corpus)
        self.args = args

    def search(self, queries):
        return self.index.search(queries, self.args.k)


class Numpy:
    def __init__(self, corpus, args):
        self.corpus, self.k = corpus, args.k

    def search(self, queries):
        import numpy as np

        scores = queries @ self.corpus.T
        some = np.argpartition(-scores, self.k, axis=1)[:, : self.k]
        found = np.take_along_axis(scores, some, axis=1)
        order = np.argsort(-found, axis=1)
        return np.take_along_axis(found, order, axis=1), np.take_along_axis(some, order, axis=1)


def repeated(peer, queries, args):
    """The median time of a search in milliseconds, after one to warm up."""
    peer.search(queries)
    times = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        peer.search(queries)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def check_ids(what, ids, truth, scores, apart):
    """Ids must be the true ones but where the score there is within `apart` of another; how many differ."""
    import numpy as np

    k = ids.shape[1]
    gap = np.diff(-scores, axis=1)
    before = np.concatenate([np.full((len(ids), 1), np.inf), gap[:, : k - 1]], axis=1)
    near = np.minimum(before, gap[:, :k]) <= apart
    wrong = (ids != truth[:, :k]) & ~near
    if wrong.any():
        query, place = np.argwhere(wrong)[0]
        found, true = ids[query, place], truth[query, place]
        raise Failed(f"{what}: query {query} has row {found} in place {place}, not {true}: nothing is timed")
    return int((ids != truth[:, :k]).sum())


def measure(binary, args):
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(args.threads)
    faiss.cvar.distance_compute_blas_threshold = 1
    load = common.load()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        corpus_path, queries_path = args.corpus, args.queries
        if corpus_path is None:
            corpus_path, queries_path = folder / "corpus.npy", folder / "queries.npy"
            np.save(corpus_path, random_vectors(args.rows, args.d, 1))
            np.save(queries_path, random_vectors(args.batch, args.d, 2))
        corpus, queries = np.load(corpus_path), np.load(queries_path)[: args.batch]
        if corpus.dtype != np.float32 or queries.dtype != np.float32:
            raise Failed("corpus and queries must be f32")
        for what, rows in [("corpus", corpus), ("queries", queries)]:
            if np.abs(np.linalg.norm(rows.astype(np.float64), axis=1) - 1).max() > 6e-5:
                raise Failed(f"{what}: rows must be of unit norm, so that all hold the same numbers")
        np.save(folder / "batch.npy", queries)
        files = str(corpus_path), str(folder / "batch.npy"), folder

        ours = {format: Handmill(binary, files, format, args) for format in FORMATS}
        peers = {f"faiss {format}": Faiss(corpus, format, args) for format in FORMATS}
        peers["numpy"] = Numpy(corpus, args)
        truth, scores = true_hits(corpus, queries, args.k)
        half = corpus.astype(np.float16).astype(np.float32)
        of_half = true_hits(half, queries, args.k)
        reports, checks = {}, {}
        for format, handmill in ours.items():
            reports[format] = handmill.run()
            expected = of_half if format == "f16" else (truth, scores)
            ids, found = handmill.results()
            checks[format] = check_ids(f"handmill {format}", ids, *expected, 1e-12)
            if np.abs(found - expected[1][:, : args.k]).max() > 1e-7:
                raise Failed(f"handmill {format}: scores are off: nothing is timed")
        checks["faiss f32"] = check_ids("faiss f32", peers["faiss f32"].search(queries)[1], truth, scores, 1e-6)
        recall = {}
        for name, peer in peers.items():
            ids = peer.search(queries)[1]
            same = [len(set(a) & set(b)) for a, b in zip(ids.tolist(), truth[:, : args.k].tolist())]
            recall[name] = sum(same) / (len(queries) * args.k)

        samples = {f"handmill {format}": [] for format in FORMATS} | {name: [] for name in peers}
        for turn in range(args.rounds):
            print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
            for format, handmill in ours.items():
                samples[f"handmill {format}"].append(handmill.run()["ms_per_batch"])
            for name, peer in peers.items():
                samples[name].append(repeated(peer, queries, args))
    base = statistics.median(samples["faiss f32"])
    return {
        "date": common.now(),
        "what": "exact top-k of a batch, ms",
        "corpus": args.name or (Path(args.corpus).name if args.corpus else "random"),
        "n": len(corpus),
        "d": corpus.shape[1],
        "queries": len(queries),
        "k": args.k,
        "processor": common.processor(),
        "threads": args.threads,
        "load_before": load,
        "versions": {
            "commit": common.commit(),
            "faiss": importlib.metadata.version("faiss-cpu"),
            "faiss_options": faiss.get_compile_options().strip(),
            "numpy": importlib.metadata.version("numpy"),
            "system": platform.platform(),
        },
        "ids_that_differ": checks,
        "recall": recall,
        "effort": {f: {key: reports[f][key] for key in ("scored", "widened", "exhausted")} for f in FORMATS},
        "ms": {name: spread(times) | {"faiss_f32_over_it": base / statistics.median(times)} for name, times in samples.items()},
    }


def show(row):
    print(f"\n{row['queries']} queries, {row['n']} rows of {row['d']} ({row['corpus']}), k {row['k']}, ", end="")
    print(f"{row['threads']} threads, {row['processor']}\n")
    print(f"{'ms a batch':<14} {'median (least to most)':>26} {'faiss f32 / it':>15} {'true hits':>10}")
    for name, times in row["ms"].items():
        text = f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"
        share = f"{row['recall'].get(name, 1.0):.2%}"
        print(f"{name:<14} {text:>26} {times['faiss_f32_over_it']:>14.2f}x {share:>10}")
    for format, effort in row["effort"].items():
        print(f"handmill {format}: {effort['scored']} scores in f64, {effort['widened']} queries scanned twice")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", metavar="X.npy", help="unit rows, f32")
    parser.add_argument("--queries", metavar="Q.npy", help="unit rows, f32; the first --batch are taken")
    parser.add_argument("--name", help="what the corpus is, for the record")
    parser.add_argument("--rows", type=int, default=100_000, help="of a random corpus")
    parser.add_argument("--d", type=int, default=384, help="elements of its rows")
    parser.add_argument("--batch", type=int, default=64, metavar="QUERIES")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=20, help="searches in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--binary", type=Path, help="a built handmill, not to build it here")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl", help="append a line of JSON")
    args = parser.parse_args()
    if (args.corpus is None) != (args.queries is None):
        parser.error("give --corpus and --queries together")
    if min(args.rows, args.d, args.batch, args.k, args.rounds, args.repeat, args.threads) < 1:
        parser.error("counts begin at 1")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # read when numpy and faiss are imported
    try:
        import faiss  # noqa: F401
    except ImportError as missing:
        sys.exit(f"faiss_topk.py: {missing}: pip install --only-binary :all: faiss-cpu numpy")
    try:
        binary = args.binary.resolve() if args.binary else common.build("build", "--release", "--bin", "handmill")
        row = measure(binary, args)
        show(row)
        if args.record:
            common.append(args.record, row)
    except (Failed, OSError) as error:
        sys.exit(f"faiss_topk.py: {error}")


if __name__ == "__main__":
    main()
