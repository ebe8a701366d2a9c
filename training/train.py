"""Trains or fine-tunes a causal language model of transformers.

    python -m training.train --model NAME_OR_FOLDER --data corpus.jsonl --output out
    python -m training.train --config config.json --tokenizer FOLDER --data a.txt b.txt --output out
    accelerate launch --multi_gpu -m training.train ...             # DistributedDataParallel
    accelerate launch --use_fsdp --fsdp_version 2 -m training.train ...     # FSDP2

The loss is cce_ext's (``--stored-logits`` for the model's own). ``--lora-rank`` trains adapters
instead of the whole model. A run that was stopped goes on where its last checkpoint is. Beside the
checkpoints the output folder gets plots of loss and memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers.trainer_utils import get_last_checkpoint

from cce_ext.transformers import audit, cce_patch
from training.data import Fields, load_blocks
from training.record import Recorder


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    summary, form = __doc__.splitlines()[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("training.train", description=summary, formatter_class=form)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a pretrained model: a folder or a name")
    source.add_argument("--config", help="a config.json or its folder: a new model")
    parser.add_argument("--tokenizer", help="a folder or a name; the model's own if left out")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help=".txt or .jsonl files, or names of data sets of the hub",
    )
    parser.add_argument("--eval-data", nargs="+", help="the same, to evaluate on")
    parser.add_argument("--split", default="train", help="of a data set of the hub")
    parser.add_argument("--field", default="text", help="the text of a .jsonl line or a row")
    parser.add_argument("--prompt-field", help="a text before it that does not count in the loss")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a block")
    parser.add_argument("--batch", type=int, default=4, help="blocks of a device and a pass")
    parser.add_argument("--accumulate", type=int, default=1, help="passes of a step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--eval-every", type=int, help="steps between evaluations; at the end only")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--warmup", type=int, default=20, help="steps of rising learning rate")
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains the whole model")
    parser.add_argument("--lora-alpha", type=float, help="twice the rank if left out")
    parser.add_argument(
        "--lora-targets", nargs="+", default=["all-linear"],
        help="names of layers; lm_head has to be named, all-linear leaves it out",
    )  # fmt: skip
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true", help="adapters with a magnitude")
    parser.add_argument("--dtype", default="auto", help="of the weights; auto is the checkpoint's")
    parser.add_argument("--impl", default="cce", help="as for linear_cross_entropy")
    parser.add_argument("--stored-logits", action="store_true", help="the model's own loss")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def build_model(options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """The model, with adapters if asked for, and patched; on its device, if its weights are not sharded."""
    auto = transformers.AutoModelForCausalLM
    if options.model:
        model = auto.from_pretrained(options.model, dtype=options.dtype)
    else:
        config = transformers.AutoConfig.from_pretrained(options.config)
        dtype = {} if options.dtype == "auto" else {"dtype": getattr(torch, options.dtype)}
        model = auto.from_config(config, **dtype)
    # Before the adapters: PEFT ties those of tied layers by views, which a move takes apart. Who shards the weights
    # moves them a part at a time, and takes the views apart as well.
    if not any(parse_flag_from_env(f"ACCELERATE_USE_{who}") for who in ("FSDP", "DEEPSPEED")):
        model.to(device)
    if options.lora_rank:
        import peft

        targets = options.lora_targets
        # A keyword that older versions of PEFT do not know.
        tied = model.config.tie_word_embeddings and "lm_head" in targets
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=options.lora_rank,
            lora_alpha=options.lora_alpha or 2 * options.lora_rank,
            lora_dropout=options.lora_dropout,
            use_dora=options.dora,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            **({"ensure_weight_tying": True} if tied else {}),
        )
        model = peft.get_peft_model(model, config)
    return model if options.stored_logits else cce_patch(model, impl=options.impl)


def training_arguments(options: argparse.Namespace) -> transformers.TrainingArguments:
    """Our options as the Trainer's."""
    return transformers.TrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        max_steps=options.steps,
        save_steps=options.save_every,
        save_total_limit=2,
        learning_rate=options.lr,
        warmup_steps=options.warmup,
        lr_scheduler_type="cosine",
        logging_steps=max(1, min(10, options.steps // 10)),
        # By itself the Trainer hears `accelerate launch --cpu` with several ranks alone.
        use_cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"),
        bf16=options.bf16,
        gradient_checkpointing=options.checkpointing,
        eval_strategy="steps" if options.eval_every and options.eval_data else "no",
        eval_steps=options.eval_every,
        prediction_loss_only=True,
        report_to=[],
        seed=options.seed,
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, saves into the output folder and returns the last metrics: train_loss, and eval_loss
    where there is data for it."""
    options = parse(arguments)
    transformers.set_seed(options.seed)
    source = options.tokenizer or options.model or options.config
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    fields = Fields(options.field, options.prompt_field)
    train, held_out = (
        sources and load_blocks(sources, tokenizer, options.length, fields, options.split)
        for sources in (options.data, options.eval_data)
    )
    settings = training_arguments(options)
    model = build_model(options, settings.device)
    trainer = transformers.Trainer(
        model,
        settings,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
        callbacks=[Recorder()],
    )
    say = print if trainer.is_world_process_zero() else lambda *_: None
    where = f"{settings.device.type} x {settings.world_size}"
    say(f"{len(train)} blocks of {options.length} tokens, {where}; loss: {audit(model)}")
    last = get_last_checkpoint(options.output) if options.output.is_dir() else None
    if last:
        say(f"going on from {last}")
    metrics = dict(trainer.train(resume_from_checkpoint=last).metrics)
    trainer.save_model()
    if held_out:
        metrics |= trainer.evaluate()
    say(", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))
    return metrics


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # a rank that exits with one open may be aborted
