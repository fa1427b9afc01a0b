"""Models that Ollama fetched are served under their names there, and what is wrong with one is said."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import ModelLoadFailed, ModelNotFound
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.front import MlxEngine
from forebay.mlx_service.ollama_store import Found, OllamaStore, Problem, ollama_folder
from forebay.mlx_service.registry import Imports, Registry, Root
from forebay.mlx_service.service import roots
from forebay.mlx_service.supervisor import Supervisor
from mlx_worker_rig import ask, rig
from tiny_gguf import Quant, write

pytestmark = pytest.mark.mlx

MODEL = "application/vnd.ollama.image.model"
Layer = dict[str, object]


class Store:
    """A made-up models folder of Ollama's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)

    def blob(self, content: bytes, kind: str = MODEL, **more: object) -> Layer:
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / "blobs" / f"sha256-{digest}").write_bytes(content)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content), **more}

    def manifest(
        self, layers: Sequence[Layer], where: str = "manifests/registry.ollama.ai/library/smol/135m"
    ) -> Path:
        return self.put(where, json.dumps({"schemaVersion": 2, "config": {}, "layers": layers}))

    def put(self, where: str, text: str) -> Path:
        path = self.folder / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def models(self) -> list[Found]:
        return list(OllamaStore(self.folder).models())

    @property
    def only(self) -> Found:
        (found,) = self.models()
        return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", quant=Quant.Q8_0).read_bytes()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def registry(store: Store, tmp_path: Path) -> Registry:
    root = Root(path=store.folder, ollama=True)
    return Registry([root], aliases={}, imports=Imports(tmp_path / "imports"))


def silent(step: object) -> None:
    pass


def content(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


async def test_a_model_of_ollama_s_answers_and_ollama_s_folder_stays_as_it_was(
    store: Store, tmp_path: Path, weights: bytes
) -> None:
    other = store.blob(b"{{ .Prompt }}", "application/vnd.ollama.image.template")
    store.manifest([other, store.blob(weights)])
    before = content(store.folder)
    models = registry(store, tmp_path)
    (entry,) = await models.entries()
    listed = entry.to_model("mlx")
    assert (listed.id, listed.state) == ("smol:135m", pb.Model.STATE_AVAILABLE)
    assert (listed.weights.family, listed.weights.quantization) == ("llama", "Q8_0")
    assert listed.weights.format == "gguf"
    assert listed.context_token_count == 256
    assert listed.disk_bytes == listed.memory_bytes == len(weights)
    assert entry.removable is None
    folder = await models.folder(entry, silent)
    async with rig(folder, context=64) as running:
        reply = await running.generate(ask(most=4))
    assert reply.finished.usage.output_token_count == 4
    (entry,) = await models.entries()
    assert entry.facts is not None  # it is known as converted from now on
    assert entry.facts.outline
    assert content(store.folder) == before


def test_names_are_those_that_ollama_shows(store: Store, weights: bytes) -> None:
    layer = store.blob(weights)
    for where in (
        "manifests/registry.ollama.ai/library/a/latest",
        "manifests/registry.ollama.ai/someone/b/1b",
        "manifests/hf.co/bartowski/c-GGUF/Q8_0",
        "manifests-v2/ollama.com/library/d/latest",
        "manifests-v2/localhost%3A5000/library/e/x",
        "manifests/registry.ollama.ai/library/llamacpp/0123",
        "manifests/registry.ollama.ai/library/a/.tmp",
        "manifests/registry.ollama.ai/library/a b/latest",
        "manifests/registry.ollama.ai/stray",
    ):
        store.manifest([layer], where)
    names = sorted(found.name for found in store.models())
    assert names == [
        "a:latest",
        "d:latest",
        "hf.co/bartowski/c-GGUF:Q8_0",
        "localhost:5000/library/e:x",
        "someone/b:1b",
    ]
    assert not any(found.fault for found in store.models())


async def test_a_name_without_its_tag_is_the_latest(store: Store, tmp_path: Path, weights: bytes) -> None:
    store.manifest([store.blob(weights)], "manifests/registry.ollama.ai/library/smol/latest")
    models = registry(store, tmp_path)
    assert (await models.find("smol")).id == "smol:latest"
    assert (await models.find("smol:latest")).aliases == ("smol",)
    with pytest.raises(ModelNotFound):
        await models.find("smol:1b")


def test_the_newer_layout_goes_before_the_older_and_a_dangling_link_back_to_it(
    store: Store, weights: bytes
) -> None:
    store.manifest([], "manifests/registry.ollama.ai/library/smol/135m")
    text = json.dumps({"layers": [store.blob(weights)]}).encode()
    blob = store.folder / "blobs" / str(store.blob(text)["digest"]).replace(":", "-")
    link = store.folder / "manifests-v2/ollama.com/library/smol/135m"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert store.only.fault == ""
    blob.unlink()
    assert store.only.problem is Problem.UNSUPPORTED  # the older one, which has no layers


def test_of_a_list_of_builds_the_gguf_one_is_taken(store: Store, weights: bytes) -> None:
    def build(runner: str, layers: list[Layer]) -> Layer:
        return store.blob(json.dumps({"layers": layers}).encode(), "manifest", runner=runner)

    tensors = [store.blob(b"t", "application/vnd.ollama.image.tensor")]
    listed = {"mediaType": "application/vnd.ollama.manifest.list.v2+json"}
    builds = [build("mlx", tensors), build("llamacpp", tensors), build("GGML", [store.blob(weights)])]
    where = "manifests-v2/ollama.com/library/smol/135m"
    store.put(where, json.dumps({**listed, "manifests": builds}))
    assert store.only.fault == ""
    store.put(where, json.dumps({**listed, "manifests": builds[:1]}))
    assert "no GGUF build" in store.only.fault
    store.put(where, json.dumps({**listed, "manifests": "none"}))
    assert store.only.problem is Problem.UNSUPPORTED


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../etc/passwd",
        "../blobs/x",
        "sha256:" + "a" * 63,
        "sha256:" + "A" * 64,
        "sha256-" + "a" * 64 + "/../x",
        "md5:" + "a" * 32,
        "",
        None,
        7,
    ],
)
def test_what_is_no_digest_never_becomes_a_path(store: Store, digest: object) -> None:
    looked: list[Path] = []
    store.manifest([{"mediaType": MODEL, "digest": digest, "size": 1}])
    (found,) = OllamaStore(store.folder, looked.append).models()
    assert found.problem is Problem.BAD_DIGEST
    assert all(path.is_relative_to(store.folder) and ".." not in path.parts for path in looked)


