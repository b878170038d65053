"""Pipelines with random weights in the shapes of published models, to measure speed without a download."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, UVit2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from .checkpoints.errors import one_sentence
from .checks import check_number, shown
from .choices import PRESETS
from .image_pipeline_sequence import SequenceImagePipeline
from .model_sizes import MODEL_SIZES, ModelSize
from .models.llada import BidirectionalLlama
from .models.maskgen_transformer import MaskGenTransformer
from .models.maskgit_transformer import MaskGITTransformer2DModel
from .models.meissonic_transformer import MeissonicTransformer2DModel
from .models.omni_phi import OmniPhi
from .models.text_family import TextFamily
from .models.titok_transformer import TiTokBertTransformer, TiTokUViTTransformer
from .pipeline_infogain import InfoGainPipeline
from .pipeline_infogain_lumina import InfoGainLuminaPipeline
from .pipeline_infogain_maskgen import InfoGainMaskGenPipeline
from .pipeline_infogain_maskgit import InfoGainMaskGITPipeline
from .pipeline_infogain_meissonic import InfoGainMeissonicPipeline
from .pipeline_infogain_mmada import InfoGainMMaDAPipeline
from .pipeline_infogain_showo import InfoGainShowoPipeline
from .pipeline_infogain_text import InfoGainTextPipeline
from .pipeline_infogain_titok import InfoGainTiTokPipeline
from .scheduling_infogain import InfoGainScheduler

CLIP_LENGTH = 77
"""Tokens of a prompt that CLIP's text encoders return."""

