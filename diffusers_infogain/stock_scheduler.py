"""What diffusers' own pipelines ask of a scheduler: its timesteps, a step at a time, without memory, and noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import candidates as draw
from . import checks, schedules
from .printing import shown
from .proposal import InfoGainSchedulerOutput
from .step import Memory


class StockSchedulerMixin:
    """`step_index`, `timesteps_at`, `step` and `add_noise` of `InfoGainScheduler`."""

    if TYPE_CHECKING:  # the scheduler has them
        config: Any
        timesteps: torch.Tensor
        propose: Any
        select: Any

        @property
        def looks_ahead(self) -> bool:
            """Whether the sampler compares candidates."""

    def step_index(self, timestep: int | torch.Tensor) -> int:
        """The number of a step, counted from 0.

        Raises:
            ValueError: If `timestep` is not one of `timesteps`.
        """
        if self.timesteps is None:
            raise ValueError("`timesteps` are not set: call `set_timesteps` first.")
        number = timestep.item() if isinstance(timestep, torch.Tensor) and timestep.numel() == 1 else timestep
        num_steps = len(self.timesteps)
        if not (checks.is_number(number) and 0 <= number < num_steps and number == int(number)):
            raise ValueError(f"`timestep` must be one of the scheduler's {num_steps} timesteps, got {shown(number)}.")
        return num_steps - 1 - int(number)

    def timesteps_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """The timestep (R,) of states (R, L) by their number of masks: when the schedule leaves that many of an empty canvas.

        Models that are conditioned on time get this one, also for a state that is only looked at, or that an entropy bound
        brought ahead of the schedule.
        """
        config, steps = self.config, len(self.timesteps)
        planned = schedules.planned_masks(tokens.shape[1], steps, config.masking_schedule, tokens_per_step=config.tokens_per_step)
        masks = (tokens == config.mask_token_id).sum(-1)
        return steps - (planned.to(tokens.device) >= masks[:, None]).sum(-1)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: draw.Generators = None,
        return_dict: bool = True,
        starting_mask_ratio: float | torch.Tensor | None = None,
    ) -> InfoGainSchedulerOutput | tuple[torch.Tensor, ...]:
        """Decodes the tokens of one step by a greedy rule, as diffusers' pipelines expect of a scheduler.

        Args:
            model_output: Logits (B, L, V) or (B, V, H, W).
            sample: Tokens (B, L) or (B, H, W).
            starting_mask_ratio: The share of all tokens that was masked before the first step, in [0, 1], which the schedule
                then begins at. By default it goes by what is left.

        Raises:
            ValueError: With a sampler that looks ahead, since `step` cannot ask for the logits of its candidates, or with a
                corrector, since it has no memory; for shapes that do not fit, or a share outside [0, 1].
        """
        if self.looks_ahead:
            raise ValueError(
                f"`step` cannot look ahead as the sampler {self.config.sampler!r} with {self.config.num_candidates} candidates "
                "does: use `InfoGainPipeline`, or `propose` and `select`, or a greedy `sampler`."
            )
        if self.config.corrector is not None:
            raise ValueError(
                f"`step` cannot mask tokens again as the corrector {self.config.corrector!r} does: use `InfoGainPipeline` or "
                "`decode`, or `corrector` None."
            )
        checks.check_bool("return_dict", return_dict)
        checks.check_tensor("sample", sample, [2, 3], "a long tensor (batch, length) or (batch, height, width)", [torch.long])
        layouts = "(batch, length, tokens in the codebook) or (batch, tokens in the codebook, height, width)"
        checks.check_tensor("model_output", model_output, [3, 4], f"a tensor of logits, {layouts}")
        shape, grid = sample.shape, None
        if sample.ndim == 3:
            if model_output.ndim != 4 or model_output.shape[0] != shape[0] or model_output.shape[2:] != shape[1:]:
                raise ValueError(
                    f"`model_output` must have the shape (batch, tokens in the codebook, height, width) for a `sample` of "
                    f"{tuple(shape)}, got {tuple(model_output.shape)}."
                )
            grid = (shape[1], shape[2])
            sample, model_output = sample.flatten(1), model_output.flatten(2).transpose(1, 2)
        ratio: Any = starting_mask_ratio
        if isinstance(ratio, torch.Tensor) and ratio.numel() == 1:  # as diffusers' pipelines pass it
            ratio = ratio.item()
        checks.check_number("starting_mask_ratio", ratio, 0, 1, optional=True)
        initial_masks = None
        if ratio is not None:
            initial_masks = torch.full((len(sample),), round(ratio * sample.shape[1]), device=sample.device)
        # An empty memory and not None: `step` does not know where a sample begins.
        proposal = self.propose(
            model_output, timestep, sample, generator=generator, memory=Memory(), grid=grid, initial_masks=initial_masks
        )
        output = self.select(None, timestep, proposal)
        output.prev_sample = output.prev_sample.reshape(shape)
        return output if return_dict else (output.prev_sample,)

    def add_noise(self, sample: torch.Tensor, timesteps: int | torch.Tensor, generator: draw.Generators = None) -> torch.Tensor:
        """`sample` with tokens masked at random: on average as many as the schedule leaves of an empty canvas after a step.

        With one generator the masks are those that `AmusedScheduler.add_noise` draws.

        Args:
            sample: Tokens (B, L) or (B, H, W).
            timesteps: One of `timesteps`.
            generator: One generator, drawn from sample after sample, or a list with one per sample.

        Raises:
            ValueError: For an unknown timestep, or a list of generators of another length than the batch.
        """
        checks.check_tensor("sample", sample, [2, 3], "a long tensor (batch, length) or (batch, height, width)", [torch.long])
        share = schedules.share_masked_after(
            self.step_index(timesteps),
            len(self.timesteps),
            self.config.masking_schedule,
            tokens_per_step=self.config.tokens_per_step,
            length=sample.shape[1:].numel(),
        )
        uniform = draw.uniforms(generator, len(sample), sample.shape[1:]).to(sample.device)
        return sample.masked_fill(uniform < share.to(sample.device), self.config.mask_token_id)
