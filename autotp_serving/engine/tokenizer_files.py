"""Loads the tokenizer of a model folder, with the token ids that its own files give. Rank 0 only.

transformers 5 builds some tokenizers anew by the name of their class, with that class's normalizer
and pre-tokenizer in place of those in tokenizer.json. A model was trained with what the file says,
so the file's tokenizer is the one that counts; transformers adds what the file does not have.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_serving.config import ConfigError
from autotp_serving.model_folder import check_model_folder, read_object

logger = logging.getLogger(__name__)

FILE_NAME = "tokenizer.json"

PROBE = (
    "Hello  world! don't WE'LL 1234567890 3.14 x_y(z[0]);\n\n\tdef f():\r\n   naïve cafe\u0301 "
    "Привет, 東京で寿司 한국어 मैं ภาษา العربية 👩‍👩‍👧 🎉\u00a0\u3000<s> </s> [INST] \ufb01 ①² ▁ "
)
"""Text that tokenizers cut in different ways; for what no setting tells."""

MODEL_SETTINGS = (
    *("unk_token", "fuse_unk", "byte_fallback", "ignore_merges"),
    *("continuing_subword_prefix", "end_of_word_suffix", "unk_id"),
)

PLAIN_PROBE = re.sub("<[^>]*>|\\[[^]]*]|▁", "", PROBE)
"""The same without names of special tokens."""

MODEL_NAME = "tokenizer.model"
"""A vocabulary that transformers converts where there is no tokenizer.json: sentencepiece's binary
form, or tiktoken's lines of a token and its rank."""

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A folder's tokenizer.

    Attributes:
        outer: transformers' tokenizer, for chat templates and special tokens.
        inner: the Rust tokenizer that gives the ids.
        special_token_ids: what the file or transformers takes for no text.
    """

    outer: Any
    inner: Any
    special_token_ids: frozenset[int]


def load_tokenizer(folder: Path, trust_remote_code: bool) -> LoadedTokenizer:
    """Load a folder's tokenizer.

    Args:
        folder: of the checkpoint.
        trust_remote_code: run Python code that comes with it; what that makes is left as it is.

    Raises:
        ConfigError: there is none, or only one without a fast implementation.
    """
    check_model_folder(folder)
    from transformers import AutoTokenizer

    try:
        outer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        inner: Any = getattr(outer, "backend_tokenizer", None)
        if inner is None:
            raise ConfigError(
                f"the tokenizer of '{folder}' has no fast implementation: add a tokenizer.json "
                "(save_pretrained of a fast tokenizer writes one)"
            )
        _keep_whole(inner)
        if outer.chat_template is None:
            outer.chat_template = _read_processor_template(folder)
        special = _find_special(inner)
        path = _find_file(folder)
        if not path.exists():
            check_conversion(folder, inner)
            logger.info("There is no %s: transformers has converted the tokenizer", FILE_NAME)
        elif type(outer).__module__.startswith("transformers."):
            inner = _take_file(path, outer, inner)
            outer._tokenizer = inner  # let go of the other one
            special |= _find_special(inner)
    except (KeyboardInterrupt, SystemExit, ConfigError):
        raise
    except BaseException as error:  # the Rust library panics, past every Exception
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"no tokenizer can be loaded from '{folder}' ({type(error).__name__}: {reason}): "
            f"{_find_cure(folder)}"
        ) from error
    return LoadedTokenizer(outer, inner, special)


def _read_processor_template(folder: Path) -> str | None:
    """The chat template of a model that also sees: its processor's, not its tokenizer's."""
    path = folder / "chat_template.json"
    found = read_object(path).get("chat_template") if path.exists() else None
    return found if isinstance(found, str) else None


def _keep_whole(inner: Any) -> None:
    """Neither cut prompts nor fill them up: what a file asks for here is meant for training."""
    inner.no_truncation()
    inner.no_padding()


def _find_special(inner: Any) -> frozenset[int]:
    added = inner.get_added_tokens_decoder()
    return frozenset(number for number, one in added.items() if one.special)


def _find_file(folder: Path) -> Path:
    """The tokenizer.json of a folder; it may have several, for versions of transformers."""
    from transformers.tokenization_utils_base import get_fast_tokenizer_file

    names = _read_config(folder).get("fast_tokenizer_files")
    return folder / (get_fast_tokenizer_file(names) if names else FILE_NAME)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_object(path) if path.exists() else {}


def _find_cure(folder: Path) -> str:
    """What helps where no tokenizer could be loaded."""
    model = folder / MODEL_NAME
    if not (folder / FILE_NAME).exists() and model.exists():
        needed = ("tiktoken",) if _is_tiktoken(model) else ("sentencepiece", "protobuf")
        missing = [name for name in needed if not _is_installed(name)]
        if missing:
            return (
                f"there is no {FILE_NAME}, and to convert {MODEL_NAME} takes "
                f"{' and '.join(missing)}: pip install {' '.join(missing)}"
            )
    return (
        "download its tokenizer files again, or install the version of transformers that wrote them"
    )


def _is_installed(name: str) -> bool:
    try:
        return (
            importlib.util.find_spec("google.protobuf" if name == "protobuf" else name) is not None
        )
    except ModuleNotFoundError:  # of the package that a module would be in
        return False


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return TIKTOKEN_LINE.fullmatch(file.readline(4096)) is not None


def check_conversion(folder: Path, inner: Any) -> None:
    """Refuse a conversion of a sentencepiece model that gives other ids than the model itself.

    Raises:
        ConfigError: naming the file and the cure.
    """
    path = folder / MODEL_NAME
    if not path.exists() or _is_tiktoken(path):
        return
    from sentencepiece import SentencePieceProcessor

    expected = SentencePieceProcessor(model_file=str(path)).encode(PLAIN_PROBE)
    if inner.encode(PLAIN_PROBE, add_special_tokens=False).ids != expected:
        raise ConfigError(
            f"{path} cannot be converted: transformers makes a tokenizer of it that gives other "
            f"token ids. Add the {FILE_NAME} of this model, or name its class (LlamaTokenizer, "
            "GemmaTokenizer) as tokenizer_class in tokenizer_config.json"
        )


def _take_file(path: Path, outer: Any, inner: Any) -> Any:
    """The tokenizer of the file, with the tokens that transformers has added beside it."""
    from tokenizers import Tokenizer

    ours: Any = Tokenizer.from_file(str(path))
    _keep_whole(ours)
    added = ours.get_added_tokens_decoder()
    extra = [
        (number, one)
        for number, one in sorted(inner.get_added_tokens_decoder().items())
        if number not in added
    ]
    ours.add_tokens([one for _, one in extra])
    wrong = [one.content for number, one in extra if ours.token_to_id(one.content) != number]
    if wrong:
        raise ConfigError(
            f"{path.parent}: tokenizer_config.json and {FILE_NAME} disagree on the id of "
            f"{', '.join(map(repr, wrong[:3]))}: download the tokenizer files again"
        )
    differences = _find_differences(ours, inner)
    if differences:
        logger.info(
            "The tokenizer is that of %s: what transformers makes of it as a %s differs (%s)",
            FILE_NAME,
            type(outer).__name__,
            ", ".join(differences),
        )
    bos = outer.bos_token_id
    if _read_config(path.parent).get("add_bos_token") is True and bos not in ours.encode("a").ids:
        logger.info(
            "tokenizer_config.json asks for %s before each text, %s does not put it there: it is "
            "left to prompts and the chat template",
            outer.bos_token,
            FILE_NAME,
        )
    return ours


def _find_differences(ours: Any, theirs: Any) -> list[str]:
    """Names of the parts in which two tokenizers differ."""
    names = [
        name
        for name in ("normalizer", "pre_tokenizer", "decoder")
        if read_state(getattr(ours, name)) != read_state(getattr(theirs, name))
    ]
    if any(
        getattr(ours.model, name, None) != getattr(theirs.model, name, None)
        for name in MODEL_SETTINGS
    ):
        names.append("model settings")
    if not names and ours.encode(PROBE).ids != theirs.encode(PROBE).ids:
        names.append("token ids of a text")
    return names


def read_state(part: Any) -> Any:
    """The settings of one part, in the words of tokenizer.json; None where there is none."""
    return None if part is None else json.loads(part.__getstate__())
