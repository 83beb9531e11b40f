"""Multiple-choice questions: read, turned into tokens, and answered by the likelihood of each choice.

The files are those of LLM-Adapters, which the paper fine-tunes on: records `instruction`, `input`, `output`, `answer`,
as a JSON array or one record a line. https://github.com/AGI-Edgerunners/LLM-Adapters
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

IGNORE = -100  # label of a token outside the loss, as everywhere in transformers
# How LLM-Adapters' test questions name their choices, at the end of the instruction.
ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
RESPONSE = "\n\n### Response:\n"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the responses to choose from.

    Attributes:
        head: the prompt's beginning, never cut.
        body: its middle, the end of which is cut where the prompt is too long.
        tail: its end, never cut.
        responses: what the model may answer; of a training record whose choices are not known, the right one alone.
        answer: index of the right one.
        ends: whether the end of text follows a response, is learnt and is scored with it.
    """

    head: str
    body: str
    tail: str
    responses: tuple[str, ...]
    answer: int
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of a prompt and one response, the first `prompt` of them the prompt's."""

    ids: tuple[int, ...]
    prompt: int


def question_of(record: dict[str, Any]) -> Question:
    """The question of a record `instruction`, `input`, `output`, `answer` and, optionally, `choices`.

    Without `choices` they are read from the words "Answer format: a/b/c" that end LLM-Adapters' instructions. A
    response is the record's output with the choice in the place of the answer.

    Raises:
        ValueError: a field is missing or no text, or the answer is not in the output or among the choices.
    """
    for name in ("instruction", "output", "answer"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise ValueError(f"has no text in the field {name}")
    instruction, output, answer = record["instruction"].strip(), record["output"].strip(), record["answer"].strip()
    named = ANSWER_FORMAT.search(instruction)
    choices = record.get("choices") or (named.group(1).split("/") if named else [answer])
    before, found, after = output.rpartition(answer)
    if not found:
        raise ValueError(f"has the answer {answer!r}, which its output {output!r} does not contain")
    if answer not in choices:
        raise ValueError(f"has the answer {answer!r}, which is none of its choices {', '.join(choices)}")
    body = f"{instruction}\n\n### Input:\n{record['input'].strip()}" if record.get("input") else instruction
    responses = tuple(f"{before}{choice}{after}" for choice in choices)
    return Question(ALPACA, body, RESPONSE, responses, list(choices).index(answer))


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON or JSONL file.

    Raises:
        ValueError: the file does not exist, is empty, is no JSON, or holds a record that is no question; one sentence.
    """
    if not path.is_file():
        raise ValueError(f"the file {path} does not exist")
    text = path.read_text()
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither a JSON array nor JSON lines: {error}") from error
    if not records:
        raise ValueError(f"{path} holds no record")
    questions = []
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} of {path} is a {type(record).__name__}, not an object")
        try:
            questions.append(question_of(record))
        except ValueError as error:
            raise ValueError(f"record {number} of {path} {error}") from None
    return questions


def encode(tokenizer: PreTrainedTokenizerBase, question: Question, response: str, max_length: int) -> Row:
    """A prompt and a response as tokens: BOS, head, body, tail, response and EOS; the body is cut to fit.

    Args:
        tokenizer: gives the tokens; the parts are tokenised apart, so that a response has the same ones in training
            and in scoring.
        question: gives the prompt.
        response: follows it.
        max_length: most tokens of the row.

    Raises:
        ValueError: what must not be cut is longer than `max_length` already.
    """

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    answer = tokens(response) + [tokenizer.eos_token_id] * question.ends
    head, tail = start + tokens(question.head), tokens(question.tail)
    room = max_length - len(head) - len(tail) - len(answer)
    if room < 0:
        raise ValueError(f"--max-length {max_length} has no room for the prompt: give at least {max_length - room}")
    prompt = head + tokens(question.body)[:room] + tail
    return Row((*prompt, *answer), len(prompt))


def training_rows(tokenizer: PreTrainedTokenizerBase, questions: Iterable[Question], max_length: int) -> list[Row]:
    """Every question with its right response."""
    return [encode(tokenizer, one, one.responses[one.answer], max_length) for one in questions]


def collate(rows: Sequence[Row], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Rows as a batch padded on the right; labels are the response's tokens and `IGNORE` elsewhere.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 of shape (rows, longest row).
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[pad] * (width - len(row.ids))] for row in rows])
    length = torch.tensor([[len(row.ids)] for row in rows])
    prompt = torch.tensor([[row.prompt] for row in rows])
    place = torch.arange(width)
    inside = place < length
    labels = ids.masked_fill((place < prompt) | ~inside, IGNORE)
    batch = {"input_ids": ids, "attention_mask": inside.long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def log_likelihoods(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability in nats of each row's response given its prompt, and how many tokens it has.

    Args:
        model: a causal language model of transformers, also inside peft or a DeepSpeed engine.
        batch: as `collate` makes it.

    Returns:
        Two tensors of shape (rows,); the first is float32 and has gradients.
    """
    labels = batch["labels"]
    # The head is computed only from the column before the first response on: it is a good part of a small model.
    first = int((labels != IGNORE).any(0).nonzero()[0])
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=labels.shape[1] - first + 1,
        use_cache=False,
    ).logits
    targets = labels[:, first:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -losses.view_as(targets).sum(1), (targets != IGNORE).sum(1)


def response_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Nats per token of the responses, every row counting alike: so a batch may be divided among ranks at will."""
    likelihood, tokens = log_likelihoods(model, batch)
    return -(likelihood / tokens).mean()


@torch.no_grad()
def predictions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_length: int,
    batch_size: int = 64,
) -> list[int]:
    """The index of the likeliest response of every question.

    A response's likelihood is the product over its tokens, not divided by their number; with the end of text after
    them (`Question.ends`) that is the probability of these words and no more. The model is left in evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = [encode(tokenizer, one, response, max_length) for one in questions for response in one.responses]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))  # little padding
    scores = torch.empty(len(rows))
    pad = tokenizer.eos_token_id
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([rows[index] for index in chosen], pad, device)
        scores[chosen] = log_likelihoods(model, batch)[0].cpu()
    best, start = [], 0
    for one in questions:
        best.append(int(scores[start : start + len(one.responses)].argmax()))
        start += len(one.responses)
    return best