_DIFFUSERS = {
    "amused": UVit2DModel,
    "meissonic": MeissonicTransformer2DModel,
    "maskgit": MaskGITTransformer2DModel,
    "maskgen": MaskGenTransformer,
    "titok_bert": TiTokBertTransformer,
    "titok_uvit": TiTokUViTTransformer,
}
_LANGUAGE_MODELS: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("mmada", "lumina", "llada"), (BidirectionalLlama, LlamaConfig)),
    "showo": (OmniPhi, PhiConfig),
    "dream": (Qwen2ForCausalLM, Qwen2Config),
    **dict.fromkeys(("sdar", "a2d"), (Qwen3ForCausalLM, Qwen3Config)),
}
_SEQUENCE_PIPELINES: dict[str, Any] = {
    "mmada": InfoGainMMaDAPipeline,
    "showo": InfoGainShowoPipeline,
    "lumina": InfoGainLuminaPipeline,
}
_BEFORE_THE_HEAD = {
    "amused": ("mlm_layer.conv2",),
    "meissonic": ("mlm_layer.conv2",),
    **dict.fromkeys(("titok_bert", "titok_uvit"), ("lm_head",)),
    "masked_lm:bert": ("cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "masked_lm:modernbert": ("head.norm", "decoder.bias"),
    **dict.fromkeys(_LANGUAGE_MODELS, ("model.norm",)),
    "showo": ("model.final_layernorm", "lm_head.bias"),
}
"""By family, the parameters that the logits are linear in."""


def random_pipeline(
    name: str,
    *,
    changes: Mapping[str, Any] | None = None,
    sharpness: float = 1.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DiffusionPipeline:
    """A pipeline with random weights, without image tokenizer and, but for MaskGen, text encoder: calls take `random_inputs`.

    Args:
        name: One of `MODEL_SIZES`.
        changes: Fields of the network's configuration in place of the published ones.
        sharpness: Factor on the logits. Random weights predict nearly nothing, so at 1 no bound or threshold ever lets a step
            decode more than the schedule asks for.
        device, dtype: Where the weights are made, and their type.
        seed: Of the weights.

    Raises:
        ValueError: For an unknown name or field, a value that does not fit, or a model that the device has no room for.
    """
    if name not in MODEL_SIZES:
        raise ValueError(f"The random model must be one of {', '.join(MODEL_SIZES)}, got {shown(name)}.")
    check_number("sharpness", sharpness, 0)
    size = MODEL_SIZES[name]
    size = replace(size, config={**size.config, **(changes or {})})
    _check_fields(name, size, changes or {})
    with one_sentence(f"The configuration of {name}"), torch.device("meta"):
        skeleton = build_network(size)
    _check_room(name, skeleton, torch.device(device), dtype)
    with _random_weights(torch.device(device), dtype, seed):
        network = build_network(size).eval().requires_grad_(False)
    _sharpen(network, size.family, sharpness)
    pipe = _text_pipeline(size, network) if size.of_text else _image_pipeline(size, network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_inputs(pipe: DiffusionPipeline, batch_size: int, prompt_length: int = 32, seed: int = 0) -> dict[str, Any]:
    """Random arguments of a call in place of prompts, which differ from sample to sample.

    Args:
        pipe: From `random_pipeline`.
        batch_size: Number of images or texts.
        prompt_length: Tokens of a prompt; CLIP's embeddings always have 77, and prompts of MaskGIT and TiTok are classes.
        seed: Of the arguments.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(below: int) -> list[list[int]]:
        return torch.randint(below, (batch_size, prompt_length), generator=generator).tolist()

    if isinstance(pipe, (InfoGainMaskGITPipeline, InfoGainTiTokPipeline)):
        classes = pipe.transformer.config.num_classes
        return {"class_labels": torch.randint(classes, (batch_size,), generator=generator).tolist()}
    if isinstance(pipe, InfoGainTextPipeline):
        return {"input_ids": ids(pipe.family.mask_token_id)}
    if isinstance(pipe, (SequenceImagePipeline, InfoGainMaskGenPipeline)):
        return {"prompt": [" ".join(map(str, words)) for words in ids(len(pipe.tokenizer))]}
    config = pipe.transformer.config
    amused = isinstance(pipe, InfoGainPipeline)
    pooled = config.cond_embed_dim if amused else config.pooled_projection_dim
    width = config.encoder_hidden_size if amused else config.joint_attention_dim
    return {
        "prompt_embeds": torch.randn(batch_size, pooled, generator=generator),
        "encoder_hidden_states": torch.randn(batch_size, CLIP_LENGTH, width, generator=generator),
        "negative_prompt_embeds": torch.randn(1, pooled, generator=generator),
        "negative_encoder_hidden_states": torch.randn(1, CLIP_LENGTH, width, generator=generator),
    }


def _config_class(size: ModelSize) -> Any:
    """What takes the fields of the configuration."""
    if size.family in _DIFFUSERS:
        return _DIFFUSERS[size.family]
    if size.family in _LANGUAGE_MODELS:
        return _LANGUAGE_MODELS[size.family][1]
    return CONFIG_MAPPING[size.family.partition(":")[2]]


def _check_fields(name: str, size: ModelSize, changes: Mapping[str, Any]) -> None:
    taken = _config_class(size)
    own = taken.__init__ if size.family in _DIFFUSERS else None
    known = list(inspect.signature(own).parameters)[1:] if own else sorted(taken().to_dict())
    for key, value in changes.items():
        if key not in known:
            raise ValueError(f"A field of the configuration of {name} must be one of {', '.join(known)}, got {shown(key)}.")
        default = size.config.get(key) if key not in changes else MODEL_SIZES[name].config.get(key)
        if isinstance(default, int) and (isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, int)):
            raise ValueError(f"`{key}` of {name} must be of the type {type(default).__name__}, got {shown(value)}.")


def build_network(size: ModelSize) -> Any:
    """The network of a size, with the weights that its class begins with, on the default device and of the default dtype."""
    if size.family in _DIFFUSERS:
        return _DIFFUSERS[size.family](**size.config)
    config_class = _config_class(size)
    if size.family not in _LANGUAGE_MODELS:
        special = {f"{token}_token_id": number for number, token in enumerate(("pad", "bos", "eos", "cls", "sep"))}
        return MODEL_FOR_MASKED_LM_MAPPING[config_class](config_class(**{**special, **size.config}))
    mask_token_id = min(size.mask_token_id, size.config["vocab_size"] - 1)
    own = {"is_causal": False, "mask_token_id": mask_token_id, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return _LANGUAGE_MODELS[size.family][0](config_class(**{**own, **size.config}))


def _check_room(name: str, skeleton: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Raises a ValueError if the weights alone are larger than the memory that is free."""
    needed = dtype.itemsize * sum(parameter.numel() for parameter in skeleton.parameters())
    free = _free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{name} takes {needed / 1e9:.1f} GB of memory in {str(dtype).removeprefix('torch.')}, but the device {device} has "
            f"{free / 1e9:.1f} GB free; fewer layers, or a smaller type, take less."
        )


def _free_memory(device: torch.device) -> int | None:
    """In bytes; None if it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return 1024 * int(lines["MemAvailable"].split()[0]) if device.type == "cpu" else None


@contextmanager
def _random_weights(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Modules that are made within the block have weights of this type on the device; global states stay as they were."""
    previous = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(previous)


def _sharpen(network: Any, family: str, factor: float) -> None:
    """Multiplies the logits by a factor."""
    if family == "maskgit":
        # norm · (1 + scale) + shift goes into the head, which is tied to the embeddings.
        norm, modulation = network.last_norm.norm_final, network.last_norm.mlp[1]
        shifts = len(modulation.weight) // 2
        scaled = [*norm.parameters(), modulation.weight[:shifts], modulation.bias[:shifts], network.tok_emb.bias]
    elif family == "maskgen":
        # The same, with the scale first: 1 + scale becomes factor · (1 + scale).
        scaled = list(network.norm.linear.parameters())
        network.norm.linear.bias.data[: len(scaled[0]) // 2] += 1
    else:
        named = network.named_parameters()
        scaled = [value for name, value in named if name.startswith(_BEFORE_THE_HEAD[family])]
    with torch.no_grad():
        for tensor in scaled:
            tensor.mul_(factor)
    if family == "maskgen":
        network.norm.linear.bias.data[: len(scaled[0]) // 2] -= 1


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers below `size`."""
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", bos_token="1", eos_token="2", unk_token="0")


def _image_pipeline(size: ModelSize, network: Any) -> DiffusionPipeline:
    if size.family in _SEQUENCE_PIPELINES:
        offset = size.layout["image_token_offset"]
        scheduler = InfoGainScheduler(mask_token_id=min(8192, network.config.vocab_size - offset))
        words = _tokenizer(min(1000, min(value for name, value in size.layout.items() if name != "sample_size")))
        return _SEQUENCE_PIPELINES[size.family](None, words, network, scheduler, **size.layout)
    if size.family in ("titok_bert", "titok_uvit"):
        return InfoGainTiTokPipeline(None, network, InfoGainScheduler(mask_token_id=network.config.codebook_size))
    if size.family == "maskgen":
        with _random_weights(network.device, network.dtype, 0):
            text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**size.layout)).eval().requires_grad_(False)
        words, scheduler = _tokenizer(min(1000, size.layout["vocab_size"])), InfoGainScheduler(network.config.codebook_size)
        return InfoGainMaskGenPipeline(None, words, text_encoder, network, scheduler)
    scheduler = InfoGainScheduler(mask_token_id=network.config.vocab_size - 1)
    if size.family == "maskgit":
        return InfoGainMaskGITPipeline(None, network, scheduler)
    clip = {"amused": InfoGainPipeline, "meissonic": InfoGainMeissonicPipeline}[size.family]
    return clip(None, None, None, network, scheduler)


def _text_pipeline(size: ModelSize, network: Any) -> InfoGainTextPipeline:
    vocab_size = network.config.vocab_size
    mask_token_id = min(size.mask_token_id, vocab_size - 1)  # where `vocab_size` was changed
    family = TextFamily(size.family.partition(":")[0], mask_token_id, **size.layout)  # no end tokens: all texts are as long
    scheduler = InfoGainScheduler(mask_token_id=mask_token_id, **PRESETS["text"])
    return InfoGainTextPipeline(network, _tokenizer(vocab_size), scheduler, asdict(family))
