"""The transformer of Meissonic and Monetico: predicts masked image tokens with the blocks of Flux."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, TimestepEmbedding
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import Downsample2D, Upsample2D
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.unets.uvit_2d import ConvMlmLayer, UVit2DConvEmbed
from torch import nn

from ..checkpoints.configs import own_fields
from ..checkpoints.source import ModelSource
from ..checkpoints.weights import find_weights, weight_names

NUM_MICRO_CONDS = 5
MICRO_COND_DIM = 256
NORM_EPS = 1e-6


class Sinusoids(nn.Module):
    """Cosines, then sines, of numbers times the frequencies 10000 ** (-i / half), the same on every machine.

    The published code computes them in float32, where the last bit of a frequency depends on the processor. The timestep,
    which is multiplied by 1000, amplifies this: sinusoids then differ by up to 4e-3 between machines.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) to (N, channels), in float64."""
        # Apple's GPUs have no float64.
        values = (values.cpu() if values.device.type == "mps" else values).double()
        half = self.channels // 2
        exponents = torch.arange(half, dtype=torch.float64, device=values.device) / half
        phases = values[:, None] * 10000.0**-exponents
        return torch.cat([phases.cos(), phases.sin()], dim=-1)


class MeissonicTransformer2DModel(ModelMixin, PeftAdapterMixin, ConfigMixin):
    r"""Predicts logits over the codebook from masked image tokens and the CLIP embeddings of a prompt.

    The arguments are the fields of a published `transformer/config.json`, and parameters have the names of the published tensors:
    `from_pretrained("MeissonFlow/Meissonic", subfolder="transformer")` reads the published files as they are.

    Args:
        patch_size: Unused.
        in_channels: Unused.
        num_layers: Number of blocks in which image and text have separate weights.
        num_single_layers: Number of blocks after them, with the same weights for both.
        attention_head_dim: Channels of a head, the sum of `axes_dims_rope`.
        num_attention_heads: Number of heads.
        joint_attention_dim: Channels of `encoder_hidden_states`.
        pooled_projection_dim: Channels of `pooled_text_emb`, which must be those of the model (heads times channels of a head).
        guidance_embeds: Always False.
        axes_dims_rope: Channels of a head that encode the axis of the text (always 0), the row and the column.
        vocab_size: Number of token ids; the last one is the mask.
        codebook_size: Number of ids that are predicted, starting at 0.
        downsample: Whether to halve the grid before the blocks (models for 1024 x 1024 pixels).
        upsample: Whether to double it after them; must equal `downsample`.

    Raises:
        ValueError: If sizes contradict each other.
    """

    _no_split_modules = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        vocab_size: int = 8256,
        codebook_size: int = 8192,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        dim = num_attention_heads * attention_head_dim
        if pooled_projection_dim != dim:
            raise ValueError(
                "`pooled_projection_dim` must be `num_attention_heads` x `attention_head_dim` "
                f"= {num_attention_heads} x {attention_head_dim} = {dim}, got {pooled_projection_dim}."
            )
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(
                f"`axes_dims_rope` must sum up to `attention_head_dim` = {attention_head_dim}, got {axes_dims_rope}."
            )
        if guidance_embeds:
            raise ValueError(f"`guidance_embeds` must be False, got {guidance_embeds!r}.")
        if upsample != downsample:
            raise ValueError(f"`upsample` must equal `downsample` = {downsample!r}, got {upsample!r}.")

        self.embed = UVit2DConvEmbed(dim, dim, vocab_size, True, NORM_EPS, False)
        self.down_block = nn.ModuleDict()
        self.up_block = nn.ModuleDict()
        if downsample:
            norm = {"norm_type": "rms_norm", "eps": NORM_EPS, "elementwise_affine": True}
            shared = {"kernel_size": 2, "padding": 0, "bias": False, **norm}
            self.down_block["downsample"] = Downsample2D(dim, use_conv=True, name="Conv2d_0", **shared)
            self.up_block["upsample"] = Upsample2D(dim, use_conv_transpose=True, name="conv", interpolate=False, **shared)
        self.project_to_hidden_norm = RMSNorm(dim, NORM_EPS)
        self.project_to_hidden = nn.Linear(dim, dim, bias=False)

        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.encoder_proj_layer_norm = RMSNorm(dim, NORM_EPS)
        self.cond_embed = TimestepEmbedding(pooled_projection_dim + NUM_MICRO_CONDS * MICRO_COND_DIM, dim, sample_proj_bias=False)
        self.micro_conds_proj = Sinusoids(MICRO_COND_DIM)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, pooled_projection_dim)
        self.time_text_embed.time_proj = Sinusoids(self.time_text_embed.time_proj.num_channels)
        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims_rope))

        heads = (dim, num_attention_heads, attention_head_dim)
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(*heads) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(FluxSingleTransformerBlock(*heads) for _ in range(num_single_layers))

        self.project_from_hidden_norm = RMSNorm(dim, NORM_EPS)
        self.project_from_hidden = nn.Linear(dim, dim, bias=False)
        self.mlm_layer = ConvMlmLayer(dim, dim, False, True, NORM_EPS, codebook_size)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `ModelMixin.from_pretrained`, but missing or unexpected tensors are an error.

        Raises:
            ValueError: If the file's tensors are not exactly the model's parameters.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for problem in ("missing", "unexpected"):
            keys = sorted(info[f"{problem}_keys"])
            if keys:
                raise ValueError(
                    f"`pretrained_model_name_or_path` has {len(keys)} {problem} tensors for this config: {keys[:5]}."
                )
        return (model, info) if with_info else model

    def forward(
        self,
        tokens: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_text_emb: torch.Tensor,
        micro_conds: torch.Tensor,
        timestep: torch.Tensor | float,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicts the tokens at all positions, or only at those in `where`.

        Args:
            tokens: Token ids (B, H, W), of any size (even, if the model downsamples).
            encoder_hidden_states: The text encoder's last hidden states but one (B, S, joint_attention_dim).
            pooled_text_emb: Its projected embeddings (B, pooled_projection_dim).
            micro_conds: Width and height in pixels, two crop coordinates, aesthetic score (B, 5).
            timestep: The step, counted down from the number of steps - 1 to 0; one number, or one per sample.
            where: (B, H * W) bool, the positions whose logits to compute; all by default.

        Returns:
            Logits (B, H * W, codebook_size), or with `where` (M, codebook_size) for its M positions, in row-major order.

        Raises:
            ValueError: If a shape does not fit.
        """
        timestep = torch.as_tensor(timestep, device=tokens.device)
        self._check_inputs(tokens, encoder_hidden_states, pooled_text_emb, micro_conds, timestep, where)
        batch, height, width = tokens.shape

        sinusoids = self.micro_conds_proj(micro_conds.flatten()).reshape(batch, -1)
        pooled = self.cond_embed(torch.cat([pooled_text_emb.to(self.dtype), sinusoids.to(tokens.device, self.dtype)], dim=1))
        # In float64: a thousand times the step is not exact in bfloat16, and overflows float16 from 66 steps on.
        temb = self.time_text_embed(timestep.double().reshape(-1) * 1000, pooled)
        text = self.encoder_proj_layer_norm(self.context_embedder(encoder_hidden_states.to(self.dtype)))

        hidden = self.embed(tokens)
        for layer in self.down_block.values():
            hidden = layer(hidden)
        rows, columns = hidden.shape[-2:]
        hidden = hidden.flatten(2).transpose(1, 2)
        hidden = self.project_to_hidden(self.project_to_hidden_norm(hidden))

        rotary = self.pos_embed(_positions(text.shape[1], rows, columns, tokens.device))
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                text, hidden = self._gradient_checkpointing_func(block, hidden, text, temb, rotary)
            else:
                text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)

        hidden = self.project_from_hidden(self.project_from_hidden_norm(hidden))
        hidden = hidden.transpose(1, 2).unflatten(2, (rows, columns))
        for layer in self.up_block.values():
            hidden = layer(hidden)

        # The last layer treats each position separately.
        hidden = hidden.flatten(2).transpose(1, 2)
        wanted = hidden.flatten(0, 1) if where is None else hidden[where]
        logits = self.mlm_layer(wanted[:, :, None, None]).flatten(1)
        return logits.unflatten(0, (batch, height * width)) if where is None else logits

    def _check_inputs(
        self,
        tokens: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_text_emb: torch.Tensor,
        micro_conds: torch.Tensor,
        timestep: torch.Tensor,
        where: torch.Tensor | None,
    ) -> None:
        if tokens.ndim != 3:
            raise ValueError(f"`tokens` must have the shape (batch, height, width), got {tuple(tokens.shape)}.")
        batch, height, width = tokens.shape
        if self.config.downsample and (height % 2 or width % 2):
            raise ValueError(f"`tokens` must have an even height and width, as the model downsamples, got {height} x {width}.")
        if encoder_hidden_states.ndim != 3:
            raise ValueError(f"`encoder_hidden_states` must have 3 axes, got the shape {tuple(encoder_hidden_states.shape)}.")
        length = encoder_hidden_states.shape[1]
        for name, value, shape in (
            ("encoder_hidden_states", encoder_hidden_states, (batch, length, self.config.joint_attention_dim)),
            ("pooled_text_emb", pooled_text_emb, (batch, self.config.pooled_projection_dim)),
            ("micro_conds", micro_conds, (batch, NUM_MICRO_CONDS)),
            ("where", where, (batch, height * width)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(value.shape)}.")
        if where is not None and where.dtype != torch.bool:
            raise ValueError(f"`where` must be of dtype torch.bool, got {where.dtype}.")
        if tuple(timestep.shape) not in ((), (1,), (batch,)):
            raise ValueError(f"`timestep` must be one number or one per sample ({batch}), got the shape {tuple(timestep.shape)}.")


def _positions(length: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Coordinates (length + rows * columns, 3) for the rotary embedding: zeros for text, then (0, row, column)."""
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    return torch.cat([torch.zeros(length, 3, dtype=torch.float32, device=device), nn.functional.pad(grid.float(), (1, 0))])


def open_meissonic_transformer(folder: Path, variant: str | None = None) -> ModelSource:
    """Opens the transformer in a published folder.

    Raises:
        ValueError: If the configuration or the weights are missing, or sizes are invalid.
    """
    config = own_fields(MeissonicTransformer2DModel, folder / "config.json")
    checkpoint = find_weights(folder, weight_names("diffusion_pytorch_model", variant))
    return ModelSource(checkpoint, lambda: MeissonicTransformer2DModel(**config), _probe)


@torch.no_grad()
def _probe(model: MeissonicTransformer2DModel) -> torch.Tensor:
    config = model.config
    return model(
        torch.arange(4).view(1, 2, 2) % config.vocab_size,
        encoder_hidden_states=torch.linspace(-1, 1, config.joint_attention_dim).expand(1, 2, -1),
        pooled_text_emb=torch.linspace(-1, 1, config.pooled_projection_dim)[None],
        micro_conds=torch.tensor([[512.0, 512.0, 0.0, 0.0, 6.0]]),
        timestep=3.0,
    )
