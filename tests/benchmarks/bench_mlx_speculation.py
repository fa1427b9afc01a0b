"""A reply that runs alone, with speculation and without: the same engine, in turn, in one run.

Three texts: one that repeats itself, where looking back guesses right; one that does not, where it must cost
nothing; and a large model with a small one that is always right, which is the most a draft model can give.
The default model is taken if it is on this machine. Ratios are printed and nothing is asserted.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_models
from forebay.mlx_service.fetch import default_cache_dir
from forebay.mlx_service.models.describe import describe
from forebay.mlx_service.worker.batch import Batch
from forebay.mlx_service.worker.lanes import Lanes
from forebay.mlx_service.worker.load import load_weights, load_words
from forebay.mlx_service.worker.runtime import BLAS, mx
from forebay.mlx_service.worker.sampling import SamplingParams, sampler
from forebay.mlx_service.worker.speculation import Speculation, SpeculationStats
from forebay.mlx_service.worker.weights import CpuWeights, plan

pytestmark = pytest.mark.mlx

ROUNDS = 3
TOKENS = 200
LAYERS = 12

LIST = "\n".join(f"{i}. The quick brown fox number {i} jumps over the lazy dog." for i in range(1, 9))
REPETITIVE = f"Repeat this list exactly, word for word:\n{LIST}"
PLAIN = "Tell a short story about a lighthouse keeper and a storm."


def deep(path: Path, small: Path) -> Path:
    """Writes a model that answers as a small one does and is many times as much work."""
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, path / name)
    config = json.loads((small / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    weights = mx.load(str(small / "model.safetensors"))
    assert isinstance(weights, dict)
    for name, array in list(weights.items()):
        if name.startswith("model.layers.0."):
            idle = name.endswith(("o_proj.weight", "down_proj.weight"))
            for i in range(1, LAYERS):
                key = name.replace("layers.0.", f"layers.{i}.")
                weights[key] = mx.zeros_like(array) if idle else array
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def seconds(
    model: object, prompt: list[int], speculation: Speculation | None, tokens: int
) -> tuple[float, float]:
    """Seconds of the clock and of the processor for a token."""
    lanes = Lanes(
        lambda _: Batch(model, rows=8, prefill_step=512, end_tokens=[]),
        speculation=speculation,
        model_of=lambda _: model,
    )
    lanes.insert(
        prompt,
        most=tokens,
        sampler=sampler(SamplingParams(temperature=0), position=0),
        processors=(),
        speculates=True,
    )
    count = 0
    began = used = 0.0
    while count < tokens:
        count += len(lanes.step()[1])
        if not began and count:
            began, used = time.perf_counter(), time.process_time()
    took = time.perf_counter() - began, time.process_time() - used
    lanes.close()
    return took[0] / tokens, took[1] / tokens


def compare(
    name: str,
    model: object,
    prompt: list[int],
    make: Callable[[], Speculation],
    *,
    rounds: int = ROUNDS,
    tokens: int = TOKENS,
) -> None:
    pairs = []
    stats = SpeculationStats()
    for _ in range(rounds):
        speculation = make()
        pairs.append((seconds(model, prompt, None, tokens), seconds(model, prompt, speculation, tokens)))
        stats = speculation.stats
    wall = statistics.median(off[0] / on[0] for off, on in pairs)
    processor = statistics.median(off[1] / on[1] for off, on in pairs)
    rate = statistics.median(1 / off[0] for off, _ in pairs)
    share = stats.accepted / stats.drafted if stats.drafted else 0.0
    print(
        f"{name:34}{rate:>9.1f}{wall:>8.2f}{processor:>8.2f}{stats.drafted:>9}{share:>8.0%}"
        f"{stats.tries:>7}{stats.given_up:>8}"
    )


def prompt_of(folder: Path, text: str) -> list[int]:
    words = load_words(folder)
    tokens: list[int] = words.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )
    return tokens


def test_speculation(tmp_path: Path) -> None:
    small = tiny_models.build_random(tmp_path / "small", hidden=128, layers=1, plain=True)
    large = deep(tmp_path / "large", small)
    model, guesser = load_weights(large), load_weights(small)

    def drafted() -> Speculation:
        made = Speculation(lookup=False, load_draft=lambda: guesser)
        made.load(model)
        made.start(vocabulary=260, chunk=512)
        return made

    heads = f"{'off tok/s':>9}{'faster':>8}{'by cpu':>8}{'guessed':>9}{'right':>8}{'tries':>7}{'gave up':>8}"
    print(f"\n{'':34}{heads}")
    compare("12 layers, a draft always right", model, prompt_of(large, "hi"), drafted)
    compare("12 layers, a loop looked up", model, prompt_of(large, "hi"), Speculation)
    folder = default_cache_dir() / "models" / "smollm2-135m-instruct"
    if folder.is_dir():
        real = load_weights(folder, plan(CpuWeights.AUTO, describe(folder), ceiling=8 << 30, blas=BLAS))
        compare(
            "SmolLM2-135M, repetitive", real, prompt_of(folder, REPETITIVE), Speculation, rounds=1, tokens=120
        )
        compare("SmolLM2-135M, a story", real, prompt_of(folder, PLAIN), Speculation, rounds=1, tokens=120)
