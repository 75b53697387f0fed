"""Prompts of exactly the asked number of tokens, by the served model's own tokenizer.

The server's `/tokenize` and `/detokenize` do the counting; a tokenizer folder stands in where the
server has no such routes. Every prompt starts differently, so that none is answered from a cache
of computed prefixes, unless that is asked for.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Protocol

from benchmarks.apis import Prompt, describe_refusal
from benchmarks.http_client import HttpClient, HttpFailure

MAX_TRIES = 60
FILLERS = (" a", " time", ".", " x", "\n", " 1", "!", "e")


class PromptError(ValueError):
    """Prompts that cannot be made; the message is one line with cause and cure."""


class TextCodec(Protocol):
    """Text to tokens and back, special tokens of a plain prompt included in the count."""

    async def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, as the server would count them."""
        ...

    async def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special tokens left out."""
        ...


class ServerCodec:
    """The server's own routes."""

    def __init__(self, client: HttpClient, model: str | None) -> None:
        self._client = client
        self._model = {"model": model} if model else {}

    async def encode(self, text: str) -> list[int]:
        return (await self._ask("/tokenize", {"prompt": text}))["tokens"]

    async def decode(self, tokens: list[int]) -> str:
        answer = await self._ask("/detokenize", {"tokens": tokens})
        return answer["prompt"] if "prompt" in answer else answer["text"]

    async def _ask(self, path: str, body: dict) -> dict:
        response = await self._client.post(path, json.dumps(self._model | body).encode())
        if response.status != 200:
            raise HttpFailure(f"{path} answered {describe_refusal(response)}")
        return json.loads(response.body)


class LocalCodec:
    """A tokenizer folder or tokenizer.json on this machine."""

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise PromptError(
                f"--tokenizer: {file} is not there; name a folder with tokenizer.json"
            )
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise PromptError(
                "--tokenizer needs the tokenizers package: pip install tokenizers"
            ) from error
        self._tokenizer = Tokenizer.from_file(str(file))

    async def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    async def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)


async def find_codec(client: HttpClient, model: str | None, tokenizer: str | None) -> TextCodec:
    """The local tokenizer if one is named, else the server's routes. Raises PromptError."""
    if tokenizer is not None:
        return LocalCodec(Path(tokenizer))
    codec = ServerCodec(client, model)
    try:
        await codec.decode(await codec.encode("one two"))
    except (HttpFailure, ValueError, KeyError, TypeError) as error:
        raise PromptError(
            f"the server cannot count tokens for us ({error}): name its tokenizer's folder, "
            "--tokenizer DIR"
        ) from error
    return codec


async def fit(codec: TextCodec, text: str, num_tokens: int) -> str:
    """Cut or repeat a text until it has exactly `num_tokens` tokens. Raises PromptError."""
    text = text.strip()
    tokens = await codec.encode(text)
    while len(tokens) < num_tokens:
        text = f"{text} {text}"
        tokens = await codec.encode(text)
    # Cutting between tokens and reading the text again may give another count: words merge anew.
    # So aim, look, aim again; then nudge with short pieces.
    kept = num_tokens
    best = ""
    for _ in range(8):
        candidate = await codec.decode(tokens[:kept])
        count = len(await codec.encode(candidate))
        if count == num_tokens:
            return candidate
        if count < num_tokens:
            best = max(best, candidate, key=len)
        kept = max(1, min(len(tokens), kept + num_tokens - count))
    for filler in FILLERS * (MAX_TRIES // len(FILLERS)):
        count = len(await codec.encode(best + filler))
        if count == num_tokens:
            return best + filler
        if count < num_tokens:
            best += filler
    raise PromptError(
        f"no text of exactly {num_tokens} tokens could be made with this tokenizer: "
        "try another --prompt_length"
    )


class PromptMaker:
    """Makes prompts of one length, each with a beginning of its own."""

    def __init__(
        self, codec: TextCodec, folder: Path, num_tokens: int, *, same_prompt: bool = False
    ) -> None:
        file = folder / f"{num_tokens}.txt"
        if not file.is_file():  # another length: cut from the longest text
            file = folder / "2048.txt"
        if not file.is_file():
            raise PromptError(f"{file} is not there: it comes with the repository")
        self._codec = codec
        self._words = file.read_text(encoding="utf-8").split(" ")
        self._num_tokens = num_tokens
        self._same_prompt = same_prompt
        self._salt = f"{random.SystemRandom().randrange(16**4):04x}"
        self._num_made = 0

    async def make(self, max_new_tokens: int, overhead: int = 0) -> Prompt:
        """The next prompt; `overhead` tokens are added by the server's chat template."""
        wanted = self._num_tokens - overhead
        if wanted < 1:
            raise PromptError(
                f"--prompt_length {self._num_tokens}: the chat template alone has {overhead} tokens"
            )
        start = 0 if self._same_prompt else self._num_made * 7 % len(self._words)
        self._num_made += not self._same_prompt
        text = " ".join(self._words[start:] + self._words[:start])
        if wanted >= 24 and not self._same_prompt:
            text = f"{self._salt}-{self._num_made}: {text}"
        return Prompt(await fit(self._codec, text, wanted), max_new_tokens, self._num_tokens)


def read_dataset(path: Path, max_new_tokens: int) -> list[Prompt]:
    """Prompts from a file: JSON lines with "prompt", ShareGPT's JSON, or plain text by lines.

    A JSON line may say "max_tokens" (or "max_new_tokens", "output_len") for itself.

    Raises:
        PromptError: when the file cannot be read or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"--dataset {path}: cannot be read ({error})") from error
    if path.suffix == ".json":
        records = _parse_json(path, text)
        if not isinstance(records, list):
            raise PromptError(f"--dataset {path}: expected a JSON list of records")
    elif path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        records = [_parse_json(path, line, f"line {n}: ") for n, line in lines if line.strip()]
    else:
        records = [{"prompt": line} for line in text.splitlines() if line.strip()]
    prompts = [prompt for record in records if (prompt := _to_prompt(record, max_new_tokens))]
    if prompts and len(prompts) < len(records):
        left_out = len(records) - len(prompts)
        print(
            f"--dataset {path}: {left_out} of {len(records)} records hold no prompt and are left "
            "out",
            file=sys.stderr,
        )
    if not prompts:
        raise PromptError(f'--dataset {path}: no prompt found; write lines of {{"prompt": "..."}}')
    return prompts


def _parse_json(path: Path, text: str, place: str = "") -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PromptError(f"--dataset {path}: {place}not JSON ({error})") from error


def _to_prompt(record: object, max_new_tokens: int) -> Prompt | None:
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        return None
    text = record.get("prompt")
    answer = None
    turns = record.get("conversations")
    if text is None and isinstance(turns, list):
        values = [turn.get("value") for turn in turns[:2] if isinstance(turn, dict)]
        text, answer = (*values, None, None)[:2]
        answer = answer if isinstance(answer, str) else None
    if not isinstance(text, str) or not text.strip():
        return None
    for name in ("max_tokens", "max_new_tokens", "output_len"):
        if isinstance(record.get(name), int) and record[name] > 0:
            return Prompt(text, record[name])
    return Prompt(text, max_new_tokens, answer=answer)
