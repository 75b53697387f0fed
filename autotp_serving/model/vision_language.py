"""The language model inside a vision-language checkpoint, which is served alone. Every rank.

Such a checkpoint holds an ordinary decoder, under another name and beside a vision tower. The
decoder's config is taken out of the wrapper's, and its tensors are found under the names that the
wrapper gives them; what belongs to images is not read.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotp_serving.config import ConfigError
from autotp_serving.model_folder import INDEX_NAME, MAX_LARGE_BYTES, find_file, read_object

if TYPE_CHECKING:  # --plan asks here before torch could be imported
    from autotp_serving.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

WRAPPERS = (
    *("gemma3", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
    *("llava", "llava_next", "llava_onevision", "internvl", "kimi_k25"),
)
"""Families in which an image is a run of embeddings in the text, and nothing else."""

SAME_DECODER = {
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""Decoders of a name of their own, and the family that computes the same for text: the three
positions of a token, in time, height and width, are one there."""

HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight")

VISION_NAMES = re.compile(
    r"(model\.)?"
    r"(vision_tower|vision_model|visual|multi_modal_projector|mm_projector|image_newline)\b"
)
"""How the tensors begin that no text needs."""

MARK = "wrapper_model_type"
"""Attribute of the decoder's config: the family of the wrapper that it was in."""


def take_language_model(model_config: Any, folder: Path) -> Any:
    """The config of the decoder in a vision-language model's; any other config as it is.

    Args:
        model_config: as transformers has read config.json.
        folder: of the checkpoint, whose names of tensors tell whether the head is tied.

    Raises:
        ConfigError: the decoder is of a family that transformers has no language model of.
    """
    family = model_config.model_type
    if family not in WRAPPERS:
        return model_config
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = model_config.get_text_config()
    if text.model_type in SAME_DECODER:
        settings = {**text.to_dict(), "model_type": SAME_DECODER[text.model_type]}
        for name in ("rope_parameters", "rope_scaling"):
            if name in settings:
                settings[name] = _drop_axes(settings[name])
        text = AutoConfig.for_model(**settings)
    if text is model_config or text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"the family '{family}' cannot be served: its text_config is a '{text.model_type}', of "
            "which there is no language model"
        )
    tied = getattr(model_config, "tie_word_embeddings", None)
    if tied is None:
        tied = getattr(text, "tie_word_embeddings", False)
    # Wrappers of some versions say that the head is tied, while its tensor is there.
    text.tie_word_embeddings = bool(tied) and not set(HEAD_NAMES) & _list_names(folder)
    quantization = getattr(model_config, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = quantization
    setattr(text, MARK, family)
    return text


def _drop_axes(rope: Any) -> Any:
    """Rotary settings without those that tell an image's axes apart."""
    if not isinstance(rope, dict):
        return rope
    kept = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
    kinds = {kept.pop(name, "default") for name in ("type", "rope_type")} - {"mrope", "default"}
    return {**kept, "rope_type": min(kinds, default="default")}


def _list_names(folder: Path) -> set[str]:
    """Names of the checkpoint's tensors; none where there are no weights, as --plan allows."""
    if (folder / INDEX_NAME).exists():
        weight_map = read_object(find_file(folder, INDEX_NAME), MAX_LARGE_BYTES).get("weight_map")
        return set(weight_map) if isinstance(weight_map, dict) else set()
    if (folder / "model.safetensors").exists():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(find_file(folder, "model.safetensors"), framework="np") as tensors:
                return set(tensors.keys())
        except (SafetensorError, OSError):  # whoever reads the weights says what is wrong
            return set()
    return set()


def hide_vision_tensors(model_config: Any, checkpoint: Checkpoint, *, is_told: bool) -> None:
    """Leave out what only images need.

    Args:
        model_config: of `take_language_model`.
        is_told: say so in one line.
    """
    family = getattr(model_config, MARK, None)
    if family is None:
        return
    names = {name for name in checkpoint.names() if VISION_NAMES.match(name)}
    if not names:
        return
    checkpoint.hide(names)
    if is_told:
        logger.info(
            "'%s' is served as the language model in it (%s), for text alone: %d tensors of its "
            "vision part are not read",
            family,
            model_config.model_type,
            len(names),
        )
