"""How long training waits for its data: the quickstart's model over a stream, and over text prepared as a whole.

    python -m benchmarks.speed.data FOLDER [--steps 150] [--processes 2]

The packaged film reviews are written to FOLDER in C4's layout (`c4-train.*.json.gz`), and
`examples/pretrain_llama.py` is run on them both ways, under torchrun. Printed per run: the share of the training time
that the process which waited longest spent waiting for its next batch, and tokens per second. First it prints what a
stream gives on one core when nothing else runs, and what another Python thread loses by it meanwhile: at the smaller
rate of a training, that share is smaller as much.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from pretraining.loader import Loader
from pretraining.sources import open_source
from pretraining.streaming import LaneRecipe, StreamRows
from pretraining.tokenization import Encoder, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FILES = 8
VALIDATION_DOCUMENTS = 200
SEQ_LENGTH = 128


def write_reviews(folder: Path) -> list[str]:
    """The packaged reviews in C4's layout, unless they are there; returns their texts."""
    texts = list(open_source(None).train.read_all())
    folder.mkdir(parents=True, exist_ok=True)
    parts = {f"c4-train.{index:05d}-of-{FILES:05d}.json.gz": texts[index::FILES] for index in range(FILES)}
    parts["c4-validation.00000-of-00001.json.gz"] = texts[:VALIDATION_DOCUMENTS]
    for name, part in parts.items():
        if not (folder / name).exists():
            with gzip.open(folder / name, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text, "url": ""}) + "\n" for text in part)
    return texts


def stream_alone(folder: Path, texts: list[str], seconds: float) -> tuple[float, float]:
    """Tokens per second of one rank's stream on one core, and the share of its time that it keeps Python from others.

    The second is what a thread that only counts loses by the stream beside it, where a core is free for each.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    recipe = LaneRecipe(
        documents=open_source(str(folder)).train,
        encoder=Encoder(train_tokenizer(texts[:2000], 4096)),
        seq_length=SEQ_LENGTH,
        seed=0,
        lanes=1,
        block_rows=1024,
    )

    def count(stop: threading.Event) -> float:
        counted, began = 0, time.perf_counter()
        while not stop.is_set():
            counted += 1
        return counted / (time.perf_counter() - began)

    def count_for(seconds: float) -> float:
        stop = threading.Event()
        threading.Timer(seconds, stop.set).start()
        return count(stop)

    alone = count_for(seconds)
    rows = StreamRows(recipe, {}, 0, 1)
    rows.batch_size = 8
    batches = Loader(rows, depth=16)
    batches.get()
    began, taken = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        taken += batches.get()[0].numel()
    rate = taken / (time.perf_counter() - began)
    # The consumer waits while this thread counts, as the device does in training.
    drain_stop = threading.Event()

    def drain() -> None:
        while not drain_stop.is_set():
            batches.get()

    drainer = threading.Thread(target=drain)
    drainer.start()
    beside = count_for(seconds)
    drain_stop.set()
    drainer.join()
    batches.close()
    del os.environ["TOKENIZERS_PARALLELISM"]
    return rate, 1 - beside / alone


def train(folder: Path, output: Path, steps: int, processes: int, streaming: bool) -> dict[str, float]:
    """Run the example; returns its summary."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "examples" / "pretrain_llama.py"), "--data", str(folder), "--steps", str(steps)]
    command += ["--streaming" if streaming else "--no-streaming", "--output-dir", str(output)]
    command += ["--cache-dir", str(output.parent / "cache"), "--eval-batches", "1", "--eval-every", str(steps)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "summary.json").read_text())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the measurement without training")
    args = parser.parse_args()
    corpus = args.folder / "c4"
    texts = write_reviews(corpus)
    rate, lock = stream_alone(corpus, texts, args.seconds)
    print(f"the stream alone, on one core: {rate:,.0f} tokens/s; a counting thread beside it loses {lock:.1%}")
    for streaming in (True, False):
        name = "stream" if streaming else "whole"
        summary = train(corpus, args.folder / name, args.steps, args.processes, streaming)
        print(f"{name:8}{summary['data_wait_share']:9.3%} waiting {summary['tokens_per_second']:9,.0f} tokens/s")


if __name__ == "__main__":
    main()
