"""Text with masked language models, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .callbacks import CallStateMixin, StepCallback
from .candidates import Generators
from .checkpoints.published import CheckedPipeline, PublishedPipeline
from .checkpoints.repository import Repository
from .checkpoints.text import open_text_model
from .checks import check_bool, check_integer, check_list, prompt_list
from .choices import PRESETS
from .compiling import CompileMixin
from .components import check_component_types, check_components, tokenize
from .devices import DevicesMixin
from .lora import LanguageModelLoraMixin
from .models.chat_templates import chat_text, read_chat_template
from .models.text_family import TextFamily, family_name, text_family
from .models.wrapped import underlying
from .printing import shown
from .progress import ProgressPipeline
from .scheduling_infogain import InfoGainScheduler
from .text_generation import CALLBACK_TENSOR_INPUTS, TextGeneration
from .text_likelihood import (
    Answer,
    AnswerModel,
    InfoGainLikelihood,
    answer_generators,
    are_greedy,
    check_draws,
    check_guidance_scale,
    encode_pair,
    log_likelihoods,
)
from .text_output import InfoGainTextOutput, TextBlock

Messages = list[dict[str, str]]


class InfoGainTextPipeline(CallStateMixin, CompileMixin, DevicesMixin, ProgressPipeline, CheckedPipeline, LanguageModelLoraMixin):
    r"""Text generation and infilling with masked language models, decoded by information gain or any other rule.

    `from_pretrained` loads LLaDA, Dream, SDAR, TraDo, MMaDA's language model, A2D models and any `AutoModelForMaskedLM` as they
    were published, on the classes of transformers, or what `save_pretrained` wrote.

    Args:
        model: Predicts the tokens.
        tokenizer: Encodes prompts and decodes texts.
        scheduler: Decides which tokens to decode next, and their values.
        family: Facts about the model that its weights do not tell, `dataclasses.asdict(TextFamily(...))`; by default those of its
            configuration.

    Raises:
        ValueError: If `scheduler` is not an `InfoGainScheduler`, or the family is not known.
    """

    families = ("LLaDA", "Dream", "SDAR", "TraDo", "A2D", "an AutoModelForMaskedLM")
    model_cpu_offload_seq = "model"
    compiled_component = "model"
    _callback_tensor_inputs = CALLBACK_TENSOR_INPUTS
    _optional_components = ["model", "tokenizer", "scheduler"]  # None until a call needs them

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheduler: InfoGainScheduler

    def __init__(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        scheduler: InfoGainScheduler | None,
        family: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_component_types({"model": model, "tokenizer": tokenizer})
        if scheduler is not None and not isinstance(scheduler, InfoGainScheduler):
            raise ValueError(f"`scheduler` must be an InfoGainScheduler, got {type(scheduler).__name__}.")
        if family is not None:
            family = asdict(TextFamily(**family))
        elif model is not None and tokenizer is not None:
            family = asdict(text_family(underlying(model).config, tokenizer))
        self.register_modules(model=model, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(family=family)

    @property
    def device(self) -> torch.device:
        """The device of the model, which may be wrapped by `torch.compile` or peft."""
        return super().device if self.model is None else underlying(self.model).device

    @property
    def family(self) -> TextFamily:
        """The facts that decoding needs: mask id, shift, attention, end-of-text ids."""
        if self.config.family is None:  # made before it had a model
            check_components(self, "model", "tokenizer")
            return text_family(underlying(self.model).config, self.tokenizer)
        return TextFamily(**self.config.family)

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether the config.json of a repository is of a known text model."""
        return repository.config is not None and family_name(repository.config) is not None

    @classmethod
    def open_published(
        cls, repository: str | os.PathLike[str], *, without: Collection[str] = (), **hub: Any
    ) -> PublishedPipeline:
        """Opens a published repository, to be loaded or converted; no code of it runs.

        Args:
            repository: Folder or Hub id.
            without: Models that are not opened, because the caller replaces them or needs none.
            hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: For a model of an unknown family.
        """
        opened = open_text_model(repository, **hub)
        components = {
            "tokenizer": opened.tokenizer,
            "scheduler": InfoGainScheduler(mask_token_id=opened.family.mask_token_id, **PRESETS["text"]),
            "family": asdict(opened.family),
        }
        return PublishedPipeline(cls, {} if "model" in without else {"model": opened.source}, components)

    def encode(
        self,
        prompt: str | list[str] | None = None,
        messages: Messages | list[Messages] | None = None,
        input_ids: Sequence[Sequence[int]] | torch.Tensor | None = None,
        *,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[list[int]]:
        """Token ids of every prompt, from exactly one of the first three arguments.

        Args:
            prompt: Text or texts.
            messages: A chat or chats, laid out by the tokenizer's template.
            input_ids: The ids themselves.
            chat_template, chat_template_kwargs, continue_final_message: How chats are laid out, as in `__call__`.

        Raises:
            ValueError: If not exactly one is given, or it is empty, or something about chats is given without `messages`.
        """
        given = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(
                f"Exactly one of `prompt`, `messages` and `input_ids` must be given, got {', '.join(names) or 'none'}."
            )
        check_bool("continue_final_message", continue_final_message)
        of_chats = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
        for name, value in {**of_chats, "continue_final_message": continue_final_message or None}.items():
            if value is not None and messages is None:
                off = "False" if name == "continue_final_message" else "None"
                raise ValueError(f"`{name}` must be {off} without `messages`, got {shown(value)}.")
        if input_ids is not None:
            return _id_lists(input_ids)
        check_components(self, "tokenizer")
        if prompt is not None:
            return [list(tokenize(self.tokenizer, text).input_ids) for text in prompt_list("prompt", prompt)]
        described = "a chat or a non-empty list of chats, each a list of dictionaries"
        chats = check_list("messages", messages, (dict, list, tuple), described)
        chats = [chats] if isinstance(chats[0], dict) else chats
        for chat in chats:
            check_list("messages", chat, dict, described)
        layout: dict[str, Any] = {
            "template": read_chat_template(self.tokenizer, chat_template),
            "variables": chat_template_kwargs,
            "continued": continue_final_message,
        }
        texts = [chat_text(self.tokenizer, chat, **layout) for chat in chats]
        return [list(tokenize(self.tokenizer, text, add_special_tokens=False).input_ids) for text in texts]

    def _generation(
        self, *, prompt: Any, messages: Any, input_ids: Any, negative_prompt: Any, num_texts_per_prompt: int, **arguments: Any
    ) -> TextGeneration:
        """Checks a call and lays out its canvas. Takes the arguments of `__call__`."""
        check_components(self, "model", "tokenizer", "scheduler")
        chats = {name: arguments.pop(name) for name in ("chat_template", "chat_template_kwargs", "continue_final_message")}
        given = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
        prompts = self.encode(**given, **chats)
        check_integer("num_texts_per_prompt", num_texts_per_prompt, 1)
        if negative_prompt is not None:
            kind = next(name for name, value in given.items() if value is not None)
            with _named("negative_prompt", kind):
                negative = self.encode(**{kind: negative_prompt}, **chats)
            if len(negative) not in (1, len(prompts)):
                raise ValueError(
                    f"`negative_prompt` must be one, or one for each of the {len(prompts)} prompts, got {len(negative)}."
                )
            negative = negative * (len(prompts) // len(negative))
            arguments["negative_prompts"] = [ids for ids in negative for _ in range(num_texts_per_prompt)]
        return TextGeneration(
            pipe=self,
            prompts=[ids for ids in prompts for _ in range(num_texts_per_prompt)],
            num_end_tokens=0 if prompt is None else self._num_end_tokens(),
            **{"negative_prompts": None, **arguments},
        )

    def _num_end_tokens(self) -> int:
        """How many special tokens an encoder's tokenizer appends to a text."""
        if self.family.name != "masked_lm":
            return 0
        text = tokenize(self.tokenizer, "a", add_special_tokens=False).input_ids
        whole = tokenize(self.tokenizer, "a").input_ids
        start = next((start for start in range(len(whole)) if whole[start : start + len(text)] == text), len(whole))
        return max(len(whole) - start - len(text), 0)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        messages: Messages | list[Messages] | None = None,
        input_ids: Sequence[Sequence[int]] | torch.Tensor | None = None,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        num_inference_steps: int | None = None,
        num_texts_per_prompt: int = 1,
        generator: Generators = None,
        stop_at_eos: bool = True,
        stop_strings: str | Sequence[str] | None = None,
        think_end_token: str | None = None,
        min_new_tokens: int = 0,
        eos_penalty: float = 0.0,
        postpone_eos: bool = False,
        suppress_tokens: Sequence[int | str] | None = None,
        logits_processor: Any = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        continue_final_message: bool = False,
        guidance_scale: float = 1.0,
        negative_prompt: Any = None,
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        lookahead_batch_size: int | None = None,
        num_beams: int = 1,
        num_runs: int = 1,
        cache: str | None = None,
        pack_candidates: bool = False,
    ) -> InfoGainTextOutput | tuple[Any, ...]:
        r"""Writes texts, or fills in masks.

        Args:
            prompt: The prompt or prompts, of any lengths. Special tokens that an encoder's tokenizer appends to a text, such as
                BERT's [SEP], stay behind the new tokens.
            messages: A chat or chats instead of `prompt`, laid out by the tokenizer's template.
            input_ids: Token ids instead of `prompt`; new tokens follow the last of them, whatever it is. Mask ids among them are
                filled in; with `max_new_tokens=0` nothing is written behind them.
            max_new_tokens: Number of new tokens of each text.
            block_length: Number of tokens in a block; blocks are decoded one after the other. By default all new tokens are one
                block. For a block-causal model, a multiple of the model's own block length, which is the default.
            num_inference_steps: Steps in total, shared over the blocks of a text, with at least one for each. By default as many
                as the scheduler's `tokens_per_step` takes, or one for each token.
            num_texts_per_prompt: Number of texts for each prompt; they follow each other in the output.
            generator: One `torch.Generator`, from which every text gets its own, or a list with one for each text. With a list a
                text comes out the same alone and in any batch (up to rounding in the model).
            stop_at_eos: Whether a text is finished with the block in which it ends. An end of text counts once everything
                before it is decoded.
            stop_strings: A string or strings that end a text with the block in which one is complete. The text is cut before the
                first of them (transformers' `generate` leaves the string there); `sequences` holds the tokens up to the one that
                completes it.
            think_end_token: What ends the thinking, such as "</think>". The text is what follows it, stop strings count there
                only, and `thinking` of the output has what stands before. Where it never comes, the whole text counts in the end.
            min_new_tokens: No end of text among as many of the first new tokens.
            eos_penalty: Subtracted from the logits of all tokens that end a text, in nats; a negative one makes texts shorter.
            postpone_eos: Whether positions at which an end of text is drawn are decoded behind all others of the block.
            suppress_tokens: Tokens that are never written: ids, or strings such as "<|endoftext|>".
            logits_processor: transformers' `LogitsProcessorList`, or functions of (input_ids, scores), called for the masked
                positions of all states, candidates too: `input_ids` are all other tokens of the text, those behind the position
                and then those before it, and `scores` its logits, after guidance. Masks and padding have ids beyond the
                vocabulary, all different.
            chat_template: Lays out `messages` instead of the tokenizer's: the text of a Jinja template, the `pathlib.Path` of a
                file with one, or the name of one of several that the tokenizer has.
            chat_template_kwargs: Variables for the template, as JSON knows them, such as {"enable_thinking": False}.
            continue_final_message: Whether the last message of each chat is an answer that the model is to continue, and not one
                for it to answer. The text is what it adds.
            guidance_scale: g >= 1 of classifier-free guidance: logits = uncond + g · (cond - uncond), where uncond has a mask for
                every token of the prompt, as in LLaDA (whose `cfg_scale` is g - 1). Every state takes two rows of the network
                then. 1 is off. Callbacks can set `pipe._guidance_scale`.
            negative_prompt: A prompt for uncond, of the same kind as the prompts: a text, a chat or ids, one for all or one for
                each. Not for block-causal models, nor where masks of a prompt are filled in.
            return_dict: Whether to return an `InfoGainTextOutput` instead of a tuple.
            callback_on_step_end: `callback(pipeline, step, timestep, kwargs) -> kwargs`, called after each step of a block. If it
                changes "tokens", they replace those of the block, and the model runs again.
            callback_on_step_end_tensor_inputs: What `kwargs` holds: "tokens" (R, block), "logits" (R, block, V) that are 0 at
                known tokens, "scores" (R, N), and "sample_index" (R,), the index of these texts in the batch. Texts whose block
                differs in width or in its number of steps are decoded one group after the other.
            lookahead_batch_size: The largest number of states (texts times candidates) in one forward pass.
            num_beams: Above 1: beam search in every block.
            num_runs: Above 1: every block is decoded this often, and the best run is kept.
            cache: "none"; "exact" for block-causal models, which does not run finished blocks again and gives the same logits; or
                for models with full attention (but not `AutoModelForMaskedLM`s) one of two approximations (arXiv 2505.22618), in
                which tokens outside a block see the block as it was when it began: those before it with "prefix", which runs the
                block and what follows; all others with "dual", which runs the block alone. By default "exact" if the model allows
                it, else "none".
            pack_candidates: With a cache, run the candidates of a text as one sequence over one copy of its keys and values,
                which saves memory.

        Returns:
            `InfoGainTextOutput`, or (texts, sequences, attention_mask, trace).

        Raises:
            ValueError: For the first argument that does not fit.
        """
        check_bool("return_dict", return_dict)
        generation = self._generation(
            prompt=prompt,
            messages=messages,
            input_ids=input_ids,
            max_new_tokens=max_new_tokens,
            block_length=block_length,
            num_inference_steps=num_inference_steps,
            num_texts_per_prompt=num_texts_per_prompt,
            generator=generator,
            stop_at_eos=stop_at_eos,
            stop_strings=stop_strings,
            think_end_token=think_end_token,
            min_new_tokens=min_new_tokens,
            eos_penalty=eos_penalty,
            postpone_eos=postpone_eos,
            suppress_tokens=suppress_tokens,
            logits_processor=logits_processor,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            continue_final_message=continue_final_message,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            lookahead_batch_size=lookahead_batch_size,
            num_beams=num_beams,
            num_runs=num_runs,
            cache=cache,
            pack_candidates=pack_candidates,
        )
        total = generation.num_masks()
        # Running from the first block to the last, so that an interruption between two of them counts.
        with self.running(generation.state), self.progress_bar(total=total) as progress_bar:
            for _ in generation.run():
                progress_bar.update(total - generation.num_masks() - progress_bar.n)
        self.maybe_free_model_hooks()
        output = generation.output()
        return output if return_dict else (output.texts, output.sequences, output.attention_mask, output.trace)

    def stream(self, prompt: str | list[str] | None = None, **call: Any) -> Iterator[TextBlock]:
        """Yields every block as soon as it is decoded. Takes the arguments of `__call__` except `return_dict`.

        Raises:
            TypeError: For an argument that `__call__` does not take.
            ValueError: As `__call__`.
        """
        parameters = inspect.signature(type(self).__call__).parameters
        arguments = {name: parameter.default for name, parameter in parameters.items() if name not in ("self", "return_dict")}
        unknown = [name for name in call if name not in arguments]
        if unknown:
            raise TypeError(f"stream() got an unexpected keyword argument {unknown[0]!r}")
        generation = self._generation(**{**arguments, "prompt": prompt, **call})

        def blocks() -> Iterator[TextBlock]:  # a generator of its own, so that arguments are checked before the first block
            try:
                yield from generation.run()
            finally:
                self.maybe_free_model_hooks()

        return blocks()

    @torch.no_grad()
    def log_likelihood(
        self,
        prompt: str | list[str] | None = None,
        answer: str | list[str] | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | torch.Tensor | None = None,
        answer_ids: Sequence[Sequence[int]] | torch.Tensor | None = None,
        likelihood: str = "llada",
        num_draws: int = 128,
        group_size: int | None = None,
        guidance_scale: float = 1.0,
        check_greedy: bool = False,
        batch_size: int = 8,
        generator: Generators = None,
    ) -> InfoGainLikelihood:
        r"""Estimates log p(answer | prompt), as the evaluations published with LLaDA (arXiv 2502.09992) and Dream do.

        A random part of an answer is masked, the log-probabilities of its tokens are weighted and summed up, and the mean is
        taken over many draws. For block-causal models the answer is masked block by block, each behind complete ones, and the
        estimates of its blocks are summed up. The mask is never predicted: it has no share in the probabilities.

        Args:
            prompt: Prompt or prompts. The spaces at the end of one belong to its answer.
            answer: The answers, one for each prompt.
            input_ids, answer_ids: Token ids instead of both.
            likelihood: "llada", "dream", "left_to_right" or "right_to_left"; see `draw_masks`.
            num_draws: How often an answer is masked, a multiple of `group_size`. Published are 128, and 1 for answers of one
                token.
            group_size: How many draws are spread evenly together; by default 8, or `num_draws` if that is less. The published
                evaluations take their batch size.
            guidance_scale: g >= 1, as in the call; LLaDA's `cfg` is g - 1.
            check_greedy: Whether to look, too, if decoding the most confident token in each step writes the answer.
            batch_size: Rows in one forward pass of the network; guidance doubles them.
            generator: One `torch.Generator`, or a list with one for each answer. Each answer has its own random numbers, so its
                estimate is the same alone and in any batch (up to rounding in the model).

        Returns:
            `InfoGainLikelihood`: estimates and standard errors in nats.

        Raises:
            ValueError: For the first argument that does not fit.
        """
        check_components(self, "model", "tokenizer")
        check_draws(likelihood, num_draws, group_size)
        check_guidance_scale(guidance_scale)
        check_bool("check_greedy", check_greedy)
        check_integer("batch_size", batch_size, 1)
        answers = self._answers(prompt, answer, input_ids, answer_ids)
        model = AnswerModel(self, guidance_scale, batch_size)
        output = log_likelihoods(
            model,
            answers,
            likelihood=likelihood,
            num_draws=num_draws,
            group_size=group_size,
            generators=answer_generators(generator, len(answers)),
        )
        if check_greedy:
            is_greedy, more = are_greedy(model, answers)
            output = InfoGainLikelihood(output.log_likelihood, output.standard_error, output.num_evaluations + more, is_greedy)
        self.maybe_free_model_hooks()
        return output

    def _answers(self, prompt: Any, answer: Any, input_ids: Any, answer_ids: Any) -> list[Answer]:
        given = {"prompt": prompt, "answer": answer, "input_ids": input_ids, "answer_ids": answer_ids}
        names = [name for name, value in given.items() if value is not None]
        if names not in (["prompt", "answer"], ["input_ids", "answer_ids"]):
            found = ", ".join(f"`{name}`" for name in names) or "none"
            raise ValueError(f"Either `prompt` and `answer` or `input_ids` and `answer_ids` must be given, got {found}.")
        if prompt is None:
            firsts: list[Any] = _id_lists(input_ids)
            seconds: list[Any] = _id_lists(answer_ids, "answer_ids")
        else:
            firsts, seconds = prompt_list("prompt", prompt), prompt_list("answer", answer)
        if len(firsts) != len(seconds):
            raise ValueError(f"There must be one answer for each of the {len(firsts)} prompts, got {len(seconds)}.")
        pairs = zip(firsts, seconds, strict=True)
        return [Answer(*pair) if prompt is None else encode_pair(self, *pair) for pair in pairs]


@contextmanager
def _named(name: str, kind: str) -> Iterator[None]:
    """Calls an argument in errors by its name, and not by the kind of prompt that it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(f"`{kind}`", f"`{name}`")) from error


def _id_lists(input_ids: Any, name: str = "input_ids") -> list[list[int]]:
    """`input_ids` as lists, from lists or tensors."""
    prompts = [ids.tolist() if isinstance(ids, torch.Tensor) else ids for ids in input_ids]
    if (
        not prompts
        or not all(isinstance(ids, (list, tuple)) and ids for ids in prompts)
        or not all(isinstance(token, int) for ids in prompts for token in ids)
    ):
        raise ValueError(f"`{name}` must be a list of lists of token ids or a tensor (B, L), none of them empty.")
    return [list(ids) for ids in prompts]
