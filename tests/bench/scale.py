"""A merge at published sizes, within the memory of a laptop: what it takes, and whether it ends.

    python -m tests.bench.scale --out FOLDER --target 1b --source 8b --what reconstruct --limit 16
    python -m tests.bench.scale --out FOLDER --target 1b --source 3b --what weights --limit 6
    python -m tests.bench.scale --out FOLDER --target 1b --source 8b --what task-vector --limit 8
    python -m tests.bench.scale --out FOLDER --target small --source medium --layers 32 --what task-vector --limit 16

The last is one point of a curve over layers, of models narrow enough to be made deep; the target has half as many.

Weights are random, in the shapes of Llama 3.2 1B and 3B and of Llama 3.1 8B, in bfloat16, written a layer at a time;
the target's are cut out of the source's, so that there is something to be found; what a source learned is noise of a
tenth of the weights' size on all that is between its ends. The merge runs as a process of its own
in a control group (version 1 or 2; needs root) of so many gigabytes, which count the pages of files too. Room on the
disk is asked for first; models that are there are kept. What was measured goes to ``FOLDER/results.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from tests.pico import pico_tokenizer
from tmerge.quantities import bytes_words

GIGABYTE = 10**9


@dataclass(frozen=True)
class Shape:
    """Of a llama."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    tie_word_embeddings: bool
    num_key_value_heads: int = 8
    vocab_size: int = 128256

    @property
    def parameters(self) -> int:
        """All of them, but for the norms'."""
        attention = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (attention + 3 * self.intermediate_size)
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + ends


SHAPES = {
    "small": Shape(512, 8, 8, 64, 1408, True, vocab_size=32000),
    "medium": Shape(1024, 16, 16, 64, 2816, True, vocab_size=32000),
    "1b": Shape(2048, 16, 32, 64, 8192, True),
    "3b": Shape(3072, 28, 24, 128, 8192, True),
    "8b": Shape(4096, 32, 32, 128, 14336, False),
}


def write_source(folder: Path, shape: Shape, seed: int) -> None:
    """Random weights, a file a layer."""
    draw = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return (0.02 * torch.randn(rows, columns, generator=draw)).bfloat16()

    n, q, kv = shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (q, n),
        "self_attn.k_proj": (kv, n),
        "self_attn.v_proj": (kv, n),
        "self_attn.o_proj": (n, q),
        "mlp.gate_proj": (shape.intermediate_size, n),
        "mlp.up_proj": (shape.intermediate_size, n),
        "mlp.down_proj": (n, shape.intermediate_size),
    }

    def layers() -> Iterator[dict[str, Tensor]]:
        for layer in range(shape.num_hidden_layers):
            yield {f"model.layers.{layer}.{name}.weight": normal(*size) for name, size in sizes.items()} | {
                f"model.layers.{layer}.{name}.weight": torch.ones(n, dtype=torch.bfloat16)
                for name in ("input_layernorm", "post_attention_layernorm")
            }

    _write(folder, shape, layers(), lambda _: normal(shape.vocab_size, n))


def write_tuned(folder: Path, shape: Shape, base: Path, seed: int) -> None:
    """The base with something learned: noise on every projection."""
    draw = torch.Generator().manual_seed(seed)

    def layers() -> Iterator[dict[str, Tensor]]:
        for path in sorted(base.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if ".layers." in name}  # noqa: SIM118
            if tensors:
                yield {name: _learned(tensor, draw) for name, tensor in tensors.items()}

    def end(name: str) -> Tensor:
        weights = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
        with safe_open(base / weights[name], "pt") as file:
            return file.get_tensor(name)

    _write(folder, shape, layers(), end)


def _learned(tensor: Tensor, draw: torch.Generator) -> Tensor:
    return tensor if tensor.dim() < 2 else (tensor + 0.002 * torch.randn(tensor.shape, generator=draw)).bfloat16()


