"""Tokens of texts to embed, made on a thread of their own.

The tokenizer is used without its settings for truncation and padding: many
folders hold those of a training run, and a text that is cut without a word is
an embedding of another text.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer

from forebay.kit.failure import ModelLoadFailed

CHUNK = 256
"""Texts that are tokenised in one go: then other callers have their turn."""


SMALL = 2000
"""Characters that are tokenised at once, in less time than another thread takes to begin."""


class Texts:
    """Turns texts into tokens.

    Args:
        path: the model's folder.
        token_count: most tokens of a text, for texts that are to be cut.
    """

    def __init__(self, path: Path, token_count: int) -> None:
        self._path = path
        self._token_count = token_count
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlx-texts")
        self._whole: Tokenizer
        self._cutting: Tokenizer

    async def load(self) -> None:
        """Reads the tokenizer.

        Raises:
            ModelLoadFailed: it cannot be read.
        """
        await asyncio.get_running_loop().run_in_executor(self._pool, self._load)

    def close(self) -> None:
        """Ends the thread when what it does is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def tokens(self, texts: Sequence[str], *, cut: bool = False) -> list[bytes]:
        """Returns the tokens of each text, with the model's special ones, four bytes each.

        Args:
            texts: the texts.
            cut: whether each is cut to as many tokens as the model takes.
        """
        if sum(map(len, texts)) <= SMALL:
            return self._encode(texts, cut)
        loop = asyncio.get_running_loop()
        found: list[bytes] = []
        for i in range(0, len(texts), CHUNK):
            found += await loop.run_in_executor(self._pool, self._encode, texts[i : i + CHUNK], cut)
        return found

    def _encode(self, texts: Sequence[str], cut: bool) -> list[bytes]:
        tokenizer = self._cutting if cut else self._whole
        return [array("i", found.ids).tobytes() for found in tokenizer.encode_batch(list(texts))]

    def _load(self) -> None:
        file = self._path / "tokenizer.json"
        try:
            self._whole, self._cutting = Tokenizer.from_file(str(file)), Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the base class itself
            raise ModelLoadFailed(
                f"{self._path.name}: its tokenizer.json cannot be read: {error}",
                metadata={"model": self._path.name},
            ) from error
        for tokenizer in (self._whole, self._cutting):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        if self._token_count:
            self._cutting.enable_truncation(self._token_count)
