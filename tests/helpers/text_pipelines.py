"""Text pipelines of tiny random models, in float64."""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers import LlamaConfig, Qwen3Config, Qwen3ForCausalLM

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.models.llada import BidirectionalLlama
from diffusers_infogain.models.text_family import TextFamily
from diffusers_infogain.pipeline_infogain_text import InfoGainTextPipeline
from helpers.checkpoints import make_word_tokenizer
from helpers.sampling import EAGER

WORDS, BOS, EOS, MASK = 24, 20, 21, 22
PROMPTS = ["a red cat", "dogs", "the mat on fog"]


def make_model(seed: int = 0) -> BidirectionalLlama:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            is_causal=False,
            mask_token_id=MASK,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        model = BidirectionalLlama(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.6)
    # In float64, where sums in another order (of another batch, say) differ by far less than any two scores do.
    return model.double()


def make_pipe(seed: int = 0, **scheduler: object) -> InfoGainTextPipeline:
    tokenizer = make_word_tokenizer(WORDS, BOS, EOS)
    tokenizer.pad_token = "<|endoftext|>"
    settings = {"masking_schedule": "linear", "entropy_bound": 0, **scheduler}
    pipe = InfoGainTextPipeline(make_model(seed), tokenizer, InfoGainScheduler(MASK, **EAGER | settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_block_pipe(shifted: bool = False, **scheduler: object) -> InfoGainTextPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Qwen3Config(
            vocab_size=WORDS, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False, **sizes
        )
        model = Qwen3ForCausalLM(config).eval().double()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.6)
    tokenizer = make_word_tokenizer(WORDS, BOS, EOS)
    tokenizer.pad_token = "<|endoftext|>"
    family = TextFamily("sdar", MASK, attention="block_causal", block_length=4, eos_token_ids=(EOS,))
    if shifted:
        family = TextFamily("dream", MASK, shifted=True, eos_token_ids=(EOS,))
    settings = {"masking_schedule": "linear", "entropy_bound": 0, "token_temperature": 0.8, **scheduler}
    pipe = InfoGainTextPipeline(model, tokenizer, InfoGainScheduler(MASK, **EAGER | settings), asdict(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe
