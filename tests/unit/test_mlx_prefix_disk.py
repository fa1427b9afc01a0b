"""What is kept of prompts on disk: found again by its owner, by nobody else, and never in the way."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import queue
import shutil
import stat
import threading
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import tiny_models
import tiny_stateful
from forebay.mlx_service.models.identity import Identity
from forebay.mlx_service.worker import prefix_disk, prefix_file, process, restoring
from forebay.mlx_service.worker.cache_layout import Layout
from forebay.mlx_service.worker.engine import Engine, Over, Reading, Row, Written
from forebay.mlx_service.worker.prefix_cache import Packed, PrefixCache, Stretch
from forebay.mlx_service.worker.prefix_disk import DiskSettings, DiskTier, Post
from forebay.mlx_service.worker.restoring import Restoring
from forebay.mlx_service.worker.runtime import KVCache, mx
from forebay.mlx_service.worker.sampling import SamplingParams
from forebay.mlx_service.worker.weights import STORED, Plan
from mlx_worker_rig import Rig, rig, until

pytestmark = pytest.mark.mlx

SECRET = tuple(range(100, 160))


def text_of(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((i * i + 7 * i + seed * 31) % 250 for i in range(count))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: tiny_stateful.build(folder / family, family) for family in ("gemma3_text", "mamba")}
    return {"llama": tiny_models.build_random(folder / "plain"), **made}


@asynccontextmanager
async def with_disk(
    model: Path,
    folder: Path,
    *,
    identity: str = "weights",
    memory: int = 64 << 20,
    disk: int = 1 << 30,
    write: prefix_disk.Write = "evicted",
    piece: int = 32,
) -> AsyncIterator[Rig]:
    settings = DiskSettings(folder=folder, max_bytes=disk, write=write, piece_tokens=piece)

    def new(layout: Layout, post: Post) -> DiskTier:
        return DiskTier(
            settings, model=model, identity=lambda: identity, is_cuttable=layout.is_cuttable, post=post
        )

    async with rig(model, prefixes=PrefixCache(max_bytes=memory, min_tokens=4), disk=new) as made:
        yield made


async def finish(
    engine: Engine, tokens: tuple[int, ...], *, key: str = "", most: int = 8, pin: bool = False
) -> tuple[list[int], int]:
    """The reply's tokens, and how many of the prompt were found."""
    ticket = engine.submit(
        Row(
            tokens=tokens,
            most=most,
            sampling=SamplingParams(temperature=0),
            cache_key=key,
            pin=pin,
            beginnings=((len(tokens) * 1000, len(tokens) - 2),),
        )
    )
    reply: list[int] = []
    cached = 0
    while True:
        for happening in await ticket.next():
            if isinstance(happening, Written):
                reply.append(happening.token)
            elif isinstance(happening, Reading):
                cached = happening.cached
            elif isinstance(happening, Over):
                assert happening.failure is None
                return reply, cached


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*"))


async def found(made: Rig, count: int = 1) -> None:
    """Waits until what is on disk is known."""
    await until(lambda: made.engine.stats().disk.pieces >= count)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba"])
