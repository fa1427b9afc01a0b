"""`forebay chat` and `forebay embed`: ask the mesh something."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from forebay.cli import command, problems, render
from forebay.cli.choose import with_model
from forebay.cli.client import DEFAULT_ADDRESS, Client, connected
from forebay.cli.problems import ExitCode, Problem
from forebay.cli.render import AnswerView, Reply
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure

HELP = """\
/reset         forget the conversation
/system TEXT   set the instructions; without TEXT, show them
/model NAME    use another model; without NAME, show it
/exit          leave; so does Ctrl-D, and Ctrl-C at the prompt"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How the user wants to be answered."""

    model: str = ""
    backend: str = ""
    system: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    continuation: bool = False
    timeout: float | None = None
    quiet: bool = False
    as_json: bool = False

    def request(self, messages: list[pb.Message], model: str) -> pb.GenerateRequest:
        """Returns the request for the next answer in a conversation."""
        request = pb.GenerateRequest(model=model)
        if self.system:
            request.messages.append(message(pb.ROLE_SYSTEM, self.system))
        request.messages.extend(messages)
        if self.temperature is not None:
            request.sampling.temperature = self.temperature
        if self.seed is not None:
            request.sampling.seed = self.seed
        if self.max_tokens is not None:
            request.limits.max_output_token_count = self.max_tokens
        request.limits.stop_sequences.extend(self.stop)
        # A person waits at the other end of this command.
        request.routing.priority = pb.PRIORITY_INTERACTIVE
        if self.backend:
            request.routing.backends.append(self.backend)
        request.routing.fallback_models.extend(self.fallback)
        if self.continuation:
            request.routing.continuation = pb.CONTINUATION_POLICY_SAME_WEIGHTS
        return request


def message(role: pb.Role.ValueType, text: str) -> pb.Message:
    """Returns a message of one text."""
    return pb.Message(role=role, parts=[pb.Part(text=text)])


async def answer(client: Client, messages: list[pb.Message], wishes: Wishes) -> Reply:
    """Asks for one answer and shows it as it comes.

    Raises:
        Failure: the call failed. What came before was shown, and is marked as a beginning only.
        Problem: nothing answers, or there is no model to ask.
    """
    view = AnswerView(quiet=wishes.quiet or wishes.as_json)

    def show(event: pb.GenerateResponse) -> None:
        if wishes.as_json:
            print(json.dumps(render.as_json(event), ensure_ascii=False), flush=True)
            view.note_only(event)
        else:
            view.show(event)

    async def attempt(model: str) -> None:
        await client.generate(wishes.request(messages, model), show, timeout=wishes.timeout)

    try:
        await with_model(client, wishes.model, pb.CAPABILITY_GENERATE, attempt, backend=wishes.backend)
    except BaseException:
        view.close()
        if view.reply.text and not wishes.as_json:
            render.note("[the answer stops here: it is not complete]", style="yellow")
        raise
    view.close()
    if not wishes.quiet and not wishes.as_json:
        render.note(view.reply.summary())
    return view.reply


@dataclass(slots=True)
class Conversation:
    """A chat at a terminal: what was said, and the commands that begin with a slash."""

    wishes: Wishes
    history: list[pb.Message] = field(default_factory=list)

    def slash(self, line: str) -> bool:
        """Obeys a line that begins with a slash. Returns whether to go on."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word == "/reset":
            self.history.clear()
            render.note("the conversation is forgotten")
        elif word == "/system":
            if rest:
                self.wishes = replace(self.wishes, system=rest)
            render.note(f"system: {self.wishes.system or '(none)'}")
        elif word == "/model":
            if rest:
                self.wishes = replace(self.wishes, model=rest)
            render.note(f"model: {self.wishes.model or '(the mesh picks)'}")
        else:
            render.note(HELP)
        return True

    async def turn(self, client: Client, line: str) -> None:
        """Asks the next question. The turn is remembered only if it was answered in full."""
        question = message(pb.ROLE_USER, line)
        reply = await answer(client, [*self.history, question], self.wishes)
        self.history += [question, message(pb.ROLE_ASSISTANT, reply.text)]


def converse(address: str, wishes: Wishes) -> ExitCode:
    """Chats until the user leaves.

    The loop reads lines outside asyncio and answers inside, so that Ctrl-C
    cancels an answer in progress and, at the prompt, leaves.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  # gives `input` editing and history; only wanted at a terminal
    chat = Conversation(wishes)
    render.note(f"chatting with {address}; /help lists the commands, Ctrl-C stops an answer")
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        client = runner.run(stack.enter_async_context(connected(address)))
        try:
            while (line := _read_line()) is not None:
                if not line:
                    continue
                if line.startswith("/"):
                    if not chat.slash(line):
                        break
                    continue
                try:
                    runner.run(chat.turn(client, line))
                except KeyboardInterrupt:
                    render.note("stopped")
                except Failure as failure:
                    render.problem(problems.from_failure(failure))
                except Problem as problem:
                    render.problem(problem)
        finally:
            runner.run(stack.aclose())
    return ExitCode.OK


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


