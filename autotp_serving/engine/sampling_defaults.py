"""How a model's makers want it sampled, by its generation_config.json. Rank 0 only.

As in vLLM, the OpenAI routes take from there what a request leaves out. The native routes, and
scripts, stay greedy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autotp_serving.model_folder import read_object
from autotp_serving.request import RequestError, SamplingParams

logger = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": (),
}
"""Settings that change which token is taken and are not done here, with values that ask nothing."""


@dataclass(frozen=True)
class SamplingDefaults:
    """What a field of an OpenAI request is taken for where the request has none.

    Attributes: see SamplingParams; in the same ranges.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_sampling_defaults(folder: Path, source: str) -> SamplingDefaults:
    """The defaults of a model folder.

    A value that no request could have is left out, and named in one line.

    Args:
        source: as --generation-config has it: "auto" reads the file, "none" does not.

    Raises:
        ModelFolderError: a file that is no JSON object.
    """
    path = folder / FILE_NAME
    if source == "none" or not path.exists():
        return SamplingDefaults()
    found = read_object(path)
    kept: dict[str, float | int] = {}
    wrong = []
    for one in fields(SamplingDefaults):
        value = found.get(one.name)
        if value is None:
            continue
        try:
            kept[one.name] = _check(one.name, value)
        except RequestError as error:
            wrong.append(f"{one.name} ({error})")
    if wrong:
        logger.warning("%s is not followed in %s", path, ", ".join(wrong))
    unknown = [
        name
        for name, neutral in NEUTRAL.items()
        if (value := found.get(name)) not in (None, [], {}) and value not in neutral
    ]
    if unknown:
        logger.warning("%s asks for %s, which is not done here", path, ", ".join(unknown))
    defaults = SamplingDefaults(**kept)  # type: ignore[arg-type]
    if defaults != SamplingDefaults():
        logger.info(
            "Sampling defaults of /v1, from %s: %s (--generation-config none: without)",
            FILE_NAME,
            ", ".join(f"{name} {value}" for name, value in kept.items()),
        )
    return defaults


def _check(name: str, value: Any) -> float | int:
    """The value as a request would have it. Raises RequestError where none could."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(name, f"must be a number, not {value}")
    if name == "top_k" and value == -1:  # all of them, as the OpenAI routes take it
        value = 0
    checked: float | int = getattr(SamplingParams(**{name: value}), name)
    return checked