async def test_a_worker_that_starts_again_goes_on_from_disk_and_says_the_same(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    prompt = text_of(100)
    async with with_disk(models[family], tmp_path / "d") as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        first, _ = await finish(made.engine, prompt)
        await until(lambda: made.engine.marks)
    again = (*prompt, *first, *text_of(10, 3))
    async with with_disk(models[family], tmp_path / "d") as made:
        await found(made)
        assert made.engine.marks == (100_000,), "what is on disk is told too"
        said, cached = await finish(made.engine, prompt)
        assert (said, cached) == (first, 96 if family == "llama" else 98), "pieces of 32, and snapshots"
        said_again, cached = await finish(made.engine, again)
        assert cached == len(prompt) + len(first)
        stats = made.engine.stats().disk
        assert stats.restored_tokens >= 96
    async with rig(models[family]) as plain:
        assert (await finish(plain.engine, again))[0] == said_again


@pytest.mark.parametrize("family", ["llama", "mamba"])
async def test_what_leaves_memory_comes_back_from_disk(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    async with with_disk(models[family], tmp_path / "d") as made, rig(models[family]) as plain:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        prompts = [text_of(100, seed) for seed in range(3)]
        expected = [(await finish(plain.engine, prompt))[0] for prompt in prompts]
        await finish(made.engine, prompts[0])
        made.engine._commands.put(lambda: made.engine._prefixes.shrink(0))
        await found(made, 2)
        await until(lambda: not made.engine._disk._jobs)
        assert made.engine.stats().prefix.bytes == 0
        replies = await asyncio.gather(*(finish(made.engine, prompt) for prompt in prompts))
        assert [reply for reply, _ in replies] == expected
        assert replies[0][1] >= 96
        assert made.engine.stats().waiting == 0


async def test_a_planted_secret_on_disk_reaches_no_other_caller(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = text_of(64)
    async with with_disk(models["llama"], tmp_path / "d", write="finished") as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        await finish(made.engine, (*shared, *SECRET), key="ann")
    assert len(files(tmp_path / "d")) > 2
    handed: list[tuple[list[KVCache], int]] = []
    restored: list[Stretch] = []
    adopt, find = PrefixCache.adopt, PrefixCache.find

    def adopting(cache: PrefixCache, stretch: Stretch) -> bool:
        restored.append(stretch)
        return adopt(cache, stretch)

    def finding(cache: PrefixCache, key: str, tokens: tuple[int, ...]) -> tuple[list[KVCache] | None, int]:
        found = find(cache, key, tokens)
        if found[0] is not None:
            handed.append((found[0], found[1]))
        return found

    monkeypatch.setattr(PrefixCache, "adopt", adopting)
    monkeypatch.setattr(PrefixCache, "find", finding)
    async with with_disk(models["llama"], tmp_path / "d") as made, rig(models["llama"]) as plain:
        await found(made)
        for prompt in ((*shared, *SECRET), (*shared, *text_of(20, 9))):
            said, cached = await finish(made.engine, prompt, key="bob")
            assert cached in {0, 64}, "bob's own second prompt begins as his first"
            assert said == (await finish(plain.engine, prompt))[0]
        assert restored == []
        handed.clear()
        prompt = (*shared, *SECRET[:10], *text_of(20, 9))
        said, cached = await finish(made.engine, prompt, key="ann")
        assert said == (await finish(plain.engine, prompt))[0]
        assert cached == 64, "ten tokens are not worth a file"
        assert restored
        assert {stretch.key for stretch in restored} == {"ann"}
        ((caches, count),) = handed
        for cache in caches:
            assert cache.keys.shape[2] == cache.values.shape[2] == cache.offset == count == cached


async def test_files_and_folders_are_their_owners_alone(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir(mode=0o755)
    async with with_disk(models["llama"], folder, write="finished") as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        await finish(made.engine, text_of(100))
        await found(made)
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o700}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755, "a folder that was there is somebody's"
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(folder)} == {0o600}
    arrays = mx.load(str(files(folder)[0]))
    assert "tokens" in arrays, "it is what its name's end says"


async def test_a_broken_file_costs_no_reply(models: dict[str, Path], tmp_path: Path) -> None:
    folder, prompt = tmp_path / "d", text_of(100)
    async with with_disk(models["llama"], folder, piece=1000) as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        expected, _ = await finish(made.engine, prompt)
    (path,) = files(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    async with with_disk(models["llama"], folder) as made:
        await found(made)
        assert await finish(made.engine, prompt) == (expected, 0)
        assert made.engine.stats().disk.removed == 1
    assert not path.exists()


async def test_other_weights_find_nothing_and_remove_what_they_replace(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder, prompt = tmp_path / "d", text_of(100)
    async with with_disk(models["llama"], folder) as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        await finish(made.engine, prompt)
    old = files(folder)
    assert old
    (tmp_path / "other").symlink_to(models["mamba"])
    async with with_disk(tmp_path / "other", folder):
        pass
    async with with_disk(models["llama"], folder, identity="other weights") as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        assert (await finish(made.engine, prompt))[1] == 0
        assert not any(path.exists() for path in old)
    (home,) = {path.parent for path in files(folder)}
    copied, name = tmp_path / "copied", hashlib.blake2b(b"third", digest_size=16).hexdigest()
    shutil.copytree(home, copied / home.parent.name / name)
    async with with_disk(models["llama"], copied, identity="third") as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        assert (await finish(made.engine, prompt))[1] == 0
        assert made.engine.stats().disk.removed >= 1


async def test_nothing_is_kept_without_an_identity_or_a_folder_of_our_own(
    models: dict[str, Path], tmp_path: Path
) -> None:
    async with with_disk(models["llama"], tmp_path / "d", identity="") as made:
        first = await finish(made.engine, text_of(100))
    assert not (tmp_path / "d").exists()
    (tmp_path / "file").touch()
    async with with_disk(models["llama"], tmp_path / "file") as made:
        assert await finish(made.engine, text_of(100)) == first


async def test_a_pinned_prompt_is_written_at_once(models: dict[str, Path], tmp_path: Path) -> None:
    async with with_disk(models["llama"], tmp_path / "d") as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        await finish(made.engine, text_of(50, 1))
        await finish(made.engine, text_of(50, 2), pin=True)
        await found(made)
        await until(lambda: not made.engine._disk._jobs)
        heads = [prefix_file.read_head(path) for path in files(tmp_path / "d")]
        assert [head.tokens for head in heads if not head.skipped] == [text_of(50, 2)[:32]]


async def test_a_row_that_is_cancelled_while_the_disk_is_slow_is_gone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompt = tmp_path / "d", text_of(100)
    async with with_disk(models["llama"], folder) as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        expected, _ = await finish(made.engine, prompt)
    slow, asked = threading.Event(), threading.Event()
    read = prefix_file.read

    def slowly(path: Path) -> prefix_file.Piece:
        asked.set()
        slow.wait(20)
        return read(path)

    monkeypatch.setattr(prefix_file, "read", slowly)
    monkeypatch.setattr(restoring, "RESTORE_SECONDS", 0.0)
    async with with_disk(models["llama"], folder) as made:
        await found(made)
        ticket = made.engine.submit(Row(tokens=prompt, most=4, sampling=SamplingParams(temperature=0)))
        await until(asked.is_set)
        ticket.cancel()
        await until(lambda: made.engine.stats().waiting == 0)
        said, cached = await finish(made.engine, prompt)
        assert (said, cached) == (expected, 0), "a disk that does not answer is not waited for"
        slow.set()


async def test_rows_go_on_while_a_slow_disk_writes(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, asked = threading.Event(), threading.Event()
    write = prefix_file.write

    def slowly(folder: Path, piece: prefix_file.Piece) -> int:
        asked.set()
        slow.wait(20)
        return write(folder, piece)

    monkeypatch.setattr(prefix_file, "write", slowly)
    async with with_disk(models["llama"], tmp_path / "d", write="finished") as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        await finish(made.engine, text_of(60))
        await until(asked.is_set)
        for seed in (1, 2):
            said, _ = await finish(made.engine, text_of(60, seed), most=30)
            assert len(said) == 30
        assert made.engine.stats().disk.written == 0
        slow.set()
        await found(made)


async def test_a_disk_that_takes_nothing_costs_no_reply(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def full(folder: Path, piece: prefix_file.Piece) -> int:
        calls.append(piece.head.name)
        if len(calls) % 2:
            raise OSError(28, "No space left on device")
        raise RuntimeError("surprise")

    monkeypatch.setattr(prefix_file, "write", full)
    async with with_disk(models["llama"], tmp_path / "d", write="finished") as made:
        await until(lambda: made.engine._disk is not None and made.engine._disk._identity)
        for seed in range(3):
            assert (await finish(made.engine, text_of(60, seed)))[0]
        await until(lambda: len(calls) >= 4)
    assert files(tmp_path / "d") == []


# The tier alone, on arrays whose every entry tells its token.


class Desk:
    """Runs what the tier posts, on the test's thread."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.tiers: list[DiskTier] = []

    def tier(self, folder: Path, *, is_cuttable: bool = True, **settings: object) -> DiskTier:
        made = DiskTier(
            DiskSettings(**{"folder": folder, "max_bytes": 1 << 30, "piece_tokens": 10, **settings}),  # type: ignore[arg-type]  # a test's shorthand
            model=folder / "model",
            identity=lambda: "weights",
            is_cuttable=is_cuttable,
            post=self._calls.put,
        )
        self.tiers.append(made)
        self.until(lambda: bool(made._identity))
        return made

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not condition():
            self._calls.get(timeout=end - time.monotonic())()

    def settle(self, tier: DiskTier) -> None:
        self.until(lambda: not tier._jobs)

    def bring(self, tier: DiskTier, tokens: tuple[int, ...], key: str = "k", known: int = 0) -> list[Stretch]:
        """What comes back for a text."""
        plan = tier.lookup(key, (*tokens, 1), known, [known] if known else [])
        if plan is None:
            return []
        found: list[Stretch] = []
        over: list[bool] = []

        def take(stretch: Stretch) -> bool:
            found.append(stretch)
            return True

        tier.read(plan, take, lambda: over.append(True))
        self.until(lambda: bool(over))
        return found


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    for tier in made.tiers:
        tier.close(5)


def stretch(
    tokens: tuple[int, ...],
    begin: int = 0,
    *,
    key: str = "k",
    rest: bool = False,
    kind: mx.Dtype = mx.float32,
    marks: tuple[tuple[int, int], ...] = (),
) -> Stretch:
    told = mx.array(tokens[begin:], kind)[None, None, None, :, None]
    kept = mx.contiguous(mx.broadcast_to(told, (2, 1, 3, len(tokens) - begin, 4)))
    state = mx.full((1, 5), float(sum(tokens)))
    mx.eval(kept, state)
    return Stretch(
        key=key,
        tokens=tokens,
        begin=begin,
        kept=Packed(((0, 1),), (kept,)),
        rest=Packed(((0,),), (state,)) if rest else None,
        marks=marks,
    )


def told(found: list[Stretch]) -> list[int]:
    values = [int(token) for one in found for token in one.kept.arrays[0][1, 0, 2, :, 3].tolist()]
    places = [place for one in found for place in range(one.begin, len(one.tokens))]
    assert len(values) == len(places)
    assert all(found[0].tokens == one.tokens[: len(found[0].tokens)] for one in found)
    return values


@pytest.mark.parametrize("kind", [mx.float32, mx.bfloat16, mx.float16, mx.int32])
def test_arrays_of_every_type_come_back_as_they_were(desk: Desk, tmp_path: Path, kind: mx.Dtype) -> None:
    tier = desk.tier(tmp_path)
    text = tuple(range(60))
    tier.write(stretch(text, kind=kind))
    desk.settle(tier)
    found = desk.bring(tier, text)
    assert told(found) == list(text)
    assert found[0].kept.arrays[0].dtype == kind
    assert tier.stats.pieces == 6
    assert tier.stats.bytes == sum(path.stat().st_size for path in files(tmp_path))


def test_a_type_that_no_file_holds_is_left_out(desk: Desk, tmp_path: Path) -> None:
    tier = desk.tier(tmp_path)
    tier.write(stretch(text_of(60), kind=mx.complex64))
    desk.settle(tier)
    assert tier.stats.pieces == 0


def test_texts_that_part_within_a_piece_share_it_as_far_as_they_go(desk: Desk, tmp_path: Path) -> None:
    tier = desk.tier(tmp_path, piece_tokens=40)
    one, other = tuple(range(80)), (*range(60), *range(100, 120))
    tier.write(stretch(one, marks=((1, 30), (2, 70), (3, 80))))
    desk.settle(tier)
    found = desk.bring(tier, other)
    assert [len(one.tokens) for one in found] == [40]
    longer = (*range(75), *range(100, 120))
    found = desk.bring(tier, longer)
    assert told(found) == list(range(80)), "whole pieces come, and what takes them knows where texts part"
    assert [found[0].marks, found[1].marks] == [((1, 30),), ((2, 70), (3, 80))]
    tier.write(stretch(other, 60))  # what comes before it is in memory, and on disk as part of a longer piece
    desk.settle(tier)
    assert desk.bring(tier, (*other, *range(20)), known=60) == [], "twenty tokens are not worth it"
    assert tier.stats.pieces == 3
    assert tier.lookup("other", other, 0, []) is None
    assert tier.lookup("k", one[:20], 0, []) is None, "less than is worth it"
    assert tier.lookup("k", (*one, 1), 60, [60]) is None
    assert set(tier.marks) == {1, 2, 3}


def test_without_its_snapshot_a_state_is_nothing(desk: Desk, tmp_path: Path) -> None:
    tier = desk.tier(tmp_path, is_cuttable=False)
    text = tuple(range(120))
    tier.write(stretch(text[:50], rest=True, marks=((5, 49),)))
    tier.write(stretch(text[:90], 50, rest=True, marks=((9, 88),)))
    tier.write(stretch(text, 90))
    desk.settle(tier)
    found = desk.bring(tier, text)
    assert told(found) == list(range(90))
    last = found[-1].rest
    assert last is not None
    assert int(last.arrays[0][0, 0].item()) == sum(range(90))
    assert told(desk.bring(tier, text[:89])) == list(range(50))
    assert told(desk.bring(tier, text[:91])) == list(range(90))
    assert tier.lookup("k", text[:50], 0, []) is None
    assert set(tier.marks) == {5, 9}
    tier.write(stretch(text, 90, rest=True))  # it is there without a snapshot
    desk.settle(tier)
    assert told(desk.bring(tier, (*text, 3))) == list(text)


def test_the_least_recently_used_leave_when_the_budget_is_exceeded(desk: Desk, tmp_path: Path) -> None:
    tier = desk.tier(tmp_path, piece_tokens=40)
    texts = [tuple(range(n, n + 40)) for n in (0, 100, 200)]
    other = tmp_path / "somebodys" / "model" / "model.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(10_000))
    os.utime(other, (1, 1))
    for text in texts:
        tier.write(stretch(text, marks=((text[0], 40),)))
        desk.settle(tier)
    ours = sorted(set(files(tmp_path)) - {other}, key=lambda path: path.stat().st_mtime)
    one = ours[0].stat().st_size
    for age, path in enumerate(ours):
        os.utime(path, (1000 + age, 1000 + age))
    assert desk.bring(tier, texts[0])
    tier._settings = DiskSettings(folder=tmp_path, max_bytes=3 * one + 100, piece_tokens=40)
    fourth = tuple(range(300, 340))
    tier.write(stretch(fourth))
    desk.settle(tier)
    assert [bool(desk.bring(tier, text)) for text in (*texts, fourth)] == [True, False, True, True]
    assert 100 not in tier.marks
    assert sum(path.stat().st_size for path in set(files(tmp_path)) - {other}) <= 3 * one + 100
    assert other.exists(), "what is not ours stays"


def test_the_disk_is_never_filled_whatever_the_budget_says(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0))
    tier = desk.tier(tmp_path)
    tier.write(stretch(tuple(range(60))))
    desk.settle(tier)
    assert tier.stats.pieces < 6


def test_a_beginning_that_left_takes_the_marks_behind_it(desk: Desk, tmp_path: Path) -> None:
    tier = desk.tier(tmp_path)
    tier.write(stretch(tuple(range(60)), marks=((1, 5), (2, 55))))
    desk.settle(tier)
    assert set(tier.marks) == {1, 2}
    first = next(path for path in files(tmp_path) if prefix_file.read_head(path).skipped == 0)
    first.unlink()
    assert desk.bring(tier, tuple(range(60))) == []
    assert tier.marks == ()
    assert tier.stats.removed == 1


def test_what_waits_to_be_written_is_bound(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = desk.tier(tmp_path)
    monkeypatch.setattr(prefix_disk, "PENDING_BYTES", 0)
    tier.write(stretch(tuple(range(60))))
    assert len(tier._jobs) == 1
    tier.write(stretch(tuple(range(60))), patiently=True)
    assert len(tier._jobs) == 6
    desk.settle(tier)


def test_who_takes_no_more_is_given_no_more(desk: Desk, tmp_path: Path) -> None:
    tier = desk.tier(tmp_path)
    text = tuple(range(60))
    tier.write(stretch(text))
    desk.settle(tier)
    plan = tier.lookup("k", (*text, 1), 0, [])
    assert plan is not None
    given: list[Stretch] = []
    over: list[bool] = []
    tier.read(plan, lambda one: bool(given.append(one)), lambda: over.append(True))
    desk.until(lambda: bool(over))
    assert len(given) == 1


@pytest.mark.parametrize(
    "harm",
    ["cut", "flipped", "head", "longer", "empty", "renamed", "noise", "link", "folder", "pipe", "tokens"],
)
def test_a_file_that_is_not_what_was_written_is_removed_where_it_is_met(
    desk: Desk, tmp_path: Path, harm: str
) -> None:
    text = tuple(range(60))
    first = desk.tier(tmp_path / "d", piece_tokens=60)
    first.write(stretch(text))
    desk.settle(first)
    (path,) = files(tmp_path / "d")
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[:-1])
    elif harm == "flipped":
        path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    elif harm == "head":
        path.write_bytes(data[:20] + b"\xff" + data[21:])
    elif harm == "longer":
        path.write_bytes(data + b"\0")
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "renamed":
        path.rename(path.with_name("00" + path.name[2:]))
    elif harm == "noise":
        path.write_bytes(b"\xff" * 100)
    elif harm == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif harm in {"folder", "pipe"}:
        path.unlink()
        path.mkdir() if harm == "folder" else os.mkfifo(path)
    else:
        place = data.index(b"".join(token.to_bytes(4, "little") for token in text[:8]))
        path.write_bytes(data[:place] + b"\x09" + data[place + 1 :])
    (path.parent / ".1-old.tmp").touch()
    os.utime(path.parent / ".1-old.tmp", (1, 1))
    (path.parent / ".2-new.tmp").touch()
    second = desk.tier(tmp_path / "d", piece_tokens=60)
    assert desk.bring(second, text) == []
    assert second.stats.removed == 2
    assert files(tmp_path / "d") == [path.parent / ".2-new.tmp"], "somebody may be writing that one"
    assert (tmp_path / "elsewhere").exists() is (harm == "link"), "what a link leads to is not ours"


def test_a_piece_that_cannot_be_written_leaves_nothing(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = desk.tier(tmp_path)

    def failing(*_: object) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr(Path, "replace", failing)
    tier.write(stretch(tuple(range(60))))
    desk.settle(tier)
    assert files(tmp_path) == []


def test_a_file_that_was_replaced_by_another_is_not_believed(desk: Desk, tmp_path: Path) -> None:
    tier = desk.tier(tmp_path, piece_tokens=60)
    text = tuple(range(60))
    tier.write(stretch(text))
    desk.settle(tier)
    (path,) = files(tmp_path)
    piece = prefix_file.read(path)
    another = prefix_file.Piece(dataclasses.replace(piece.head, skipped=7), piece.runs, piece.rest)
    prefix_file.write(path.parent, another)
    assert desk.bring(tier, text) == []
    assert not path.exists()


def test_a_cache_that_fails_is_emptied_and_the_row_goes_on(desk: Desk, tmp_path: Path) -> None:
    tier = desk.tier(tmp_path)
    text = tuple(range(60))
    tier.write(stretch(text))
    desk.settle(tier)

    class Failing(PrefixCache):
        def adopt(self, stretch: Stretch) -> bool:
            raise RuntimeError("no memory")

    ready: list[str] = []
    waiting = Restoring(Failing(max_bytes=1 << 20), tier, ready=ready.append)
    assert waiting.begin("row", "k", (*text, 1))
    assert waiting.rows == ["row"]
    desk.until(lambda: bool(ready))
    assert (ready, waiting.rows) == (["row"], [])
    assert not waiting.begin("row", "k", text[:5])


def test_the_worker_s_flags_make_the_tier_and_all_that_state_depends_on_tells_it_apart(
    desk: Desk, models: dict[str, Path], tmp_path: Path
) -> None:
    needed = ["--model", str(models["llama"]), "--model-id", "m", "--address", "unix:/x"]
    identity = Identity(models["llama"])
    assert process._disk(process._parse(needed), identity, STORED) is None
    flags = [*needed, "--prefix-disk", str(tmp_path), "--prefix-disk-bytes", "1000"]
    assert process._disk(process._parse(flags[:-2]), identity, STORED) is None
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def name(how: Plan, layout: Layout, *more: str) -> str:
        make = process._disk(process._parse([*flags, *more]), identity, how)
        assert make is not None
        tier = make(layout, calls.put)
        desk.tiers.append(tier)
        if identity.digest:
            calls.get(timeout=10)()
        assert tier.writes_finished is bool(more)
        return tier._identity

    runs = Layout([KVCache()])
    assert name(STORED, runs) == "", "the digest is not known yet"
    identity.learn()
    names = [
        name(STORED, runs),
        name(Plan(is_float32=True), runs),
        name(STORED, Layout([KVCache(), KVCache()]), "--prefix-disk-write", "finished"),
    ]
    assert len(set(names)) == 3
    assert all(names)
