"""python -m benchmarks.start: seconds from launch to the first forward, one rank of 7, 8B shapes.

Writes a checkpoint of that shape whose files have no content (holes, read as zeros), then starts
as `minilora.train` does: checks, partitions, reads its part, initialises DeepSpeed, and computes
one forward and backward of a few tokens. Collectives are torch's fake ones. Prints a JSON line.
The second run finds the files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.meters import Pretended
from benchmarks.report import versions
from benchmarks.workloads import SIZES, Size
from minilora.data.steps import Span
from minilora.processes.startup_times import StartupTimes
from minilora.settings.command_line import read_settings
from minilora.training.checks import check
from minilora.training.engine import Engine

SHARD = 5 * 10**9  # bytes of a file at most, as the hub splits them


def write_holes(folder: Path, size: Size) -> None:
    """A checkpoint of zeros that takes no room on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(size.config()), encoding="utf-8")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in size.shape.parameter_shapes().items():
        count = 2 * math.prod(shape)
        if filled + count > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += count
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        path, header, end = folder / f"model-{index:05}.safetensors", {}, 0
        for name, shape in shard.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.start", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="8b")
    parser.add_argument("--ranks", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/minilora-holes"))
    return parser.parse_args(argv)


def main() -> None:
    own = read(None)
    phases, folder = StartupTimes(), own.folder / own.size
    phases.finished("imports")
    if not (folder / "model.safetensors.index.json").exists():
        write_holes(folder, SIZES[own.size])
        phases.finished("(writing holes)")
    words = [f"--model_name_or_path={folder}", "--dataset=none", "--bf16=true", "--lora_rank=16"]
    words += [f"--output_dir={own.folder / 'run'}", "--overwrite_output_dir=true"]
    settings = read_settings([*words, "--keep_blocks=0"], "train")
    world = Pretended(own.ranks, own.device)
    phases.finished("processes")
    request = check(settings)
    asked, _ = request.asked_way(own.ranks)
    phases.finished("checks")
    engine = Engine(world, request.recipe(asked.job), phases)
    ready = sum(phases.seconds.values()) - phases.seconds.get("(writing holes)", 0.0)
    ids = torch.arange(8)
    engine.forward_backward(Span(ids, ids, ((8,),), 0), 1.0, last=True)
    if own.device == "cuda":
        torch.cuda.synchronize()
    phases.finished("first forward and backward")
    total = request.checkpoint.total_bytes
    found = {"seconds_to_first_forward": ready, "phases": phases.seconds, "ranks": own.ranks}
    found |= {"read": engine.bytes_read, "of": total, "share": engine.bytes_read / total}
    print(json.dumps({**versions(), "size": own.size, "device": own.device, **found}))


if __name__ == "__main__":
    main()