async def ask_once(address: str, prompt: str, wishes: Wishes) -> None:
    """Asks one question and shows the answer."""
    async with connected(address) as client:
        await answer(client, [message(pb.ROLE_USER, prompt)], wishes)


@command.command
def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask. Without it: standard input where it is piped, else a chat."),
    ] = None,
    address: command.Address = DEFAULT_ADDRESS,
    model: command.Model = "",
    backend: command.BackendName = "",
    system: Annotated[str, typer.Option("--system", "-s", help="Instructions for the model.")] = "",
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", min=0.0, max=2.0, help="0 is greedy.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes the answer repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends the answer. May be given again.")
    ] = None,
    fallback: Annotated[
        list[str] | None,
        typer.Option("--fallback", help="Model to try where the first cannot be served. May be given again."),
    ] = None,
    continuation: Annotated[
        bool,
        typer.Option(
            "--continue", help="Let another backend with equal weights go on if one is lost midway."
        ),
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", exists=True, dir_okay=False, help="Text put below the prompt."),
    ] = None,
    timeout: command.Timeout = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    debug: command.Debug = False,
) -> ExitCode:
    """Ask a question, or chat. The answer goes to stdout, everything about it to stderr."""
    wishes = Wishes(
        model=model,
        backend=backend,
        system=system,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        stop=tuple(stop or ()),
        fallback=tuple(fallback or ()),
        continuation=continuation,
        timeout=timeout,
        quiet=quiet,
        as_json=as_json,
    )
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise Problem(
                "there is nothing on standard input", remedy="give a prompt as argument", code=ExitCode.USAGE
            )
    if file is not None:
        text = file.read_text(encoding="utf-8", errors="replace")
        prompt = f"{prompt}\n\n{text}" if prompt else text
    if prompt is None:
        return converse(address, wishes)
    if not as_json:
        command.run(ask_once(address, prompt, wishes))
        return ExitCode.OK
    try:
        command.run(ask_once(address, prompt, wishes))
    except Failure as failure:
        error = {"reason": failure.reason, "message": failure.message, "metadata": failure.metadata}
        print(json.dumps({"error": error}, ensure_ascii=False), flush=True)
        raise
    return ExitCode.OK


@command.command
def embed(
    texts: Annotated[list[str], typer.Argument(help="Texts to embed.")],
    address: command.Address = DEFAULT_ADDRESS,
    model: command.Model = "",
    backend: command.BackendName = "",
    dimensions: Annotated[
        int | None, typer.Option("--dimensions", min=1, help="Components wanted. Default: all there are.")
    ] = None,
    timeout: command.Timeout = None,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Embed texts. Prints size, norm and first components, or with --json everything."""
    response = command.run(_embed(address, texts, model, backend, dimensions, timeout))
    if as_json:
        print(json.dumps(render.as_json(response), ensure_ascii=False))
        return
    console = render.out()
    for text, embedding in zip(texts, response.embeddings, strict=True):
        values = list(embedding.values)
        norm = math.sqrt(math.fsum(value * value for value in values))
        head = " ".join(f"{value:+.4f}" for value in values[:6])
        dots = " ..." if len(values) > 6 else ""
        label = render.safe(text if len(text) <= 40 else text[:39] + "\N{HORIZONTAL ELLIPSIS}")
        console.print(
            f"{len(values)} components, norm {norm:.4f}  [{head}{dots}]  {label}",
            markup=False,
            soft_wrap=True,
        )
    usage = f", {response.usage.prompt_token_count} tokens" if response.usage.prompt_token_count else ""
    render.note(f"{response.backend} · {response.model}{usage}")


async def _embed(
    address: str,
    texts: list[str],
    model: str,
    backend: str,
    dimensions: int | None,
    timeout: float | None,
) -> pb.EmbedResponse:
    responses: list[pb.EmbedResponse] = []
    async with connected(address) as client:

        async def attempt(name: str) -> None:
            request = pb.EmbedRequest(model=name, texts=texts, dimension_count=dimensions)
            if backend:
                request.routing.backends.append(backend)
            responses.append(await client.embed(request, timeout=timeout))

        await with_model(client, model, pb.CAPABILITY_EMBED, attempt, backend=backend)
    return responses[-1]
