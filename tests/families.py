"""Tiny models of every language-model family of the installed transformers, built by one rule from
their default configurations; nothing is downloaded.

``python -m tests.families`` writes docs/families.md, which says what cce_patch does with each.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers.models.auto import modeling_auto

from cce_ext.transformers import audit

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "families.md"
HEADER = """# Model families

What `cce_patch` does with a tiny random model of each class that writes text, as
`python -m tests.families` found it; a test holds it against this list. The models are built by one
rule from each family's default configuration, and \"not tried\" is about that rule, not about
`cce_patch`: `audit(model)` tells for a real model. Whether there is a softcap or a factor depends on
a model's own configuration.

"""
VOCAB = 96
LARGEST = 20_000_000  # parameters that a model may have after shrinking

# What a size is called in the configurations, and its tiny value. Only names that a family has are
# used.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "model_dim"), 32),
    "emb_dim": 32,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_groups"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dff", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_words"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 64),
    **dict.fromkeys(("state_size", "mamba_d_state", "conv_kernel", "mamba_d_conv"), 4),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("image_size", "img_size"), 32),
    "patch_size": 16,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    "hidden_size_per_layer_input": 8,
    "lru_width": 32,
    "full_attention_interval": 2,
    **dict.fromkeys(("mamba_n_groups", "n_groups", "attn_layer_offset"), 1),
    "attn_layer_period": 2,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
}
# Chains between output layer and loss, made such that leaving one out would be noticed.
CHAINS = {
    **dict.fromkeys(("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap"), 2.0),
    **dict.fromkeys(("logits_scaling", "logit_scale", "output_multiplier"), 3.0),
    **dict.fromkeys(("output_router_logits",), True),
    **dict.fromkeys(("router_aux_loss_coef", "aux_loss_coef"), 0.1),
}
# Where the rule alone does not make a valid configuration.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": "auto", "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 4, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), {"num_hidden_layers": 4}),
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 2, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mpt": {"attn_config": {}},
    "xmod": {"default_language": "en_XX"},
}
# Rotary embeddings of three axes, whose sizes have to add up to half a head.
MROPE = ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text")
EVEN_IF_NONE = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
EVEN_IF_NONE += ("n_shared_experts",)
# Tried in turn where a family does not run: hybrids need a layer of each kind.
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"output_router_logits": False},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 6, "num_kv_shared_layers": 0},
    {"num_hidden_layers": 8},
)
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")


def causal_families() -> list[str]:
    """Model types with a causal language model, one for each class of models."""
    names = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    first = {name: kind for kind, name in reversed(names)}
    own = {name: kind for kind, name in names if name.lower().startswith(kind.replace("_", ""))}
    return sorted((first | own).values())


def vision_families() -> list[str]:
    """Classes that read images and texts and write text, beyond those."""
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return sorted(set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()) - causal)


def tiny_options(config: Any) -> dict[str, Any]:
    """Options of a configuration's class that make it tiny, its parts included."""
    options: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = config.__dict__.get(name)
        if isinstance(part, transformers.PretrainedConfig):
            options[name] = tiny_options(part) | {"model_type": part.model_type}
        elif name in SIZES and (value is None or isinstance(value, int)):
            if value is not None or name in EVEN_IF_NONE:
                options[name] = SIZES[name]
        elif name == "rope_parameters" and isinstance(value, dict) and config.model_type in MROPE:
            options[name] = value | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
        elif name in CHAINS:
            options[name] = CHAINS[name]
        elif name in SPECIAL:
            options[name] = SPECIAL.index(name)
        elif "dropout" in name or name.endswith(("_pdrop", "_drop")):
            options[name] = 0.0
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            options[name] = min(value, VOCAB - 1)
    if "qk_rope_head_dim" in options:  # latent attention: a head of two parts, each with its keys
        options.pop("head_dim", None)
        options["num_key_value_heads"] = SIZES["num_attention_heads"]
    return options


def model_class(kind: str) -> type:
    """The causal language model of a model type, or the class of this name."""
    return getattr(transformers, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, kind))


@contextlib.contextmanager
def silence() -> Any:
    """No warnings of models that are not meant for use."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)


@functools.cache
def tiny_config(kind: str, **changes: Any) -> Any:
    config_class = model_class(kind).config_class
    return config_class(**(tiny_options(config_class()) | CHANGES.get(kind, {}) | changes))


def build(kind: str, **changes: Any) -> nn.Module:
    """A tiny model with random weights, float32.

    Raises:
        Exception: whatever the family raises if the rule does not fit it.
    """
    make, error = model_class(kind), None
    for attempt in ATTEMPTS:
        try:
            with silence():
                config = tiny_config(kind, **attempt | changes)
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in make(config).parameters())
                if size > LARGEST:
                    raise ValueError(f"the rule leaves it with {size} parameters")
                torch.manual_seed(0)
                model = make(config).float()
                model.train()(**batch(model))
            break
        except Exception as reason:
            error = error or reason
    else:
        raise error
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros, and nothing that hides a wrong factor
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def batch(model: nn.Module, length: int = 9) -> dict[str, torch.Tensor]:
    """Tokens and labels (2, length), some ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, VOCAB - 6, (2, length), generator=generator)
    labels = tokens.clone()
    labels[0, :3] = labels[1, -2:] = -100
    return {"input_ids": tokens, "labels": labels}


def table() -> str:
    """What cce_patch does with each family, as Markdown."""
    plain, chains, stored, unknown = [], [], [], []
    for kind in tqdm(causal_families() + vision_families(), "families", disable=None):
        name = model_class(kind).__name__
        try:
            model = build(kind)
        except Exception as error:
            words = " ".join(str(error).replace("|", "/").split())
            unknown.append((name, words if len(words) < 90 else f"{words[:90]}…"))
            continue
        with silence():
            found = audit(model)
        if not found.fused:
            stored.append((name, found.reason))
        elif found.logit_scale != 1 or found.softcap is not None or not found.shift:
            parts = ["logit_scale"] * (found.logit_scale != 1) + ["softcap"] * bool(found.softcap)
            chains.append((name, ", ".join(parts) or "labels are not shifted"))
        else:
            plain.append(name)
    fused = len(plain) + len(chains)
    lines = [
        f"transformers {transformers.__version__}: {fused + len(stored) + len(unknown)} classes, "
        f"{fused} fused, {len(stored)} keep their own code, {len(unknown)} not tried.",
        "",
        f"**Fused, nothing between output layer and loss ({len(plain)}):** {', '.join(plain)}.",
    ]
    for title, column, rows in (
        ("Fused, with a chain", "between output layer and loss", chains),
        ("Own code", "reason", stored),
        ("Not tried: no tiny model by the general rule", "what was missing", unknown),
    ):
        lines += ["", f"**{title} ({len(rows)}):**", "", f"| class | {column} |", "|---|---|"]
        lines += [f"| {name} | {words.strip()} |" for name, words in rows]
    return "\n".join(lines)


def documented() -> dict[str, bool] | None:
    """Class name -> whether docs/families.md says that it is fused; None if that was written with
    another transformers."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" not in text:
        return None
    found: dict[str, bool] = {}
    for part in text.split("\n**")[1:]:
        title, _, body = part.partition("**")
        rows = re.findall(r"^\| (\w+) \|", body, re.MULTILINE)
        names = [n for n in rows if n != "class"] or re.findall(r"\w+", body)
        if not title.startswith("Not tried"):
            found |= dict.fromkeys(names, title.startswith("Fused"))
    return found


if __name__ == "__main__":
    DOCUMENT.write_text(f"{HEADER}{table()}\n", encoding="utf-8")
