"""Meissonic and Monetico: published repositories, the timestep that the model is told, guidance and batches."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.sampling import generators, make_scheduler

from diffusers_infogain import InfoGainMeissonicPipeline, InfoGainScheduler, decode, load
from diffusers_infogain.cli import main

PROMPTS = ["a cat", "dogs", "fog"]


@pytest.fixture(scope="module", params=[True, False], ids=["meissonic", "monetico"])
def repository(request, tmp_path_factory):
    return write_meissonic_repository(tmp_path_factory.mktemp("published") / "repository", downsample=request.param)


@pytest.fixture
def pipe(repository) -> InfoGainMeissonicPipeline:
    pipe = InfoGainMeissonicPipeline.from_pretrained(repository)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size(pipe) -> dict[str, int]:
    return {"height": 4 * pipe.vae_scale_factor, "width": 6 * pipe.vae_scale_factor}


def tokens_of(pipe, prompt="a cat", **call) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"generator": generators(0), "num_inference_steps": 3, **size(pipe), **call}
    return pipe(prompt, output_type="latent", **call).images


def test_as_published_and_as_converted_and_as_saved_again(repository, tmp_path, capsys):
    pipe = load(repository)
    assert type(pipe) is InfoGainMeissonicPipeline
    expected = tokens_of(pipe)
    assert main(["convert", str(repository), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    again = load(tmp_path / "out")
    assert torch.equal(tokens_of(again), expected)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(tokens_of(load(tmp_path / "saved")), expected)
    suffixes = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".md"}


@torch.no_grad()
def plain_logits(pipe, tokens: torch.Tensor, prompt: str, negative: str, g: float, timestep: int) -> torch.Tensor:
    """(1, L, V) of one state (1, L), every position through the head, one branch after the other."""
    logits = []
    for text in (prompt, negative):
        ids = pipe.tokenizer(
            [text], return_tensors="pt", padding="max_length", max_length=pipe.tokenizer.model_max_length
        ).input_ids
        encoded = pipe.text_encoder(ids, output_hidden_states=True)
        width, height = size(pipe)["width"], size(pipe)["height"]
        logits.append(
            pipe.transformer(
                tokens.unflatten(1, (4, 6)),
                encoder_hidden_states=encoded.hidden_states[-2],
                pooled_text_emb=encoded.text_embeds,
                micro_conds=torch.tensor([[width, height, 0.0, 0.0, 6.0]]),
                timestep=torch.tensor([timestep]),
            )
        )
    cond, uncond = logits
    return uncond + g * (cond - uncond) if g > 1 else cond


@pytest.mark.parametrize("sampler", ["info_gain", "maskgit"])
@pytest.mark.parametrize("g", [1.0, 4.0])
@pytest.mark.parametrize("chunk", [None, 3])
def test_guidance_batches_prompts_and_chunks_give_what_each_image_gives_alone(pipe, sampler, g, chunk):
    settings = {"sampler": sampler, "entropy_bound": 0, "token_temperature": 0.7}
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    mask = pipe.scheduler.config.mask_token_id
    call = {"guidance_scale": g, "negative_prompt": "mud", "lookahead_batch_size": chunk, "num_images_per_prompt": 2}
    tokens = tokens_of(pipe, PROMPTS, generator=generators(*range(6)), num_inference_steps=4, **call)
    for row, prompt in enumerate(prompt for prompt in PROMPTS for _ in range(2)):
        scheduler = InfoGainScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(4)
        # On the plain schedule the counter follows from how many masks are left when a step begins.
        masks = [24]
        for share in (0.25, 0.5, 0.75):
            masks.append(min(masks[-1] - 1, int(24 * torch.cos(torch.tensor(share) * torch.pi / 2).item())))

        def denoise(states, rows, prompt=prompt, masks=masks):
            counters = [3 - masks.index(int((state == mask).sum())) for state in states]
            pairs = zip(states, counters, strict=True)
            return torch.cat([plain_logits(pipe, state[None], prompt, "mud", g, counter) for state, counter in pairs])

        plain = decode(denoise, scheduler, torch.full((1, 24), mask), generator=generators(row), grid=(4, 6))
        assert tokens[row].flatten().tolist() == plain.tokens[0].tolist()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos"])
@pytest.mark.parametrize(("length", "steps"), [(4096, 48), (4096, 64), (1024, 48), (24, 5), (24, 40)])
def test_on_the_schedule_the_timestep_told_is_the_steps_own(schedule, length, steps):
    scheduler = make_scheduler(9, steps, sampler="uniform", masking_schedule=schedule)
    told = []

    def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        told.extend(scheduler.timesteps_at(tokens).tolist())
        return torch.zeros(*tokens.shape, 2)

    decode(denoise, scheduler, torch.full((1, length), 9), generator=generators(0))
    assert told == scheduler.timesteps.tolist()[: len(told)]
    assert len(told) == min(steps, length)


def test_ahead_of_the_schedule_the_timestep_told_follows_the_masks():
    scheduler = make_scheduler(9, 10, masking_schedule="linear")
    states = torch.full((4, 20), 9)
    for row, known in enumerate((0, 2, 9, 19)):
        states[row, :known] = 0
    assert scheduler.timesteps_at(states).tolist() == [9, 8, 5, 0]


def test_images_and_known_tokens(pipe):
    image = pipe("a cat", num_inference_steps=2, **size(pipe)).images[0]
    assert image.size == (size(pipe)["width"], size(pipe)["height"])
    latents = torch.full((1, 4, 6), pipe.scheduler.config.mask_token_id)
    latents[0, 1] = 3
    assert (tokens_of(pipe, latents=latents, height=None, width=None)[0, 1] == 3).all()


def test_prompt_embeddings_stand_for_prompts(pipe):
    pooled, hidden, _, _ = pipe.encode_prompt("a cat")
    by_embeds = tokens_of(pipe, None, prompt_embeds=pooled, encoder_hidden_states=hidden)
    assert torch.equal(by_embeds, tokens_of(pipe))


def test_another_text_encoder_is_taken_from_a_folder_or_as_it_is(pipe, repository, tmp_path):
    other = type(pipe.text_encoder)(pipe.text_encoder.config).eval()
    other.save_pretrained(tmp_path)
    for text_encoder in (other, tmp_path):
        taken = InfoGainMeissonicPipeline.from_pretrained(repository, text_encoder=text_encoder).text_encoder.state_dict()
        assert all(torch.equal(taken[name], value) for name, value in other.state_dict().items())


def test_half_precision_and_offloading(repository):
    pipe = InfoGainMeissonicPipeline.from_pretrained(repository, dtype=torch.bfloat16)
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vqvae.dtype} == {torch.bfloat16}
    expected = tokens_of(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tokens_of(pipe), expected)


def test_errors(pipe, repository, tmp_path):
    with pytest.raises(ValueError, match="`height` and `width` must be positive multiples of"):
        pipe("a cat", height=pipe.vae_scale_factor + 1)
    with pytest.raises(ValueError, match="Either `prompt` or `prompt_embeds` must be given"):
        pipe()
    with pytest.raises(ValueError, match=r"has no weights: none of diffusion_pytorch_model.fp16.safetensors"):
        load(repository, variant="fp16")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AmusedPipeline"}))
    with pytest.raises(ValueError, match=r"must name the pipeline InfoGainMeissonicPipeline, got 'AmusedPipeline'"):
        InfoGainMeissonicPipeline.from_pretrained(tmp_path)