def test_a_link_that_leads_out_of_the_folder_is_not_followed(
    store: Store, tmp_path: Path, weights: bytes
) -> None:
    layer = store.blob(weights)
    blob = store.folder / "blobs" / str(layer["digest"]).replace(":", "-")
    outside = blob.rename(tmp_path / "outside")
    blob.symlink_to(outside)
    manifest = store.manifest([layer])
    assert store.only.problem is Problem.OUTSIDE
    secret = tmp_path / "secret"
    secret.write_text(manifest.read_text())
    manifest.unlink()
    manifest.symlink_to(secret)
    assert store.only.problem is Problem.OUTSIDE
    assert "leads out" in store.only.fault


def test_folders_may_be_links_to_another_disk(store: Store, tmp_path: Path, weights: bytes) -> None:
    store.manifest([store.blob(weights)])
    disk = (store.folder / "blobs").rename(tmp_path / "disk")
    (store.folder / "blobs").symlink_to(disk)
    assert store.only.fault == ""
    link = tmp_path / "link"
    link.symlink_to(store.folder)
    (found,) = OllamaStore(link).models()
    assert found.fault == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", Problem.BAD_MANIFEST),
        ("[]", Problem.BAD_MANIFEST),
        ("{}", Problem.BAD_MANIFEST),
        ('{"layers": 1}', Problem.BAD_MANIFEST),
        ('{"layers": [1, "x"]}', Problem.UNSUPPORTED),
        ("[" * 100_000, Problem.BAD_MANIFEST),
        (" " * (5 << 20), Problem.BAD_MANIFEST),
    ],
    ids=["cut", "list", "empty", "number", "no layers", "deep", "long"],
)
def test_a_manifest_that_is_none_is_a_model_with_a_reason(store: Store, text: str, problem: Problem) -> None:
    store.put("manifests/registry.ollama.ai/library/smol/135m", text)
    assert store.only.problem is problem
    assert store.only.fault


def test_a_blob_that_is_missing_or_of_another_size_is_said(store: Store, weights: bytes) -> None:
    layer = store.blob(weights)
    blob = store.folder / "blobs" / str(layer["digest"]).replace(":", "-")
    store.manifest([layer])
    blob.write_bytes(weights[:-1])
    assert store.only.problem is Problem.SIZE_MISMATCH
    blob.unlink()
    assert store.only.problem is Problem.MISSING
    assert "fetch it again" in store.only.fault


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["application/vnd.ollama.image.tensor"], "tensor by tensor"),
        (["application/vnd.ollama.image.license"], "runs on another machine"),
        ([MODEL, MODEL], "several files"),
        ([MODEL, "application/vnd.ollama.image.adapter"], "adapter"),
    ],
)
def test_models_of_other_kinds_are_listed_with_a_reason(store: Store, kinds: list[str], words: str) -> None:
    store.manifest([store.blob(str(i).encode(), kind) for i, kind in enumerate(kinds)])
    assert store.only.problem is Problem.UNSUPPORTED
    assert words in store.only.fault


