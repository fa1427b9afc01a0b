"""Downloads one repository of the Hugging Face hub; a program of its own, so that it can be ended at once.

It prints JSON lines: `{"total": bytes}`, then `{"path": folder}` or `{"error": kind}`.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Mapping, Sequence

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Weights, configuration and tokenizer. No Python: nothing that is fetched is run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Downloads the repository named first into the cache named second and returns the exit code."""
    repository, cache = sys.argv[1:] if argv is None else argv
    from huggingface_hub import HfApi, errors, snapshot_download  # noqa: PLC0415 - slow, and not for importers

    try:
        info = HfApi().model_info(repository, files_metadata=True)
        files = {file.rfilename: file.size or 0 for file in info.siblings or () if _is_wanted(file.rfilename)}
        if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
            return _fails("no_model", "no config.json with safetensors")
        _say({"total": sum(files.values())})
        path = snapshot_download(
            repository, revision=info.sha, cache_dir=cache, allow_patterns=list(PATTERNS)
        )
    except errors.GatedRepoError as error:
        return _fails("denied", error)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        return _fails("not_found", error)
    except errors.LocalEntryNotFoundError as error:
        return _fails("unreachable", error)
    except Exception as error:  # noqa: BLE001 - the library raises whatever its HTTP client does
        return _fails("unreachable" if _is_connection(error) else "other", error)
    _say({"path": path})
    return 0


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS)


def _is_connection(error: BaseException | None) -> bool:
    """Whether the hub was not reached, by the name of what the HTTP client raised."""
    while error is not None:
        if any(word in type(error).__name__ for word in ("Connect", "Timeout", "Network", "Offline")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fails(kind: str, error: object) -> int:
    _say({"error": kind})
    text = " ".join(str(error).split())
    print(text or type(error).__name__, file=sys.stderr)  # noqa: T201 - read by the process that started us
    return 1


def _say(entry: Mapping[str, object]) -> None:
    print(json.dumps(entry), flush=True)  # noqa: T201 - the lines are an interface


if __name__ == "__main__":
    sys.exit(main())