def write_target(folder: Path, shape: Shape, source: Path, of: Shape, seed: int) -> None:
    """Cut out of the source: some layers, neurons of the stream, dimensions of heads and neurons of MLPs."""
    draw = torch.Generator().manual_seed(seed)

    def some(count: int, among: int) -> Tensor:
        return torch.randperm(among, generator=draw)[:count].sort().values

    stored = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= dict.fromkeys(file.keys(), path)

    def read(name: str, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        with safe_open(stored[name], "pt") as file:
            tensor = file.get_tensor(name)[rows]
        return (tensor if columns is None else tensor[:, columns]).contiguous()

    stream = some(shape.hidden_size, of.hidden_size)
    half, other_half = shape.head_dim // 2, of.head_dim // 2
    turned = some(half, other_half)
    dimensions = torch.cat([turned, turned + other_half])

    def heads(count: int, others: int) -> Tensor:
        # A group has as many heads as there are in the source; further ones are doubles of its first.
        groups, per, other_per = shape.num_key_value_heads, count // shape.num_key_value_heads, others // 8
        chosen = [group * other_per + min(head, other_per - 1) for group in range(groups) for head in range(per)]
        return torch.cat([head * of.head_dim + dimensions for head in chosen])

    q, kv = (heads(getattr(shape, key), getattr(of, key)) for key in ("num_attention_heads", "num_key_value_heads"))
    places = torch.linspace(0, of.num_hidden_layers - 1, shape.num_hidden_layers).round().long().tolist()

    def layers() -> Iterator[dict[str, Tensor]]:
        for layer, other in enumerate(places):
            neurons = some(shape.intermediate_size, of.intermediate_size)
            rows_columns = {
                "self_attn.q_proj": (q, stream),
                "self_attn.k_proj": (kv, stream),
                "self_attn.v_proj": (kv, stream),
                "self_attn.o_proj": (stream, q),
                "mlp.gate_proj": (neurons, stream),
                "mlp.up_proj": (neurons, stream),
                "mlp.down_proj": (stream, neurons),
                "input_layernorm": (stream, None),
                "post_attention_layernorm": (stream, None),
            }
            yield {
                f"model.layers.{layer}.{name}.weight": read(f"model.layers.{other}.{name}.weight", *index)
                for name, index in rows_columns.items()
            }

    _write(folder, shape, layers(), lambda name: read(name, torch.arange(shape.vocab_size), stream))


def _write(folder: Path, shape: Shape, layers: Iterator[dict[str, Tensor]], end: Callable[[str], Tensor]) -> None:
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    index: dict[str, str] = {}

    def keep(tensors: dict[str, Tensor]) -> None:
        name = f"model-{len(set(index.values())):03d}.safetensors"
        save_file(tensors, work / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for tensors in layers:
        keep(tensors)
    keep(
        {
            "model.embed_tokens.weight": end("model.embed_tokens.weight"),
            "model.norm.weight": torch.ones(shape.hidden_size).bfloat16(),
        }
    )
    if not shape.tie_word_embeddings:
        keep({"lm_head.weight": end("lm_head.weight")})
    (work / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    settings: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "rope_theta": 500000.0}
    config = LlamaConfig(**asdict(shape), **settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(work)
    pico_tokenizer().save_pretrained(work)
    work.rename(folder)


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group of so many bytes; it ends with the ``with``."""
    top = Path("/sys/fs/cgroup")
    old = (top / "memory").is_dir()
    group = (top / "memory" if old else top) / f"tmerge-scale-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def run(command: list[str], group: Path, log: Path) -> tuple[int, float, int]:
    """A command in a group: its exit code, its seconds, and the most bytes that it had but for the pages of files."""
    join = f"import os, sys; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
    command = [sys.executable, "-c", join + "os.execv(sys.argv[1], sys.argv[1:])", *command]
    began, own = time.perf_counter(), 0
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as begun:
        process = psutil.Process(begun.pid)
        while begun.poll() is None:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                own = max(own, memory.rss - memory.shared)
            time.sleep(0.05)
    return begun.returncode, time.perf_counter() - began, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", choices=SHAPES, default="1b")
    parser.add_argument("--source", choices=SHAPES, default="8b")
    parser.add_argument("--what", choices=("weights", "task-vector", "reconstruct"), default="reconstruct")
    parser.add_argument("--limit", type=float, default=16, help="gigabytes of the control group")
    parser.add_argument(
        "--layers", type=int, help="of the source, in the place of its own; the target has half of them"
    )
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="further settings of the merge")
    asked = parser.parse_args()
    out, source, target = asked.out.resolve(), SHAPES[asked.source], SHAPES[asked.target]
    source_name, target_name = asked.source, asked.target
    if asked.layers:
        source, target = (
            replace(shape, num_hidden_layers=count)
            for shape, count in ((source, asked.layers), (target, asked.layers // 2))
        )
        source_name, target_name = f"{source_name}-{asked.layers}", f"{target_name}-{asked.layers // 2}"
    # What the target was cut out of; and what that became, where it is what it learned that is carried.
    base, cut, tuned = out / source_name, out / f"{target_name}-of-{source_name}", out / f"{source_name}-tuned"
    shapes = {base: source, cut: target}
    if asked.what == "task-vector":
        shapes[tuned] = source
    needed = 2 * sum(shape.parameters for folder, shape in shapes.items() if not folder.exists())
    out.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out).free) < needed + 8 * target.parameters + 4 * GIGABYTE:
        parser.error(f"{out} has {bytes_words(free)} free, too little for the models and the run")
    if not base.exists():
        write_source(base, source, 0)
    if not cut.exists():
        write_target(cut, target, base, source, 1)
    if tuned in shapes and not tuned.exists():
        write_tuned(tuned, source, base, 2)
    fused = out / f"fused-{asked.what}"
    shutil.rmtree(fused, ignore_errors=True)
    settings = ["calibration.max_tokens=48", f"calibration.texts={asked.texts}", "calibration.held_out=0.25"]
    settings += ["evaluation.controls=[]", "evaluation.texts=16", *asked.settings]
    if asked.what == "reconstruct":
        settings += ["fusion.keep_texts=48", "fusion.alpha=1"]
    elif asked.what == "weights":
        settings += ["fusion.projections=[q, k, v, o]"]
    command = [str(Path(sys.executable).with_name("tmerge")), "merge", "--out", str(fused), "--target", str(cut)]
    if asked.what == "task-vector":
        command += ["--source", str(tuned), "--source-base", str(base)]
    else:
        command += ["--source", str(base), "--what", asked.what]
    command += [word for setting in settings for word in ("--set", setting)]
    with memory_group(int(asked.limit * GIGABYTE)) as group:
        code, seconds, own = run(command, group, out / f"{asked.what}.log")
    row: dict[str, Any] = {
        "run": f"{target_name} <- {source_name} {asked.what}",
        "limit_gb": asked.limit,
        "texts": asked.texts,
        "exit": code,
        "seconds": round(seconds, 1),
        "own_bytes": own,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    if code == 0:
        report = json.loads((fused / "tmerge/report.json").read_text())
        row["stages"] = [[stage["name"], stage["seconds"], stage["peak_rss_bytes"]] for stage in report["stages"]]
    with (out / "results.jsonl").open("a") as results:
        results.write(json.dumps(row) + "\n")
    sys.stdout.write(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