async def test_weights_and_architectures_that_cannot_be_converted_say_which_they_are(
    store: Store, tmp_path: Path
) -> None:
    quantized = write(tmp_path / "a.gguf", quant=Quant.Q5_0).read_bytes()
    store.manifest([store.blob(quantized)], "manifests/registry.ollama.ai/library/quant/5")
    other = write(tmp_path / "b.gguf", architecture="gemma3").read_bytes()
    store.manifest([store.blob(other)], "manifests/registry.ollama.ai/library/arch/1b")
    store.manifest([store.blob(b"no gguf")], "manifests/registry.ollama.ai/library/none/1")
    arch, none, quant = [entry.to_model("mlx") for entry in await registry(store, tmp_path).entries()]
    assert {model.state for model in (arch, none, quant)} == {pb.Model.STATE_FAILED}
    assert "architecture gemma3" in arch.detail
    assert arch.weights.family == "gemma3"
    assert "Q5_0" in quant.detail
    assert quant.weights.quantization == "Q5_0"
    assert "no GGUF file" in none.detail
    # A router sends nobody here for it: Ollama itself may have it.
    assert quant.capabilities[0].capability == pb.CAPABILITY_GENERATE
    assert quant.capabilities[0].support == pb.CapabilityReport.SUPPORT_NO


def test_a_model_that_sees_is_served_without_its_eyes_and_says_so(store: Store, weights: bytes) -> None:
    eyes = store.blob(b"eyes", "application/vnd.ollama.image.projector")
    store.manifest([store.blob(weights), eyes])
    assert store.only.fault == ""
    assert "images are not read" in store.only.note


async def test_a_blob_that_is_not_what_its_name_says_is_refused_when_it_is_loaded(
    store: Store, tmp_path: Path, weights: bytes
) -> None:
    layer = store.blob(weights)
    blob = store.folder / "blobs" / str(layer["digest"]).replace(":", "-")
    blob.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    store.manifest([layer])
    models = registry(store, tmp_path)
    (entry,) = await models.entries()
    assert not entry.fault  # reading gigabytes to list a name would be too dear
    for _ in range(2):  # the second time its digest is known
        with pytest.raises(ModelLoadFailed, match="damaged") as caught:
            await models.folder(entry, silent)
        assert caught.value.metadata["problem"] == "DIGEST_MISMATCH"
    assert not list((tmp_path / "imports").glob("*/config.json"))


async def test_asking_for_a_model_that_cannot_be_served_names_the_problem(
    store: Store, tmp_path: Path
) -> None:
    store.manifest([{"mediaType": MODEL, "digest": "sha256:../x", "size": 1}])
    settings = MlxSettings(cache_dir=tmp_path, fetch_default_model=False)
    engine = MlxEngine(
        settings,
        registry=registry(store, tmp_path),
        supervisor=Supervisor(settings, launch=None),  # type: ignore[arg-type]  # nothing is launched
        hub_cache=tmp_path,
    )
    with pytest.raises(ModelLoadFailed, match="no digest") as caught:
        await engine._source("smol:135m")
    assert caught.value.metadata == {"model": "smol:135m", "problem": "BAD_DIGEST"}


async def test_a_model_that_ollama_fetches_or_removes_is_seen(
    store: Store, tmp_path: Path, weights: bytes
) -> None:
    models = registry(store, tmp_path)
    assert await models.entries() == []
    manifest = store.manifest([store.blob(weights)])
    assert [entry.id for entry in await models.entries()] == ["smol:135m"]
    manifest.unlink()
    assert await models.entries() == []


def test_a_file_that_vanishes_meanwhile_is_a_model_with_a_reason(
    store: Store, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.manifest([store.blob(weights)])

    def vanish(self: OllamaStore, layer: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(OllamaStore, "_blob", vanish)
    assert store.only.problem is Problem.MISSING


def test_the_folder_is_ollama_s_own_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ollama_folder({"OLLAMA_MODELS": "/data/ollama"}) == Path("/data/ollama")
    assert ollama_folder({}) == Path("~/.ollama/models").expanduser()
    monkeypatch.setitem(os.environ, "OLLAMA_MODELS", "/data/ollama")
    assert Root(path=Path("/data/ollama"), ollama=True) in roots(MlxSettings())
    named = roots(MlxSettings(ollama_folder=tmp_path))
    assert Root(path=tmp_path, ollama=True, required=True) in named
    assert not any(root.ollama for root in roots(MlxSettings(ollama_models=False)))
    assert repr(OllamaStore(tmp_path)) == f"<OllamaStore {tmp_path}>"
