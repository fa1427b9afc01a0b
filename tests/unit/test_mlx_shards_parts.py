"""The parts of a shared model: settings, the other ranks' processes, and orders that all ranks follow."""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

import tiny_models
from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.service import model_arguments
from forebay.mlx_service.shards import ShardSettings
from forebay.mlx_service.worker import follower, followers, sharding
from forebay.mlx_service.worker.batch import Batch
from forebay.mlx_service.worker.followers import Followers, GroupLostError, end_with
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.runtime import make_prompt_cache, mx
from forebay.mlx_service.worker.sampling import SamplingParams, sampler
from forebay.mlx_service.worker.sharding import Follower, Leader, load_part

pytestmark = pytest.mark.mlx

HERE = ("127.0.0.1", "127.0.0.1")
GREEDY = SamplingParams(temperature=0)


class Alone:
    """A group of one rank, as far as loading looks at it."""

    def __init__(self, count: int) -> None:
        self._count = count

    def size(self) -> int:
        return self._count

    def rank(self) -> int:
        return 0


def test_ranks_here_get_free_ports_and_others_those_configured() -> None:
    first, second = ShardSettings(hosts=HERE).addresses()
    assert first.startswith("127.0.0.1:")
    assert first != second
    settings = ShardSettings(hosts=("10.0.0.1", "10.0.0.2", "10.0.0.3"), port=50300)
    assert settings.addresses() == ["10.0.0.1:50300", "10.0.0.2:50301", "10.0.0.3:50302"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"hosts": ["127.0.0.1"]},
        {"hosts": ["127.0.0.1", "10.0.0.2"]},
        {"hosts": HERE, "kind": "expert"},
        {"hosts": HERE, "remote_command": []},
        {"hosts": HERE, "speed": 1},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ShardSettings.model_validate(wrong)


def test_only_the_worker_of_a_shared_model_is_told_of_the_others() -> None:
    settings = MlxSettings.model_validate({"shards": {"big": {"hosts": HERE}}})
    assert model_arguments(settings, "small", None) == []
    flag, value = model_arguments(settings, "big", None)
    assert flag == "--shards"
    assert ShardSettings.model_validate_json(value) == settings.shards["big"]


class Ended(queue.SimpleQueue[tuple[int, int]]):
    """Ranks that ended, with their exit codes."""

    def __call__(self, rank: int, code: int) -> None:
        self.put((rank, code))


def program(text: str, *hosts: str) -> ShardSettings:
    """Returns settings whose other ranks run a few lines of Python."""
    return ShardSettings(
        hosts=("127.0.0.1", *hosts), port=1, remote_command=(sys.executable, "-c", text, "{host}")
    )


def test_a_rank_elsewhere_is_started_by_the_command_and_gets_its_job_and_its_orders(tmp_path: Path) -> None:
    text = f"""
import json, sys
lines = [json.loads(line) for line in sys.stdin]
open({str(tmp_path)!r} + "/" + sys.argv[1], "w").write(json.dumps([sys.argv[1:], lines]))
"""
    ended = Ended()
    settings = program(text, "a.local", "b.local")
    group = Followers(settings, Path("/models/m"), cache_limit=5, on_end=ended)
    group.start()
    group.tell({"do": "step", "batch": 1})
    for process in group._processes:
        assert process.stdin is not None
        process.stdin.close()
    assert sorted(ended.get(timeout=30) for _ in range(2)) == [(1, 0), (2, 0)]
    arguments, (job, order) = json.loads((tmp_path / "b.local").read_text())
    assert arguments == ["b.local", "-m", "forebay.mlx_service.worker.follower"]
    assert job == {
        "rank": 2,
        "addresses": ["127.0.0.1:1", "a.local:2", "b.local:3"],
        "kind": "tensor",
        "model": "/models/m",
        "cache_limit": 5,
    }
    assert order == {"do": "step", "batch": 1}


