"""Command line of the pre-training example, and the model and DeepSpeed configurations it leads to."""

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from ds_fira.settings import check_params

from .data import BLOCK_ROWS
from .sources import find_files
from .text_data import STREAM_VALIDATION_TOKENS, STREAMING_BYTES, TOKENIZER_DOCUMENTS

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# JSON parameter of FiraAdam -> option. A value given on the command line wins over the DeepSpeed JSON.
FIRA_PARAMS = ("rank", "alpha", "update_proj_gap", "target_modules")
SHARED_PARAMS = ("lr", "weight_decay")
SHAPE_OPTIONS = ("hidden_size", "intermediate_size", "layers", "heads")
SHAPE_DEFAULTS = {"hidden_size": 128, "layers": 4, "heads": 4}
VOCAB_SIZE = 4096
MINIMAL_VOCAB_SIZE = 256 + 2
ADAMW_LR = 3e-3
WARMUP_SHARE = 0.1
MIN_LR_RATIO = 0.1


class OneSentenceParser(argparse.ArgumentParser):
    """Stops with one sentence, not with a page of usage: every process of the launcher prints it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def build_parser() -> OneSentenceParser:
    """The options; those without a default here take it from the model shape or from the DeepSpeed JSON."""
    parser = OneSentenceParser(description="Pre-train a LLaMA with FiraAdam under DeepSpeed.", allow_abbrev=False)

    model = parser.add_argument_group("model")
    model.add_argument("--model-config", type=Path, help="JSON file of a transformers LlamaConfig, instead of a shape")
    model.add_argument("--hidden-size", type=positive, help=f"default {SHAPE_DEFAULTS['hidden_size']}")
    model.add_argument("--intermediate-size", type=positive, help="default 8/3 of the hidden size, in steps of 64")
    model.add_argument("--layers", type=positive, help=f"default {SHAPE_DEFAULTS['layers']}")
    model.add_argument("--heads", type=positive, help=f"default {SHAPE_DEFAULTS['heads']}")
    model.add_argument("--no-activation-checkpointing", action="store_true", help="faster, with more memory")

    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        "--text",
        metavar="SOURCE",
        help="a txt, csv, json, jsonl or parquet file, also .gz, a folder or glob of them, c4, or a hub's "
        "owner/name[:config] (default: the packaged reviews)",
    )
    text.add_argument("--text-column", default="text", help="column of the text (default text)")
    text.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        help="tokenise while training runs, instead of preparing the text as a whole (default: for a hub's text and "
        f"for more than {STREAMING_BYTES // 10**6} MB of files)",
    )
    text.add_argument(
        "--lanes", type=positive, help="parts of a stream, a multiple of the processes (default: one for each)"
    )
    text.add_argument(
        "--block-rows", type=positive, default=BLOCK_ROWS, help="sequences of a stream that are shuffled together"
    )
    text.add_argument(
        "--validation-data", metavar="SOURCE", help="as --data (default: its validation split, or documents held out)"
    )
    text.add_argument(
        "--validation-tokens",
        type=positive,
        help=f"(default {STREAM_VALIDATION_TOKENS:,} of a stream, all of a text prepared as a whole)",
    )
    text.add_argument(
        "--tokenizer",
        help="a hub's name, or a local folder, tokenizer.json or SentencePiece .model (default: a byte-level BPE is "
        f"trained on the text, of a stream on its first {TOKENIZER_DOCUMENTS:,} documents)",
    )
    text.add_argument(
        "--vocab-size",
        type=positive,
        help=f"of the model (default {VOCAB_SIZE}, or as many as --tokenizer has, or the model config's)",
    )
    text.add_argument("--seq-length", type=positive, default=128)
    text.add_argument("--cache-dir", type=Path, default=REPOSITORY / "runs" / "cache", help="keeps prepared text")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, default=450, help="optimizer steps")
    training.add_argument("--batch-size", type=positive, help="sequences per process (default: the JSON's)")
    training.add_argument("--warmup-steps", type=int, help="default a tenth of the steps")
    training.add_argument("--min-lr-ratio", type=float, help=f"where the cosine ends (default {MIN_LR_RATIO})")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--eval-every", type=positive, default=50, help="steps between validations")
    training.add_argument("--eval-batches", type=positive, default=8, help="per process; the last validation uses all")
    training.add_argument("--time-budget", type=float, help="seconds of training: a slow machine takes fewer steps")
    training.add_argument("--save-every", type=positive, help="steps between training states, for --resume")
    training.add_argument("--resume", action="store_true", help="go on from the last state in the output directory")

    optimizer = parser.add_argument_group("optimizer", "defaults come from the DeepSpeed JSON")
    optimizer.add_argument("--optimizer", choices=("FiraAdam", "AdamW"))
    optimizer.add_argument("--lr", type=float, help=f"default the JSON's; for AdamW beside a FiraAdam JSON {ADAMW_LR}")
    optimizer.add_argument("--weight-decay", type=float)
    optimizer.add_argument("--rank", type=positive, help="of the projection")
    optimizer.add_argument("--alpha", type=float, help="scale of the projected update")
    optimizer.add_argument("--update-proj-gap", type=positive, help="steps between subspace refreshes")
    optimizer.add_argument("--target-modules", nargs="+", help="modules whose weights are projected")

    parser.add_argument("--deepspeed-config", type=Path, default=REPOSITORY / "ds_configs" / "zero2_bf16.json")
    parser.add_argument("--output-dir", type=Path, default=REPOSITORY / "runs" / "pretrain")
    parser.add_argument("--prompt", default="This movie", help="start of the generated sample")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="passed by the deepspeed launcher")
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, LlamaConfig, dict[str, Any]]:
    """Read and check the command line; returns the options, the model and the DeepSpeed configuration.

    A contradiction or a missing file ends the process with one sentence and status 2. Nothing here communicates, so
    every process comes to the same end.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        check_files(options)
        model_config = build_model_config(options)
        deepspeed_config = build_deepspeed_config(options)
        check_schedule(options, deepspeed_config)
    except ValueError as error:
        parser.error(str(error))
    return options, model_config, deepspeed_config


