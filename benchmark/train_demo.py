"""Trains the bundled demo models (`flexbatch/data/demo`, `flexbatch/data/demo-draft`) on the standard library's own
source.

    python -m benchmark.train_demo --minutes 7 --compile          # as the bundled models were trained, on one H200
    python -m benchmark.train_demo --minutes 1 --batch 4 --length 256 --held-out-tokens 20000 --out /tmp/models   # a
    quick look on a CPU

The target minimizes the cross entropy of the corpus. The draft, a ninth of its size, mostly imitates the target's
distribution (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", at temperature 1), because what counts
for a draft is agreement with the target. Both keep the checkpoint that is best on held-out files.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark.demo_files import (
    CONTEXT,
    Corpus,
    Shape,
    check_folder,
    completions,
    load_corpus,
    save_model,
    write_card,
)
from benchmark.demo_model import Llama

TARGET = Shape(name="demo", hidden=256, layers=5, heads=8, kv_heads=2, head_dim=32, intermediate=512)
DRAFT = Shape(name="demo-draft", hidden=80, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=144)


@dataclass(frozen=True)
class Recipe:
    """How long and how to train one model; ``seconds`` includes compilation and held-out evaluations."""

    seconds: float
    batch: int
    length: int
    peak_rate: float
    weight_decay: float
    evaluate_every: int
    warmup_steps: int = 200

    def rate(self, step: int, elapsed: float) -> float:
        """Linear warm-up by steps, then a cosine to 2 % of the peak by time."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed / self.seconds)))
        return self.peak_rate * min(1.0, (step + 1) / self.warmup_steps) * (0.02 + 0.98 * cosine)


@dataclass(frozen=True)
class Trained:
    """A trained model and how it came about."""

    model: Llama
    recipe: Recipe
    steps: int

    def describe(self, corpus: Corpus) -> str:
        passes = self.steps * self.recipe.batch * self.recipe.length / corpus.train.numel()
        return (
            f"{self.steps:,} steps of {self.recipe.batch} x {self.recipe.length} tokens ({passes:.0f} passes "
            "over the corpus)"
        )


def cross_entropy(logits: Tensor, window: Tensor) -> Tensor:
    """Mean nats per token of window [batch, length + 1] under logits [batch, length, vocab]."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def imitation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence KL(teacher || student) per token, nats; logits of the same shape."""
    student, teacher = student.float().log_softmax(-1).flatten(0, 1), teacher.float().log_softmax(-1).flatten(0, 1)
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