def test_orders_for_a_rank_that_is_gone_are_a_lost_group(tmp_path: Path) -> None:
    def broken(content: bytes) -> None:
        raise BrokenPipeError

    group = Followers(program("", "a"), tmp_path, cache_limit=5, on_end=Ended())
    group._processes = [SimpleNamespace(pid=7, stdin=SimpleNamespace(write=broken))]  # type: ignore[list-item]  # a pipe that nobody reads
    assert group.pids == [7]
    with pytest.raises(GroupLostError):
        group.tell({"do": "step", "batch": 1})


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [(3, 3, "rank 1 of the model could not load its part"), (-9, 70, "rank 1 of the model ended with -9")],
)
def test_a_lost_rank_ends_this_one_with_a_code_and_a_line(
    code: int, expected: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(followers.os, "_exit", codes.append)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    end_with(3, 70)(1, code)
    assert codes == [expected]
    assert words in capsys.readouterr().err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.build_random(tmp_path / "m")


def played(monkeypatch: pytest.MonkeyPatch, model: Path) -> tuple[Leader, object, list[dict[str, object]]]:
    """Returns a leader of nobody, its model, and what it tells."""
    told: list[dict[str, object]] = []
    monkeypatch.setattr(sharding, "join", lambda rank, addresses: Alone(1))
    monkeypatch.setattr(sharding, "load_part", lambda path, group, kind: load_weights(path))
    monkeypatch.setattr(sharding.mx.distributed, "all_sum", lambda tokens, group: tokens)
    leader = Leader(told.append, lambda: ["127.0.0.1:1"])
    return leader, leader.load(model, "tensor"), told


def run(batch: Batch, uids: Sequence[int], steps: int) -> dict[int, list[int]]:
    written: dict[int, list[int]] = {uid: [] for uid in uids}
    for _ in range(steps):
        for token in batch.step()[1]:
            written[token.uid].append(token.token)
    return written


def test_all_that_rank_0_does_is_told_in_order_and_a_follower_can_do_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, weights, told = played(monkeypatch, model)
    assert callable(weights)
    caches = make_prompt_cache(weights)
    weights(mx.array([[1, 2]]), cache=caches)
    weights(mx.array([[3]]), cache=caches)
    batch = leader.new_batch(weights, rows=2, prefill_step=4, end_tokens=[0])
    uid = batch.insert([1, 2, 3, 4, 5, 6], most=8, sampler=sampler(GREEDY, position=0), processors=())
    batch.share_step(2)
    batch.share_step(2)
    run(batch, [uid], 3)
    assert batch.remove(uid) is None
    batch.close()
    assert [order["do"] for order in told] == [
        *("forward", "forward", "new", "insert", "share", "step", "step", "step", "remove", "close"),
    ]
    assert [told[i]["cache"] for i in (0, 1)] == [0, 0]
    rank = Follower(load_weights(model), None)
    for order in json.loads(json.dumps(told)):  # as it goes through a pipe
        rank.obey(order)
    with pytest.raises(ValueError, match="not known"):
        rank.obey({"do": "dance"})
    rank.obey({"do": "new", "batch": 9, "rows": 1, "prefill_step": 4, "end_tokens": []})
    rank.close()


def test_a_led_batch_writes_what_a_plain_one_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, weights, _ = played(monkeypatch, model)
    led = leader.new_batch(weights, rows=2, prefill_step=4, end_tokens=[])
    plain = Batch(load_weights(model), rows=2, prefill_step=4, end_tokens=[])
    said = []
    for batch in (led, plain):
        uids = [
            batch.insert(tokens, most=20, sampler=sampler(GREEDY, position=0), processors=())
            for tokens in ([1, 2, 3], [7] * 9)
        ]
        said.append(list(run(batch, uids, 12).values()))
        batch.close()
    assert said[0] == said[1]


def test_a_step_that_fails_on_rank_0_loses_the_group(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, weights, told = played(monkeypatch, model)
    batch = leader.new_batch(weights, rows=1, prefill_step=4, end_tokens=[])

    def fail(logprobs: object) -> object:
        raise RuntimeError("no")

    batch.insert([1, 2], most=2, sampler=fail, processors=())
    with pytest.raises(GroupLostError):
        run(batch, [0], 3)

    def lost(order: dict[str, object]) -> None:
        raise GroupLostError

    leader._tell = lost
    batch.close()  # nobody is left to tell, and that is no error of its own
    assert told[-1]["do"] == "step"


def change(model: Path, **fields: object) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))
    return model


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (lambda model: model, "pipeline", "family llama cannot be shared by layers"),
        (lambda model: change(model, model_type="gpt2"), "tensor", "cannot be loaded"),
        (lambda model: (model / "config.json").unlink() or model, "tensor", "cannot be loaded"),
    ],
    ids=["kind", "family", "broken"],
)
def test_a_model_that_cannot_be_shared_says_why(
    model: Path, spoil: Callable[[Path], Path], kind: str, words: str
) -> None:
    with pytest.raises(ModelLoadFailed, match=words):
        load_part(spoil(model), Alone(2), kind)


