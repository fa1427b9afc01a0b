"""Measures a model on this machine. Run as a program: see `forebay.mlx_service.bench`, which does.

    python -m forebay.mlx_service.worker.bench --model DIR --lengths 128,512 --chunks 64,512 --widths 1,8

Standard output has a JSON object a line: how far it is, and at the end what
was measured. The model runs as the worker runs it, through the same batch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.bench import DECODE, PREFILL
from forebay.mlx_service.models.describe import NotAModelError, describe
from forebay.mlx_service.worker.batch import Batch
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.memory import KvCost, probe
from forebay.mlx_service.worker.runtime import BLAS, leave_thread, mx
from forebay.mlx_service.worker.sampling import SamplingParams, sampler
from forebay.mlx_service.worker.weights import CpuWeights, plan

LONGEST_CHUNK = 2048
"""Tokens read in one step where the time it takes is not measured."""

FAR_CONTEXT = 1 << 20
"""Context of a model that does not say its own."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to measure."""

    kind: str
    length: int
    size: int

    def __str__(self) -> str:
        if self.kind == PREFILL:
            return f"reading {self.length} tokens by {self.size}"
        return f"writing {self.size} at once after {self.length} tokens"


def trials(arguments: argparse.Namespace, *, context: int, weights: int, cost: KvCost) -> list[Trial]:
    """Returns what to measure: all that fits the model's context and the memory."""
    lengths = [length for length in arguments.lengths if length + arguments.tokens <= context]

    ceiling: int = arguments.ceiling

    def fits(length: int, rows: int) -> bool:
        return weights + rows * cost.of(length + arguments.tokens) <= ceiling

    found = [
        Trial(PREFILL, length, chunk)
        for length in lengths
        for chunk in arguments.chunks
        # A chunk that is longer than the prompt is the same as one that is as long.
        if fits(length, 1) and chunk < 2 * length
    ]
    found += [
        Trial(DECODE, length, width)
        for length in lengths
        for width in arguments.widths
        if fits(length, width)
    ]
    return found


class Bench:
    """Measures one model.

    Args:
        model: the model, loaded on this thread.
        vocabulary_size: tokens that it knows.
        tokens: tokens that each reply writes.
    """

    def __init__(self, model: object, *, vocabulary_size: int, tokens: int) -> None:
        self._model = model
        self._vocabulary_size = vocabulary_size
        self._tokens = tokens
        self._greedy = sampler(SamplingParams(temperature=0), position=0)

    def __call__(self, trial: Trial) -> float:
        """Returns tokens a second."""
        rate = self._read(trial) if trial.kind == PREFILL else self._write(trial)
        mx.clear_cache()
        return rate

    def _prompt(self, length: int, row: int) -> list[int]:
        return [(row + 7919 * i) % self._vocabulary_size for i in range(1, length + 1)]

    def _read(self, trial: Trial) -> float:
        batch = Batch(self._model, rows=1, prefill_step=trial.size, end_tokens=())
        try:
            batch.insert(self._prompt(trial.length, 0), most=1, sampler=self._greedy, processors=())
            began = time.perf_counter()
            while not batch.step()[1]:
                pass
            return trial.length / (time.perf_counter() - began)
        finally:
            batch.close()

    def _write(self, trial: Trial) -> float:
        chunk = min(max(trial.length, 16), LONGEST_CHUNK)
        batch = Batch(self._model, rows=trial.size, prefill_step=chunk, end_tokens=())
        try:
            # Prompts are read one after the other, and those that were read first write meanwhile.
            most = self._tokens + trial.size * (trial.length // chunk + 4)
            for row in range(trial.size):
                batch.insert(self._prompt(trial.length, row), most=most, sampler=self._greedy, processors=())
            while len(batch.step()[1]) < trial.size:
                pass
            began = time.perf_counter()
            written = sum(len(batch.step()[1]) for _ in range(self._tokens))
            return written / (time.perf_counter() - began)
        finally:
            batch.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the command line says, and returns the exit code."""
    arguments = _parse(argv)
    try:
        facts = describe(arguments.model)
        _tell({"what": "loading the model", "fraction": 0.0})
        how = plan(arguments.cpu_weights, facts, ceiling=arguments.ceiling, blas=BLAS)
        model = load_weights(arguments.model, how)
    except (NotAModelError, ModelLoadFailed) as error:
        print(str(error), file=sys.stderr)  # noqa: T201  # one readable line
        return 1
    try:
        _measure(model, arguments, context=facts.context_token_count or FAR_CONTEXT)
    finally:
        del model
        leave_thread()
    return 0


def _measure(model: object, arguments: argparse.Namespace, *, context: int) -> None:
    assert callable(model)
    vocabulary_size = int(model(mx.array([[0]])).shape[-1])
    wanted = trials(arguments, context=context, weights=int(mx.get_active_memory()), cost=probe(model))
    bench = Bench(model, vocabulary_size=vocabulary_size, tokens=arguments.tokens)
    rates: dict[Trial, list[float]] = {trial: [] for trial in wanted}
    # The first round compiles kernels and is not counted.
    schedule = [trial for _ in range(arguments.rounds + 1) for trial in wanted]
    for done, trial in enumerate(schedule):
        _tell({"what": str(trial), "fraction": done / len(schedule)})
        rate = bench(trial)
        if done >= len(wanted):
            rates[trial].append(rate)
    for trial, found in rates.items():
        _tell({"kind": trial.kind, "length": trial.length, "size": trial.size, "rates": found})


def _tell(event: dict[str, object]) -> None:
    print(json.dumps(event), flush=True)  # noqa: T201  # whoever started this reads it


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m forebay.mlx_service.worker.bench", description="Measures a model on this machine."
    )
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--lengths", type=_numbers, required=True, help="tokens of the prompts")
    parser.add_argument("--chunks", type=_numbers, required=True, help="tokens read in one step")
    parser.add_argument("--widths", type=_numbers, required=True, help="replies at once")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that each reply writes")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument(
        "--cpu-weights", type=CpuWeights, default=CpuWeights.AUTO, help="how a CPU holds weights"
    )
    parser.add_argument("--ceiling", type=int, required=True, help="bytes that all may take")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