def half_precision(device: torch.device) -> torch.autocast:
    """bf16 matrix products over fp32 weights on a GPU; fp32 on a CPU, where bf16 without AMX is emulated and ten
    times slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def held_out_nats(model: Llama, held_out: Tensor, length: int, batch: int = 8) -> float:
    """Mean nats per token over consecutive windows of the held-out stream."""
    model.eval()
    rows = (held_out.numel() - 1) // length
    index = torch.arange(rows, device=held_out.device)[:, None] * length + torch.arange(
        length + 1, device=held_out.device
    )
    total = 0.0
    for part in index.split(batch):
        window = held_out[part]
        with half_precision(held_out.device):
            logits = model(window[:, :-1])
        total += cross_entropy(logits, window).item() * len(part)
    model.train()
    return total / rows


def train(
    model: Llama, loss_of: Callable[[Tensor], Tensor], corpus: Corpus, recipe: Recipe, keep: Callable[[Llama], None]
) -> int:
    """Trains in place for ``recipe.seconds``, calls ``keep`` at every new best, leaves the best weights in the
    model. Returns the number of steps."""
    start, stream = time.monotonic(), corpus.train
    decayed = [p for p in model.parameters() if p.dim() == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=recipe.peak_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    offsets = torch.arange(recipe.length + 1, device=stream.device)
    best, best_weights, step, done = math.inf, copy.deepcopy(model.state_dict()), 0, False
    while not done:
        elapsed = time.monotonic() - start
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, elapsed)
        begin = torch.randint(0, stream.numel() - recipe.length, (recipe.batch, 1), device=stream.device)
        loss = loss_of(stream[begin + offsets])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        done = elapsed >= recipe.seconds
        if done or step % recipe.evaluate_every == 0:
            nats = held_out_nats(model, corpus.held_out, recipe.length)
            seen = f"step {step}, {elapsed:.0f} s, {step * recipe.batch * recipe.length / 1e6:.0f} M tokens"
            print(
                f"{model.shape.name}: {seen}, train loss {loss.item():.4f}, held-out {nats:.4f} nats/token",
                file=sys.stderr,
                flush=True,
            )
            if nats < best:
                best, best_weights = nats, copy.deepcopy(model.state_dict())
                keep(model)
    model.load_state_dict(best_weights)
    model.eval()
    return step


@torch.no_grad()
def agreement(target: Llama, draft: Llama, held_out: Tensor, length: int) -> tuple[float, float]:
    """How well the draft predicts the target on held-out text: share of equal arg max, and mean sum of min(p, q),
    the acceptance rate of speculative sampling (Leviathan et al. 2023, section 3.3)."""
    equal, overlap, count = 0.0, 0.0, 0
    for window in held_out[: held_out.numel() // length * length].view(-1, length).split(4):
        p, q = target(window).float().softmax(-1), draft(window).float().softmax(-1)
        equal += (p.argmax(-1) == q.argmax(-1)).sum().item()
        overlap += torch.minimum(p, q).sum().item()
        count += window.numel()
    return equal / count, overlap / count


def train_pair(arguments: argparse.Namespace, corpus: Corpus, device: torch.device) -> tuple[Trained, Trained]:
    """Target, then draft; both are saved below ``arguments.out`` whenever they are better than before."""

    def keep(model: Llama) -> None:
        save_model(model.state_dict(), model.shape, corpus.tokenizer, arguments.out / model.shape.name)

    def target_loss(window: Tensor) -> Tensor:
        with half_precision(device):
            return cross_entropy(target(window[:, :-1]), window)

    def draft_loss(window: Tensor) -> Tensor:
        with half_precision(device):
            logits = draft(window[:, :-1])
            with torch.no_grad():
                wanted = target(window[:, :-1])
            return 0.2 * cross_entropy(logits, window) + 0.8 * imitation(logits, wanted)

    target, draft = Llama(TARGET, arguments.dropout).to(device), Llama(DRAFT).to(device)
    trained = []
    for model, loss, recipe in (
        (
            target,
            target_loss,
            Recipe(33 * arguments.minutes, arguments.batch, arguments.length, 4e-3, 0.1, arguments.evaluate_every),
        ),
        (
            draft,
            draft_loss,
            Recipe(
                27 * arguments.minutes,
                max(1, arguments.batch // 2),
                arguments.length,
                6e-3,
                0.1,
                arguments.evaluate_every,
            ),
        ),
    ):
        steps = train(model, torch.compile(loss) if arguments.compile else loss, corpus, recipe, keep)
        trained.append(Trained(model, recipe, steps))
    return trained[0], trained[1]


def run(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    corpus = load_corpus(arguments.corpus, device, arguments.held_out_tokens)
    print(f"corpus: {corpus.describe()}", file=sys.stderr, flush=True)
    pair = train_pair(arguments, corpus, device)
    equal, overlap = agreement(pair[0].model, pair[1].model, corpus.held_out, arguments.length)
    command = (
        f"python -m benchmark.train_demo --minutes {arguments.minutes:g} --batch {arguments.batch} --length "
        f"{arguments.length}"
    )
    command += f" --dropout {arguments.dropout:g} --seed {arguments.seed}" + (" --compile" if arguments.compile else "")
    for trained in pair:
        model, folder = trained.model, arguments.out / trained.model.shape.name
        use_weights(model, check_folder(folder, model, corpus.held_out[:64]))
        nats = held_out_nats(model, corpus.held_out, arguments.length)
        facts = {
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "training": trained.describe(corpus),
            "machine": f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}",
            "command": command,
            "draft": f"{100 * equal:.1f} % same most likely token, {100 * overlap:.1f} % overlap of the "
            "distributions (sum of min(p, q))",
        }
        write_card(folder, model.shape, corpus, nats, facts, completions(folder))
        print(f"{folder}: held-out {nats * corpus.tokens_per_byte:.4f} nats/byte, {facts['draft']}", file=sys.stderr)


def use_weights(model: Llama, weights: dict[str, Tensor]) -> None:
    """Gives the model the weights as stored, so that what is reported is what is shipped."""
    model.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, default=None, help="folder of .py files (default: this interpreter's standard library)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "flexbatch" / "data",
        help="parent of the model folders demo and demo-draft",
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="training time of target and draft together")
    parser.add_argument("--batch", type=int, default=32, help="windows in a step")
    parser.add_argument("--length", type=int, default=CONTEXT, help="tokens in a window")
    parser.add_argument(
        "--held-out-tokens",
        type=int,
        default=None,
        help="evaluate on the first of the held-out tokens only (quick looks on a CPU)",
    )
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps between held-out evaluations")
    parser.add_argument("--dropout", type=float, default=0.1, help="residual dropout of the target")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and windows")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
