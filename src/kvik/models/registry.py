"""From config.json to a `DecoderSpec`: the architectures that Kvik has, and a readable refusal of all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from kvik.errors import ModelLoadError, did_you_mean
from kvik.models.llama import llama_spec
from kvik.models.mistral import mistral_spec
from kvik.models.qwen2 import qwen2_spec
from kvik.models.qwen3 import qwen3_spec
from kvik.models.spec import DecoderSpec
from kvik.quantization.formats import read_quantization

__all__ = ["ARCHITECTURES", "build_spec"]

ARCHITECTURES: Mapping[str, Callable[[Mapping[str, Any]], DecoderSpec]] = MappingProxyType(
    {
        "LlamaForCausalLM": llama_spec,
        "MistralForCausalLM": mistral_spec,
        "Qwen2ForCausalLM": qwen2_spec,
        "Qwen3ForCausalLM": qwen3_spec,
    }
)
_MODEL_TYPES = MappingProxyType({name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES})
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a model from its config.json.

    Raises ModelLoadError for an architecture Kvik does not have, for another program's quantised weights, and for a
    damaged config.
    """
    read_quantization(config)
    architecture = _architecture(config)
    if architecture not in ARCHITECTURES:
        hint, known = did_you_mean(architecture, ARCHITECTURES), ", ".join(ARCHITECTURES)
        raise ModelLoadError(f"{_refusal(architecture, config)}{hint}; Kvik has {known}")
    return ARCHITECTURES[architecture](config)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if names and isinstance(names, list):
        return str(names[0])
    model_type = str(config.get("model_type", ""))
    if not model_type:
        raise ModelLoadError("config.json has neither 'architectures' nor 'model_type'; is it a transformers model?")
    return _MODEL_TYPES.get(model_type, model_type)


def _refusal(architecture: str, config: Mapping[str, Any]) -> str:
    if config.get("is_encoder_decoder"):
        return f"{architecture} is an encoder-decoder model; Kvik runs decoder-only language models"
    if any(config.get(field) for field in _EXPERT_FIELDS) or "Moe" in architecture:
        return f"{architecture} is a mixture of experts, which is not supported"
    if any(field in config for field in ("text_config", "vision_config", "audio_config")):
        return f"{architecture} reads images or sound as well as text, which is not supported"
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return f"{architecture} is not a decoder-only language model with an output head"
    return f"architecture {architecture} is not supported"