def test_heads_and_layers_that_do_not_divide_say_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadFailed, match="4 heads cannot be shared by 3 ranks"):
        load_part(model, Alone(3), "tensor")
    thin = tiny_models.build_random(model.parent / "thin", layers=1, family="qwen2")
    with pytest.raises(ModelLoadFailed, match="it cannot be shared: split"):
        load_part(thin, Alone(2), "pipeline")
    plain = SimpleNamespace(parameters=dict)
    monkeypatch.setattr(sharding, "load_model", lambda path, **_: (plain, {"model_type": "odd"}))
    with pytest.raises(ModelLoadFailed, match="family odd cannot be shared by tensor"):
        load_part(model, Alone(2), "tensor")


def test_ranks_that_do_not_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("[ring] Couldn't connect")

    monkeypatch.setattr(sharding.mx.distributed, "init", fail)
    monkeypatch.setenv("MLX_RANK", "")
    monkeypatch.setenv("MLX_HOSTFILE", "")
    with pytest.raises(ModelLoadFailed, match="do not find each other"):
        sharding.join(0, ["127.0.0.1:1", "127.0.0.1:2"])


def test_a_rank_does_its_job_and_ends_with_its_input(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timers: list[object] = []
    monkeypatch.setattr(
        follower.threading, "Timer", lambda *timer: timers.append(timer) or SimpleNamespace(start=int)
    )
    monkeypatch.setattr(follower, "join", lambda rank, addresses: Alone(1))
    monkeypatch.setattr(follower, "load_part", lambda path, group, kind: load_weights(path))
    monkeypatch.setattr(follower, "leave_thread", lambda: None)  # this thread belongs to the tests
    monkeypatch.setattr(sharding.mx.distributed, "all_sum", lambda tokens, group: tokens)
    job = {"rank": 1, "addresses": [], "kind": "tensor", "model": str(model), "cache_limit": 1 << 20}
    orders = [
        job,
        {"do": "new", "batch": 1, "rows": 1, "prefill_step": 4, "end_tokens": []},
        {"do": "insert", "batch": 1, "tokens": [1, 2, 3], "most": 3},
        *[{"do": "step", "batch": 1}] * 3,
    ]
    assert follower.main(io.StringIO("".join(json.dumps(order) + "\n" for order in orders))) == 0
    assert follower.main(io.StringIO("")) == 0

    def refuse(path: Path, group: object, kind: str) -> None:
        raise ModelLoadFailed("it is too large")

    monkeypatch.setattr(follower, "load_part", refuse)
    assert follower.main(io.StringIO(json.dumps(job))) == 3
    assert "it is too large" in capsys.readouterr().err
    assert timers[0] == (follower.STUCK_SECONDS, os._exit, (70,))
