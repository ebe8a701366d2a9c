"""DPO and GRPO with log-probabilities of tokens that come without logits.

    python -m examples.preference dpo
    python -m examples.preference grpo

Both need log p of given tokens, by the policy with gradient and by a reference without. A model
patched with reduction="none" returns -log p of each token as its loss. The policy here is a small
random Llama with LoRA adapters on attention and lm_head, and the reference is the same model with
its adapters disabled, so that one model is in memory. DPO: Rafailov et al., arXiv 2305.18290. GRPO:
Shao et al., arXiv 2402.03300.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

from cce_ext.transformers import cce_patch

VOCAB, PROMPT, ANSWER = 512, 4, 8


def token_logprobs(model: peft.PeftModel, tokens: Tensor, counts: Tensor) -> Tensor:
    """log p (B, T - 1) of tokens 1 to T - 1 of each text (B, T), 0 where ``counts`` (B, T) is False;
    no logits (B, T, V) exist. ``model``: patched with reduction="none"."""
    labels = torch.where(counts, tokens, -100)
    return -model(input_ids=tokens, labels=labels).loss


def reference_logprobs(model: peft.PeftModel, tokens: Tensor, counts: Tensor) -> Tensor:
    """The same of the model without its adapters, without gradient."""
    with torch.no_grad(), model.disable_adapter():
        return token_logprobs(model, tokens, counts)


def dpo_loss(
    model: peft.PeftModel, chosen: Tensor, rejected: Tensor, counts: Tensor, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """DPO's loss and the reward margins (B,) of pairs of texts (B, T) that share ``counts`` (B, T)."""
    both, of_both = torch.cat([chosen, rejected]), torch.cat([counts, counts])
    policy = token_logprobs(model, both, of_both).sum(-1)
    reference = reference_logprobs(model, both, of_both).sum(-1)
    better, worse = (beta * (policy - reference)).chunk(2)
    margins = better - worse
    return -F.logsigmoid(margins).mean(), margins.detach()


def grpo_loss(
    policy: Tensor, sampled: Tensor, reference: Tensor, rewards: Tensor, counts: Tensor,
    clip: float = 0.2, beta: float = 0.02,
) -> Tensor:  # fmt: skip
    """GRPO's loss of groups of answers to one prompt.

    policy, sampled, reference: log-probabilities (B, G, T) now, when the answers were sampled, and by
    the reference. rewards (B, G). counts (B, G, T): the answers' tokens.
    """
    advantages = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)
    ratio = (policy - sampled).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantages[..., None], clipped * advantages[..., None])
    distance = (reference - policy).exp() - (reference - policy) - 1
    return -((gain - beta * distance) * counts).sum() / counts.sum()


def make_model(seed: int = 0) -> peft.PeftModel:
    """A small Llama with adapters, patched to return the loss of each token."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "lm_head"]
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        # Hidden states of trained models share a direction, by which a token can be made likelier
        # everywhere; random ones do not.
        model.get_input_embeddings().weight.add_(0.03 * torch.randn(config.hidden_size))
    model = peft.get_peft_model(model, adapters)
    return cce_patch(model, reduction="none")


def counted(tokens: Tensor) -> Tensor:
    """Which tokens (..., T) belong to the answer."""
    return (torch.arange(tokens.shape[-1]) >= PROMPT).expand(tokens.shape)


def train_dpo(steps: int) -> list[float]:
    """Prefers answers of small token ids. Returns the mean margin of each step."""
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    margins = []
    for _ in tqdm(range(steps), desc="DPO", disable=None):
        prompts = torch.randint(VOCAB, (8, PROMPT), generator=generator)
        small = torch.randint(VOCAB // 2, (8, ANSWER), generator=generator)
        chosen, rejected = (torch.cat([prompts, x], 1) for x in (small, small + VOCAB // 2))
        loss, margin = dpo_loss(model, chosen, rejected, counted(chosen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        margins.append(margin.mean().item())
    return margins


def train_grpo(steps: int, group: int = 8) -> list[float]:
    """Is rewarded for the share of small token ids. Returns the mean reward of each step."""
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rewards = []
    for _ in tqdm(range(steps), desc="GRPO", disable=None):
        prompts = torch.randint(VOCAB, (4, PROMPT)).repeat_interleave(group, 0)
        # Generation does not touch the patch: it calls the model without labels.
        texts = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            max_new_tokens=ANSWER, min_new_tokens=ANSWER,
        )  # fmt: skip
        counts = counted(texts)
        reward = (texts[:, PROMPT:] < VOCAB // 2).float().mean(1)
        with torch.no_grad():
            sampled = token_logprobs(model, texts, counts)
        reference = reference_logprobs(model, texts, counts)
        for _ in range(2):  # updates for each sample
            parts = (token_logprobs(model, texts, counts), sampled, reference)
            shaped = (x.unflatten(0, (-1, group)) for x in (*parts, reward, counts[:, 1:]))
            loss = grpo_loss(*shaped)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(reward.mean().item())
    return rewards


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Trains, and prints and returns the margin or reward of each step."""
    parser = argparse.ArgumentParser("examples.preference", description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=["dpo", "grpo"])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    train, name = {"dpo": (train_dpo, "margin"), "grpo": (train_grpo, "reward")}[options.method]
    values = train(options.steps)
    print(f"{options.method}: mean {name} {values[0]:.3f} at first, {values[-1]:.3f} at last")
    return values


if __name__ == "__main__":
    main()