def check_files(options: argparse.Namespace) -> None:
    """Raise `ValueError` for a file or folder that cannot be used."""
    for source in (options.data, options.validation_data):
        if source is not None:
            find_files(source)
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {options.seed}")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise ValueError(f"--output-dir {options.output_dir} is a file")
    if options.resume and not (options.output_dir / "state" / "latest").is_file():
        raise ValueError(f"--resume found no training state in {options.output_dir / 'state'}: was --save-every set?")


def check_schedule(options: argparse.Namespace, deepspeed_config: dict[str, Any]) -> None:
    """Fill in the schedule's defaults; raise `ValueError` where it cannot work."""
    if "scheduler" in deepspeed_config and (options.warmup_steps is not None or options.min_lr_ratio is not None):
        raise ValueError(
            f"--warmup-steps and --min-lr-ratio contradict the scheduler that {options.deepspeed_config} sets"
        )
    if options.warmup_steps is None:
        options.warmup_steps = round(options.steps * WARMUP_SHARE)
    if options.min_lr_ratio is None:
        options.min_lr_ratio = MIN_LR_RATIO
    if not 0 <= options.warmup_steps < options.steps:
        raise ValueError(f"--warmup-steps must be at least 0 and below --steps {options.steps}")
    if not 0 <= options.min_lr_ratio <= 1:
        raise ValueError(f"--min-lr-ratio must lie between 0 and 1, not at {options.min_lr_ratio}")


def read_json(path: Path, option: str) -> dict[str, Any]:
    """The object in a JSON file that `option` named; raises `ValueError` with a sentence otherwise."""
    if not path.is_file():
        raise ValueError(f"{option} {path} does not exist")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{option} {path} holds no JSON object")
    return content


