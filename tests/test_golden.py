"""Scores and choices against the stored figures of another implementation; see golden/README.md."""

import json
from pathlib import Path

import pytest
import torch
from helpers.sampling import make_scheduler
from safetensors.torch import load_file

from diffusers_infogain import InfoGainProposal, scoring
from diffusers_infogain.candidates import gumbel, select_positions

FOLDER = Path(__file__).parent / "golden"
TEXT_MASK = 66
# Image rows: a prompt, 16 positions, one end token; code c is the id 50 + c, the mask id 47 becomes the id after the codes.
CODES, IMAGE, FIRST_CODE, IMAGE_MASK = 32, slice(10, 26), 50, 47
# The stored figures and ours are float32: both are compared with the same figures in float64, so that one side's rounding, which
# depends on the processor, does not add to the other's, which is stored. Both agree with it to 6e-7 (C, J) and 3e-7 (H).
COST = {"atol": 1e-5, "rtol": 0}
UNCERTAINTY = {"atol": 6e-7, "rtol": 0}
# J is the difference of both; its last bit at a magnitude of 8 to 16 is 1e-6.
OBJECTIVE = {"atol": 5e-6, "rtol": 0}


def load(name: str) -> tuple[dict, dict]:
    return load_file(FOLDER / f"{name}.safetensors"), json.loads((FOLDER / f"{name}.json").read_text())


text_cases = pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("text_helper_*.json")))
image_cases = pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("image_ig_*.json")))


def test_all_stored_cases_are_here():
    assert len(list(FOLDER.glob("text_helper_*.safetensors"))) == 4
    assert len(list(FOLDER.glob("image_ig_*.safetensors"))) == 2


def exact_entropy(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.double().log_softmax(-1)
    return torch.special.entr(log_p.exp()).sum(-1)


@text_cases
def test_text_costs_and_uncertainties(name):
    data, _ = load(name)
    selected, masked = data["x_batch"] != data["x"], data["x_batch"] == TEXT_MASK
    exact_cost = (exact_entropy(data["logits"]) * selected).sum(-1)
    exact_after = (exact_entropy(data["next_logits"]) * masked).sum(-1) / masked.sum(-1)

    cost = scoring.action_cost(scoring.entropy(data["logits"])[:, None], selected[None])
    after = scoring.state_uncertainty(scoring.entropy(data["next_logits"]), masked)
    # The stored J leaves out the state's own uncertainty, which is the same for all candidates.
    gain = scoring.information_gain(torch.zeros(1), after[None])
    for figures, exact, tolerance in (
        ((cost[0], data["C"]), exact_cost, COST),
        ((after, data["H_next"], -data["J_lookum"]), exact_after, UNCERTAINTY),
        ((scoring.objective(gain, cost)[0], data["J"]), -exact_after - exact_cost, OBJECTIVE),
    ):
        for figure in figures:
            torch.testing.assert_close(figure.double(), exact, **tolerance)


@text_cases
def test_text_choice(name):
    data, info = load(name)
    masked = data["x"] == TEXT_MASK
    entropies = torch.where(masked, scoring.entropy(data["logits"]), 0)
    proposal = make_proposal(data["x"][0], data["x_batch"], entropies, masked)
    for sampler, best in (("info_gain", info["best"]), ("lookum", info["best_lookum"])):
        scheduler = make_scheduler(TEXT_MASK, 2, sampler=sampler, gain_reduction="mean")
        assert scheduler.select(data["next_logits"][None], 1, proposal).winner.item() == best


def text_draws(data: dict, info: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Positions and tokens of every draw, with φ = the probability of the draw's own token, and Gumbel noise after the first."""
    logits, valid = data["logits"][0], data["valid"]
    noise = data.get("token_noise", torch.zeros(len(data["pos_uniform"]) + 1, 1, 1))
    draws = []
    for index, extra in enumerate(noise):
        tokens = (logits + extra).argmax(-1)
        phi = logits.softmax(-1).gather(-1, tokens[:, None])[valid, 0]
        if index == 0:
            torch.testing.assert_close(phi, data["conf"][0, valid])
        else:
            uniform = data["pos_uniform"][index - 1]
            stored = -torch.log(-torch.log(uniform + 1e-10) + 1e-10)
            torch.testing.assert_close(gumbel(uniform), stored, atol=1e-4, rtol=1e-4)
            phi = phi / info["pt"] + gumbel(uniform)
        chosen = valid[select_positions(phi[None, None], phi[None], torch.tensor([info["k"]]))[0, 0]]
        draws.append((chosen, tokens))
    return draws


@text_cases
def test_text_positions_are_drawn_by_the_same_gumbel_top_k(name):
    data, info = load(name)
    distinct = {}
    for positions, tokens in text_draws(data, info):
        distinct.setdefault(tuple(positions.tolist()), tokens)
    actions, ids = data["actions"].tolist(), data["tokens"].tolist()
    assert list(distinct) == [tuple(sorted(action)) for action in actions]
    for action, stored, tokens in zip(actions, ids, distinct.values(), strict=True):
        assert tokens[action].tolist() == stored


def make_proposal(
    tokens: torch.Tensor, candidates: torch.Tensor, entropies: torch.Tensor, masked: torch.Tensor
) -> InfoGainProposal:
    selected = candidates != tokens
    return InfoGainProposal(
        candidates=candidates[None],
        selected=selected[None],
        cost=scoring.action_cost(entropies[:, None], selected[None]),
        log_probability=torch.zeros(1, len(candidates)),
        needs_lookahead=True,
        masked=masked,
        remasked=torch.zeros_like(masked),
        compared=torch.ones(1, dtype=torch.bool),
        entropies=entropies,
        duplicate_of=torch.arange(len(candidates))[None],
    )


def codes(row: torch.Tensor) -> torch.Tensor:
    ids = row[..., IMAGE]
    return torch.where(ids == IMAGE_MASK, CODES, ids - FIRST_CODE)


@image_cases
def test_image_decisions(name):
    data, info = load(name)
    steps, batch = info["settings"]["timesteps"], info["settings"]["batch"]
    scheduler = make_scheduler(CODES, steps, gain_reduction="mean")
    decisions = 0
    for b in range(batch):
        spent = 0.0
        for index in range(steps):
            stored = {key[10:]: value for key, value in data.items() if key.startswith(f"step{index:02}.b{b}.")}
            tokens, timestep = codes(stored["x"]), steps - 1 - index
            masked = tokens == CODES
            entropies = torch.where(masked, scoring.entropy(stored["logits_image"]), 0)
            best = info["best"][index * batch + b]
            if best is None:  # the last step decodes what is left, without a comparison
                assert index == steps - 1
                spent += entropies.sum().item()
            else:
                proposal = make_proposal(tokens[0], codes(stored["x_batch"]), entropies, masked)
                assert set(proposal.num_decoded.flatten().tolist()) == {info["k"][index * batch + b]}
                output = scheduler.select(stored["next_logits_image"][None], timestep, proposal)
                uncertainty = scoring.state_uncertainty(entropies, masked)
                torch.testing.assert_close(output.cost[0], stored["C"], **COST)
                torch.testing.assert_close(uncertainty - output.gain[0], stored["H_next"], atol=1e-6, rtol=0)
                torch.testing.assert_close(output.objective[0] - uncertainty, stored["J"], **OBJECTIVE)
                assert output.winner.item() == best
                assert torch.equal(output.prev_sample, codes(stored["x_next"]))
                spent += output.cost[0, best].item()
                decisions += 1
            assert spent == pytest.approx(info["cumulative_entropy"][b][index], abs=1e-5)
    assert decisions == (steps - 1) * batch
