"""Output formats, enforced: tokens that would leave the format get no probability.

llguidance says which tokens may come next; its own mlx kernel needs Metal, so
the mask is applied here, the same way on every device. What cannot be compiled
is refused before anything is generated.
"""

from __future__ import annotations

from collections import OrderedDict

import llguidance
import llguidance.hf
import numpy as np

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import CapabilityUnsupported, InvalidRequest, printable
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array, Processor
from forebay.mlx_service.worker.words import Language, Words

KEPT = 32
"""Compiled grammars that are kept. An application asks with a handful of schemas again and again."""

WHITESPACE = r"[ \n]{0,40}"
"""White space between JSON tokens. Bounded, or a weak model writes blanks inside valid JSON until its limit;
40 characters indent ten levels by four."""

_NOTHING_FOLLOWS = "NoExtensionBias"
"""How llguidance's message begins where no token can come next."""

LEXER_FUEL = 200_000
"""Most work that llguidance may put into a format's regular expressions. What needs more takes seconds a
step, in which every other reply stands still; schemas of thousands of lines need less."""


class Grammar:
    """A compiled format, good for any number of replies.

    Args:
        matcher: at the beginning of the format.
        language: tells the tokens that end a reply, and those around reasoning, which is free of the format.
        is_thinking: whether replies begin inside reasoning.
    """

    def __init__(self, matcher: llguidance.LLMatcher, language: Language, *, is_thinking: bool) -> None:
        self._matcher = matcher
        self._language = language
        self._is_thinking = is_thinking

    def processor(self, prompt_count: int) -> Processor:
        """Returns a processor for one reply."""
        matcher = self._matcher.deep_copy()
        return _Follow(matcher, self._language, position=prompt_count, is_thinking=self._is_thinking)


class _Follow:
    """Follows one reply through its format."""

    def __init__(
        self, matcher: llguidance.LLMatcher, language: Language, *, position: int, is_thinking: bool
    ) -> None:
        self._matcher = matcher
        self._ends = sorted(language.end_tokens)
        self._position = position
        self._think_tokens = language.think_tokens
        self._is_thinking = is_thinking
        self._may_think = language.think_tokens is not None and not is_thinking
        self._writes = False

    def __call__(self, tokens: Array, logits: Array) -> Array:
        # Waits for the step before: the next mask depends on the token that it picks.
        for token in tokens[self._position :].tolist():
            self._consume(token)
            self._position += 1
        self._writes = True
        if self._is_thinking:
            return logits
        return mx.where(mx.array(self._allowed(logits.shape[-1]))[None], logits, -mx.inf)

    def _consume(self, token: int) -> None:
        if self._is_thinking:
            assert self._think_tokens is not None
            self._is_thinking = token != self._think_tokens[1]
            self._may_think = False
        elif self._may_think and self._think_tokens is not None and token == self._think_tokens[0]:
            self._is_thinking = True
        else:
            self._may_think = False
            if self._matcher.is_stopped():
                return
            if not self._writes and not self._matcher.validate_tokens([token]):
                raise InvalidRequest(
                    "what the reply holds already does not have the output format",
                    violations=[("continue_from", "does not have the output format")],
                )
            if not self._matcher.consume_token(token):
                raise _too_complex()  # the mask allowed it, so it is the next step that cannot be worked out

    def _allowed(self, width: int) -> np.ndarray:
        allowed = np.zeros(width, bool)  # a model's vocabulary may be padded beyond the tokenizer's
        if self._matcher.is_stopped():
            allowed[self._ends] = True  # the format is complete
            return allowed
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise _too_complex()
        allowed[: min(width, bits.size)] = bits[:width]
        if self._may_think and self._think_tokens is not None:
            allowed[self._think_tokens[0]] = True
        return allowed


class Grammars:
    """Compiles output formats and keeps those used last.

    Args:
        words: the tokenizer, and the thread to compile on.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()

    async def compile(self, wanted: pb.OutputFormat, *, is_thinking: bool) -> Grammar:
        """Returns the format, ready to be followed.

        Args:
            wanted: the format.
            is_thinking: whether the reply begins inside reasoning, which is free of the format.

        Raises:
            InvalidRequest: the format is malformed, or nothing has it.
            CapabilityUnsupported: part of it cannot be enforced, or it is too complex.
        """
        language = self._words.language
        if (language.markers.think_start or is_thinking) and language.think_tokens is None:
            raise CapabilityUnsupported(
                "this model's reasoning is not marked by single tokens, so an output format after it "
                "cannot be enforced",
                metadata={"field": "output_format"},
            )
        matcher = await self._words.run(lambda: self._matcher(wanted))
        return Grammar(matcher, language, is_thinking=is_thinking)

    def _matcher(self, wanted: pb.OutputFormat) -> llguidance.LLMatcher:
        kind = wanted.WhichOneof("constraint") or ""
        key = (kind, str(getattr(wanted, kind)))
        kept = self._kept.get(key)
        if kept is None:
            kept = self._compile(kind, key[1])
            self._kept[key] = kept
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return kept

    def _compile(self, kind: str, text: str) -> llguidance.LLMatcher:
        if self._tokenizer is None:
            self._tokenizer = llguidance.hf.from_tokenizer(
                self._words.tokenizer._tokenizer,  # noqa: SLF001  # the wrapper has no name for what it wraps
                eos_token=sorted(self._words.language.end_tokens),
            )
        try:
            limits = llguidance.LLParserLimits(initial_lexer_fuel=LEXER_FUEL)
            matcher = llguidance.LLMatcher(self._tokenizer, _grammar(kind, text), log_level=0, limits=limits)
        except ValueError as error:
            raise _malformed(kind, str(error)) from error
        if matcher.is_error():
            raise _malformed(kind, matcher.get_error())
        warnings = matcher.get_grammar_warnings()
        if warnings:
            raise CapabilityUnsupported(
                f"part of the output format cannot be enforced: {printable(warnings[0])[:200]}",
                metadata={"field": f"output_format.{kind}"},
            )
        self._try(kind, matcher)
        return matcher

    def _try(self, kind: str, matcher: llguidance.LLMatcher) -> None:
        """Takes the first step into a format: much is built only then, and not on the engine's thread."""
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if matcher.is_error():
            if matcher.get_error().startswith(_NOTHING_FOLLOWS):
                raise _malformed(kind, "no reply has this format")
            raise _too_complex(kind)
        ahead = matcher.deep_copy()
        ahead.consume_token(int(bits.argmax()))
        if ahead.is_error():
            raise _too_complex(kind)


def _grammar(kind: str, text: str) -> str:
    grammar: str
    options = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    if kind == "json_schema":
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)
    elif kind == "any_json":
        grammar = llguidance.LLMatcher.grammar_from_json_schema("{}", overrides=options)
    elif kind == "regex":
        grammar = llguidance.LLMatcher.grammar_from_regex(text)
    else:
        grammar = llguidance.LLMatcher.grammar_from_lark(text)
    return grammar


def _too_complex(kind: str = "") -> CapabilityUnsupported:
    field = f"output_format.{kind}" if kind else "output_format"
    return CapabilityUnsupported("the output format is too complex to be followed", metadata={"field": field})


def _malformed(kind: str, error: str) -> InvalidRequest:
    reason = printable(error.strip().splitlines()[0] if error.strip() else "it cannot be compiled")[:200]
    return InvalidRequest(
        f"output_format.{kind} cannot be compiled: {reason}",
        violations=[(f"output_format.{kind}", reason)],
    )
