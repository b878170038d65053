"""Tiny random checkpoints in the formats of their publishers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import VQModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PhiConfig, PreTrainedTokenizerFast

from diffusers_infogain import InfoGainLuminaPipeline, InfoGainMMaDAPipeline, InfoGainScheduler, InfoGainShowoPipeline
from diffusers_infogain.models.llada import BidirectionalLlama
from diffusers_infogain.models.magvit_v2 import MagvitV2Model
from diffusers_infogain.models.omni_phi import OmniPhi

MMADA_WORDS = ("a", "red", "cat", "on", "the", "mat", "two", "dogs", "fog", "mud")
# Like MMaDA's own configuration, with a width and depth that a test can afford.
MMADA_CONFIG = {
    "architectures": ["MMadaModelLM"],
    "model_type": "mmada",
    "auto_map": {"AutoModel": "modeling_mmada.MMadaModelLM"},
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "bias_for_layer_norm": False,
    "codebook_size": 8192,
    "d_model": 16,
    "embedding_size": 134656,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "llm_vocab_size": 126464,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 32,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "new_vocab_size": 134656,
    "num_new_special_tokens": 0,
    "num_vq_tokens": 256,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 134656,
    "weight_tying": False,
}
LAYER_SHAPES = {
    "attn_norm": ("d",),
    "attn_out": ("d", "d"),
    "ff_norm": ("d",),
    "ff_out": ("d", "f"),
    "ff_proj": ("f", "d"),
    "k_proj": ("d", "d"),
    "q_proj": ("d", "d"),
    "up_proj": ("f", "d"),
    "v_proj": ("d", "d"),
}


def make_word_tokenizer(size: int, bos: int, eos: int) -> PreTrainedTokenizerFast:
    """`size` words, the first of them MMADA_WORDS, with the two special tokens at these ids."""
    names = [*MMADA_WORDS, *(f"<|{i}|>" for i in range(len(MMADA_WORDS), size))]
    names[bos], names[eos] = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[size - 1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token=names[size - 1]
    )


def llada_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"d": config["d_model"], "f": config["mlp_hidden_size"]}

    def random(*shape: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    prefix = "model.transformer."
    tensors = {
        f"{prefix}wte.weight": random(config["vocab_size"], sizes["d"], scale=1.0),
        f"{prefix}ln_f.weight": 1 + random(sizes["d"], scale=0.1),
        f"{prefix}ff_out.weight": random(config["vocab_size"], sizes["d"], scale=1.0),
    }
    for layer in range(config["n_layers"]):
        for name, letters in LAYER_SHAPES.items():
            shape = [sizes[letter] for letter in letters]
            value = random(*shape, scale=0.3) if len(shape) == 2 else 1 + random(*shape, scale=0.1)
            tensors[f"{prefix}blocks.{layer}.{name}.weight"] = value
    return tensors


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """model-0000i-of-0000n.safetensors and their index."""
    names, weight_map = sorted(tensors), {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_mmada_repository(folder: Path, dtype: torch.dtype = torch.float32, **config: object) -> Path:
    """As `Gen-Verse/MMaDA-8B-MixCoT`, code that must not run included."""
    folder.mkdir(parents=True)
    settings = {**MMADA_CONFIG, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "modeling_mmada.py").write_text("raise RuntimeError('code of the checkpoint was run')\n")
    write_shards(folder, {name: value.to(dtype) for name, value in llada_tensors(settings).items()}, count=2)
    make_word_tokenizer(126349, bos=126080, eos=126081).save_pretrained(folder)
    return folder


MAGVIT_SIZES = {
    "channels": 4,
    "encoder_multipliers": [1, 1, 1, 2, 2],
    "encoder_blocks": [1, 1, 1, 1, 1],
    "decoder_multipliers": [1, 1, 1, 1, 2],
    "decoder_blocks": [1, 1, 1, 1, 1],
    "norm_groups": 2,
}


def make_magvit(bits: int = 13, seed: int = 0, **sizes: object) -> MagvitV2Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MagvitV2Model(bits=bits, **{**MAGVIT_SIZES, **sizes}).eval()


def write_magvit_repository(folder: Path) -> Path:
    """As `showlab/magvitv2`, whose config.json is empty but for its sizes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MAGVIT_SIZES))
    save_file(make_magvit().state_dict(), folder / "pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


def make_llama(vocab_size: int, seed: int = 0) -> BidirectionalLlama:
    """16 wide, 2 layers; mask id 47."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = BidirectionalLlama(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=100,
                tie_word_embeddings=False,
                is_causal=False,
                mask_token_id=47,
                bos_token_id=41,
                eos_token_id=42,
            )
        ).eval()
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.5)
        transformer.lm_head.weight.data.normal_()
    return transformer


def make_small_magvit() -> MagvitV2Model:
    """32 codes of 2 x 2 pixels."""
    two_levels = {name: [1, 2] for name in ("encoder_multipliers", "decoder_multipliers")}
    return make_magvit(bits=5, encoder_blocks=[1, 1], decoder_blocks=[1, 1], **two_levels)


MMADA_TINY = {"task_token_id": 43, "image_start_token_id": 44, "image_end_token_id": 45, "pad_token_id": 40}


def make_mmada_pipeline(seed: int = 0, max_prompt_length: int = 12, **scheduler: object) -> InfoGainMMaDAPipeline:
    """50 words, 32 codes, 4 x 4 tokens of 2 x 2 pixels; mask id 47 in the model, 32 in the canvas."""
    pipe = InfoGainMMaDAPipeline(
        make_small_magvit(),
        make_word_tokenizer(50, bos=41, eos=42),
        make_llama(vocab_size=84, seed=seed),
        InfoGainScheduler(mask_token_id=32, **scheduler),
        **MMADA_TINY,
        max_prompt_length=max_prompt_length,
        sample_size=4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_showo_pipeline(seed: int = 0, max_prompt_length: int = 12, **scheduler: object) -> InfoGainShowoPipeline:
    """The vocabulary and the sizes of `make_mmada_pipeline`; the only size of images is 4 x 4 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = OmniPhi(
            PhiConfig(
                vocab_size=84,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=100,
                qk_layernorm=True,
                tie_word_embeddings=False,
                mask_token_id=47,
                image_start_token_id=44,
                image_end_token_id=45,
                use_cache=False,
            )
        ).eval()
        for name, parameter in transformer.named_parameters():
            parameter.data.add_(torch.randn(parameter.shape), alpha=1.0 if "lm_head.weight" in name else 0.4)
    pipe = InfoGainShowoPipeline(
        make_small_magvit(),
        make_word_tokenizer(50, bos=41, eos=42),
        transformer,
        InfoGainScheduler(mask_token_id=32, **scheduler),
        **MMADA_TINY,
        image_token_offset=50,
        max_prompt_length=max_prompt_length,
        sample_size=4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# As Phi-1.5's own configuration, with a width and depth that a test can afford.
PHI_CONFIG = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "embd_pdrop": 0.0,
    "eos_token_id": None,
    "hidden_act": "gelu_new",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 51200,
}
SHOWO_CONFIG = {
    "_class_name": "Showo",
    "_diffusers_version": "0.30.1",
    "codebook_size": 8192,
    "llm_model_path": "microsoft/phi-1_5",
    "llm_vocab_size": 50295,
    "load_from_showo": True,
    "mask_token_id": 58497,
    "num_vq_tokens": 256,
    "vocab_size": 58498,
    "w_clip_vit": False,
}


def write_phi_repository(folder: Path) -> Path:
    """As `microsoft/phi-1_5`, without its weights; one token begins and ends a text."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PHI_CONFIG))
    tokenizer = make_word_tokenizer(50295, bos=50255, eos=50256)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def write_showo_repository(folder: Path, pickled: bool = False, **config: object) -> Path:
    """As `showlab/show-o`, in the files that its code writes with `safe_serialization` or without."""
    folder.mkdir(parents=True)
    settings = {**SHOWO_CONFIG, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    network = PhiConfig(**{**PHI_CONFIG, "vocab_size": settings["vocab_size"], "qk_layernorm": True})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {f"showo.{name}": value for name, value in OmniPhi(network).state_dict().items()}
        if settings["w_clip_vit"]:
            projector = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
            state |= {f"mm_projector.{name}": value for name, value in projector.state_dict().items()}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


LUMINA_WORDS = (*MMADA_WORDS, "Generate", "an", "image", "according", "to", "text", "prompt.")
# Names of special tokens, and their ids in a tiny vocabulary of 50 words.
LUMINA_SPECIAL = {"<system>": 36, "</system>": 37, "<user>": 38, "</user>": 39, "<uncondition>": 40}
LUMINA_TINY = {
    "image_token_offset": 50,
    "newline_token_id": 46,
    "image_start_token_id": 41,
    "image_end_token_id": 42,
    "answer_start_token_id": 43,
    "answer_end_token_id": 44,
}


def make_lumina_tokenizer(size: int = 50, special: dict[str, int] = LUMINA_SPECIAL) -> PreTrainedTokenizerFast:
    """`size` words, the first of them LUMINA_WORDS, with the special tokens at these ids; nothing is added around a text."""
    names = [*LUMINA_WORDS, *(f"<|{i}|>" for i in range(len(LUMINA_WORDS), size))]
    for name, i in special.items():
        names[i] = name
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[size - 1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=names[size - 1])


def make_vqvae(codes: int, levels: int, seed: int = 0) -> VQModel:
    """4 channels at each of the levels, 8 numbers a code."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VQModel(
            block_out_channels=(4,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=8,
            num_vq_embeddings=codes,
            norm_num_groups=2,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
            force_upcast=True,
        ).eval()


def make_lumina_pipeline(seed: int = 0, max_sequence_length: int = 100, **scheduler: object) -> InfoGainLuminaPipeline:
    """50 words, 32 codes, 4 x 4 tokens of 2 x 2 pixels; mask id 47 in the model, 32 in the canvas."""
    pipe = InfoGainLuminaPipeline(
        make_vqvae(codes=32, levels=2),
        make_lumina_tokenizer(),
        make_llama(vocab_size=82, seed=seed),
        InfoGainScheduler(mask_token_id=32, **scheduler),
        **LUMINA_TINY,
        max_sequence_length=max_sequence_length,
        sample_size=4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# As MMaDA's, with another vocabulary; 126356 words, then 8192 codes.
LUMINA_CONFIG = {
    **{name: value for name, value in MMADA_CONFIG.items() if name not in ("codebook_size", "llm_vocab_size", "new_vocab_size")},
    "architectures": ["LLaDAForMultiModalGeneration"],
    "model_type": "llada",
    "auto_map": {"AutoModelForCausalLM": "modeling_llada.LLaDAForMultiModalGeneration"},
    "embedding_size": 134548,
    "vocab_size": 134548,
}
LUMINA_PUBLISHED_SPECIAL = {
    **{name: 126340 + i for i, name in enumerate(("<system>", "</system>", "<user>", "</user>"))},
    **{"<IMAGE>": 126349, "</IMAGE>": 126350, "<uncondition>": 126351, "<answer>": 126354, "</answer>": 126355},
}


def write_lumina_repository(folder: Path, **config: object) -> Path:
    """As `Alpha-VLLM/Lumina-DiMOO`, code that must not run included; where <system> and <user> stand is a guess."""
    folder.mkdir(parents=True)
    settings = {**LUMINA_CONFIG, **config}
    index = {
        "_class_name": "LuminaDiMOOPipeline",
        "_diffusers_version": "0.35.1",
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "vqvae": ["diffusers", "VQModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "modeling_llada.py").write_text("raise RuntimeError('code of the checkpoint was run')\n")
    write_shards(folder, llada_tensors(settings), count=2)
    make_lumina_tokenizer(126356, LUMINA_PUBLISHED_SPECIAL).save_pretrained(folder)
    make_vqvae(codes=8192, levels=5).save_pretrained(folder / "vqvae")
    return folder
