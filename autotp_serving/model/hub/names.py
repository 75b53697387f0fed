"""Names of models on a hub, and which files of a repository are fetched. One rank of each host.

Only what the server reads: configuration, tokenizer, templates, and one copy of the weights, as
safetensors, or as GGUF where that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from autotp_serving.config import ConfigError
from autotp_serving.model_folder import INDEX_NAME, MAX_LARGE_BYTES, TEMPLATE_FOLDER, read_object
from autotp_serving.pooling import POOLING_FOLDER, SCORE_FOLDER

SINGLE_NAME = "model.safetensors"

SMALL_PATTERNS = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "*.bpe", "*.spm"),
    *("tokenizer*", "vocab*", "merges*", "LICENSE*"),
)
"""What stands beside the weights and is read; `.py` files only with --trust-remote-code."""
NEVER = ("*.bin", "*.bin.index.json", "*.h5", "*.msgpack", "*.onnx", "*.pt", "*.pth", "*.gguf")
"""The weights in formats that are not read; GGUF files are chosen on their own."""
BESIDE_GGUF = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files that stand in for what a GGUF file says of its tokenizer."""

NAME = re.compile(
    r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?::(?P<quant>[\w.-]+)|/(?P<file>[\w. /-]+\.gguf))?"
)
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class HubName:
    """A model's name, as given on the command line.

    Attributes:
        repo: organisation/name.
        quant: kind of quantization of the GGUF file that is asked for, such as Q4_K_M.
        file: the GGUF file that is asked for, by its path in the repository.
    """

    text: str
    repo: str
    quant: str | None
    file: str | None

    @property
    def wants_gguf(self) -> bool:
        """Whether it names a GGUF file rather than safetensors."""
        return self.quant is not None or self.file is not None


def parse_hub_name(text: str) -> HubName | None:
    """Read `organisation/name`, `organisation/name:QUANT` or `organisation/name/FILE.gguf`.

    Returns:
        None for anything else, which can only be a path.
    """
    match = NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"] or match["repo"].endswith(".git"):
        return None
    return HubName(text, match["repo"], match["quant"], match["file"])


def choose_small_files(sizes: dict[str, int], *, with_code: bool) -> list[str]:
    """Names of configuration, tokenizer, templates and licences.

    Args:
        sizes: bytes of all files of the repository, by name.

    Raises:
        ConfigError: one of them is too large to be what its name says.
    """
    patterns = (*SMALL_PATTERNS, "*.py") if with_code else SMALL_PATTERNS
    chosen = []
    for name in sorted(sizes):
        folder, _, last = name.rpartition("/")
        if folder == TEMPLATE_FOLDER:
            wanted = fnmatch(last, "*.jinja")
        elif folder in (POOLING_FOLDER, SCORE_FOLDER):
            wanted = last == "config.json"
        else:
            wanted = (not folder or (with_code and name.endswith(".py"))) and any(
                fnmatch(last, pattern) for pattern in patterns
            )
        if wanted and not any(fnmatch(last, pattern) for pattern in (*NEVER, "*.safetensors")):
            if sizes[name] > MAX_LARGE_BYTES:
                raise ConfigError(
                    f"{name:.200} of this repository has {sizes[name] >> 20} MiB, and such a file "
                    f"may have {MAX_LARGE_BYTES >> 20}: it is no model that can be served"
                )
            chosen.append(name)
    return chosen


def list_index(path: Path) -> list[str]:
    """Names of the files that an index of weights names.

    Raises:
        ConfigError: it is no index, or a name leads out of the repository.
    """
    try:
        names = sorted(set(read_object(path, MAX_LARGE_BYTES)["weight_map"].values()))
        is_good = all(
            one.endswith(".safetensors") and ".." not in one.split("/") and one[0] != "/"
            for one in names
        )
    except (KeyError, TypeError, AttributeError, IndexError):
        is_good = False
    if not is_good:
        raise ConfigError(f"{path} is no safetensors index: the repository is damaged")
    return names


def choose_gguf(sizes: dict[str, int], name: HubName) -> list[str]:
    """The GGUF file that is asked for, or all parts of one that is split.

    Raises:
        ConfigError: there is none, or several; names what there is.
    """
    files = sorted(one for one in sizes if one.endswith(".gguf") and "mmproj" not in one)
    if name.file is not None:
        found = [one for one in files if one == name.file]
    else:
        quant = re.escape(name.quant or "")
        found = [
            one
            for one in files
            if re.search(rf"(^|[-._/]){quant}([-._/]|$)", one[: -len(".gguf")], re.IGNORECASE)
        ]
    sets = {SPLIT.sub("", one): one for one in reversed(found)}
    if len(sets) != 1:
        there = ", ".join(one.rpartition("/")[2] for one in files if not _is_later_part(one))
        wanted = f"'{name.file or name.quant}' names {len(sets)} of them"
        raise ConfigError(
            f"{name.repo} holds "
            + (f"the GGUF files {there:.600}: {wanted}" if files else f"no GGUF files: {wanted}")
            + f", name one as {name.repo}/FILE.gguf"
        )
    stem, first = next(iter(sets.items()))
    return [one for one in found if SPLIT.sub("", one) == stem] if SPLIT.search(first) else [first]


def _is_later_part(name: str) -> bool:
    match = SPLIT.search(name)
    return match is not None and int(match[1]) > 1


def find_missing(folder: Path, names: Iterable[str]) -> list[str]:
    """Which of the names are no files of the folder; a link to nothing is none."""
    return [name for name in names if not (folder / name).is_file()]


def is_complete(folder: Path, needs_weights: bool) -> bool:
    """Whether a folder holds a checkpoint with all its weights."""
    if not (folder / "config.json").is_file():
        return False
    if not needs_weights or (folder / SINGLE_NAME).is_file():
        return True
    index = folder / INDEX_NAME
    return index.is_file() and not find_missing(folder, list_index(index))


def refuse_without_safetensors(name: HubName, files: Iterable[str]) -> ConfigError:
    """Why a repository cannot be served whose weights are no safetensors."""
    files = list(files)
    quants = [one for one in files if one.endswith(".gguf") and not _is_later_part(one)]
    if quants:
        there = ", ".join(one.rpartition("/")[2] for one in quants)
        return ConfigError(
            f"{name.repo} holds its weights as GGUF ({there:.600}): name one of them, as "
            f"{name.repo}/{quants[0]}"
        )
    if any(one.endswith((".bin", ".pt", ".pth")) for one in files):
        return ConfigError(
            f"{name.repo} holds pickled weights only, which can run code when loaded: choose a "
            "--revision with safetensors, or convert them (save_pretrained in transformers does)"
        )
    return ConfigError(f"{name.repo} holds no safetensors: is it a model for text?")
