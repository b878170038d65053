"""A small aMUSEd, made on the spot; nothing is downloaded."""

from __future__ import annotations

import torch
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

CODEBOOK_SIZE = 24
GRID = 4


def make_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {symbol: i for i, symbol in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)


def make_components(seed: int = 0, codebook_size: int = CODEBOOK_SIZE, vq_embed_dim: int = 4) -> dict:
    """A random aMUSEd: 4 x 4 tokens, 24 codes, mask id 25 of a vocabulary of 26 (one id is padding, as in aMUSEd)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        text_encoder = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                projection_dim=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=12,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        transformer = UVit2DModel(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            block_out_channels=16,
            in_channels=16,
            block_num_heads=2,
            num_res_blocks=1,
            vocab_size=codebook_size + 2,
            codebook_size=codebook_size,
            encoder_hidden_size=16,
            cond_embed_dim=16,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=40,
            sample_size=GRID,
        )
        # Sharper predictions than random weights give, so that entropies differ from one position to the next.
        transformer.mlm_layer.conv2.weight.data.mul_(8)
        vqvae = VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            vq_embed_dim=vq_embed_dim,
            num_vq_embeddings=codebook_size,
            norm_num_groups=4,
            sample_size=8,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
            force_upcast=True,
        )
    models = {"vqvae": vqvae, "text_encoder": text_encoder, "transformer": transformer}
    return {
        **{name: model.eval() for name, model in models.items()},
        "tokenizer": tokenizer,
        "scheduler": AmusedScheduler(mask_token_id=codebook_size + 1),
    }