def build_model_config(options: argparse.Namespace) -> LlamaConfig:
    """The LLaMA to train, and `options.vocab_size` made to agree with it.

    `options.vocab_size` stays None where the vocabulary is to be that of `--tokenizer`, which is not open yet.
    """
    if options.model_config is None:
        shape = {name: getattr(options, name) or SHAPE_DEFAULTS.get(name) for name in SHAPE_OPTIONS}
        values = {
            "vocab_size": options.vocab_size or VOCAB_SIZE,
            "hidden_size": shape["hidden_size"],
            "intermediate_size": shape["intermediate_size"] or -(-shape["hidden_size"] * 8 // (3 * 64)) * 64,
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": shape["heads"],
            "max_position_embeddings": options.seq_length,
        }
    else:
        given = [name for name in SHAPE_OPTIONS if getattr(options, name) is not None]
        if given:
            raise ValueError(f"--model-config and --{given[0].replace('_', '-')} both set the shape of the model")
        values = read_json(options.model_config, "--model-config")
    try:
        config = LlamaConfig(**values)
    except StrictDataclassError as error:
        raise ValueError(f"this model cannot be built: {error.__cause__ or error}") from error

    if options.vocab_size not in (None, config.vocab_size):
        raise ValueError(f"--vocab-size {options.vocab_size} contradicts {config.vocab_size} in --model-config")
    if options.tokenizer is None or options.model_config is not None:
        options.vocab_size = config.vocab_size
    if options.tokenizer is None and config.vocab_size < MINIMAL_VOCAB_SIZE:
        raise ValueError(
            f"a vocabulary of {config.vocab_size} cannot hold the 256 bytes and two marks of the tokenizer"
        )
    if options.seq_length > config.max_position_embeddings:
        positions = config.max_position_embeddings
        raise ValueError(f"--seq-length {options.seq_length} exceeds the {positions} positions of the model")
    if options.seq_length < 2:
        raise ValueError("--seq-length must be at least 2: the first token of a sequence is not predicted")
    config.use_cache = False  # of no use in training, and refused under activation checkpointing
    return config


def build_deepspeed_config(options: argparse.Namespace) -> dict[str, Any]:
    """The base JSON with the values of the command line over it."""
    config = read_json(options.deepspeed_config, "--deepspeed-config")
    if '"auto"' in json.dumps(config):
        raise ValueError(f'{options.deepspeed_config} holds "auto" values, for the Hugging Face Trainer only')
    # DeepSpeed clips at 1.0 when the JSON is silent; written out here, the summary shows it.
    config.setdefault("gradient_clipping", 1.0)
    if options.batch_size is not None:
        config.pop("train_batch_size", None)
        config["train_micro_batch_size_per_gpu"] = options.batch_size
    elif not {"train_batch_size", "train_micro_batch_size_per_gpu"} & config.keys():
        raise ValueError(f"{options.deepspeed_config} sets no batch size: pass --batch-size")

    base = config.get("optimizer", {"type": "FiraAdam", "params": {}})
    params = dict(base.get("params", {}))
    options.optimizer = options.optimizer or base["type"]
    if options.optimizer not in ("FiraAdam", "AdamW"):
        raise ValueError(f"{options.deepspeed_config} names the optimizer {options.optimizer}: pass --optimizer")
    if options.optimizer == "AdamW":
        given = [name for name in FIRA_PARAMS if getattr(options, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} belongs to FiraAdam and contradicts --optimizer AdamW")
        if base["type"] != "AdamW":
            params = {name: value for name, value in params.items() if name in ("betas", "eps", "weight_decay")}
            params["lr"] = ADAMW_LR
        params["torch_adam"] = True  # DeepSpeed's own Adam compiles a C++ or CUDA extension first
    elif base["type"] != "FiraAdam":
        params = {name: value for name, value in params.items() if name in ("betas", "eps", *SHARED_PARAMS)}
    for name in (*SHARED_PARAMS, *FIRA_PARAMS):
        if getattr(options, name) is not None:
            params[name] = getattr(options, name)
    if options.optimizer == "FiraAdam":
        check_params(params)
    config["optimizer"] = {"type": options.optimizer, "params": params}
    return config
