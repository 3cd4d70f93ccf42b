"""Train an EAGLE-3 head (https://arxiv.org/abs/2503.01840) for a model on its own answers, as answers.py writes them.

    python benchmarks/eagle3/train.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --answers answers.jsonl \\
        --out head --log train.jsonl

The target's states are computed once and kept beside the answers. In training each draft follows the head's own states, as it
does in a server. One answer of each 50 is not trained on; the log has the acceptance length of greedy drafts there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import head
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from rows import ROW, Rows, causal, context, pack

from sgl_jax.models import decoder
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.loader import load_weights
from sgl_jax.models.weights import Weights
from sgl_jax.ops.norm_rope import rms_norm

BATCH = 1  # rows
PASSES = 3  # drafts in a chain that training follows
ALONE = 0.2  # part of the time in which it follows the first draft alone
WARM_UP = 20  # steps
CHECKED = 50  # rows of which one is checked instead of trained on
REPORT = 50  # steps between lines of the log
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def target_states(weights: Weights[jax.Array], config: DecoderConfig, rows: Rows, path: Path) -> np.ndarray:
    """Return what the head learns from, [rows, ROW, 3 + 1, D] in bfloat16: inputs of the layers that it reads and the
    output after the final norm. They are kept in a file; rows that it has already are not computed again."""
    draft = config.draft
    assert draft is not None
    shape = (ROW, len(draft.target_layers) + 1, config.hidden_size)
    size = int(np.prod(shape)) * BFLOAT16.itemsize
    num_done = path.stat().st_size // size if path.exists() else 0

    @jax.jit
    def states(weights, row):
        attend = causal(row, config)
        end, _, tapped = decoder.hidden_states(
            weights,
            config,
            [row.tokens.reshape(-1)],
            jnp.zeros(0),
            [context(row, config, "bfloat16", attend)],
            draft.target_layers,
        )
        return jnp.stack([*tapped, rms_norm(end, weights.final_norm, config.rms_norm_eps)], axis=1)

    begin = time.monotonic()
    with path.open("ab") as file:
        file.truncate(num_done * size)
        for i in range(num_done, len(rows.tokens)):
            file.write(np.asarray(states(weights, rows[i : i + 1])).tobytes())
            if i % 50 == 49:
                print(f"states of {i + 1}/{len(rows.tokens)} rows, {time.monotonic() - begin:.0f} s", flush=True)
    return np.memmap(path, BFLOAT16, "r", shape=(len(rows.tokens), *shape))


def frequent_ids(rows: Rows, size: int) -> np.ndarray:
    """Return the `size` ids that answers have most often, ascending."""
    counts = np.bincount(np.roll(rows.tokens, -1, axis=1)[rows.answers], minlength=size)
    ids = np.sort(np.argsort(-counts, kind="stable")[:size])
    print(f"{size} ids make {counts[ids].sum() / counts.sum():.2%} of {counts.sum()} answer tokens", flush=True)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids that are drafted")
    parser.add_argument("--minutes", type=float, default=25, help="of training, after the states")
    parser.add_argument("--rate", type=float, default=7e-4, help="the highest learning rate")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    target = decoder_config(checkpoint.config, checkpoint.generation_config, checkpoint.tensors)
    head.write_config(args.out, checkpoint.config, args.vocab_size)
    config = head.with_head(args.out, target)
    weights = load_weights(checkpoint, target, "bfloat16")
    answers = [json.loads(line) for line in args.answers.read_text().splitlines()]
    rows = pack([(answer["prompt_ids"], answer["output_ids"]) for answer in answers])
    states = target_states(weights, config, rows, args.answers.with_suffix(".states"))
    ids = frequent_ids(rows, args.vocab_size)
    late = states[:8, :, -2].astype(np.float32)
    scale = float(np.median(np.sqrt((late**2).mean(-1))))
    first = head.first_weights(weights, config, ids, scale)
    train(first, weights, config, rows, states, args)


def train(first: head.Head, weights, config: DecoderConfig, rows: Rows, states: np.ndarray, args) -> None:
    """Train for the minutes that are given, at a rate that falls to zero with the time, and write the head."""
    fixed = {"lm_head": first.lm_head, "d2t": first.d2t}
    trained, weights = dataclasses.replace(first, lm_head=None, d2t=None), dataclasses.replace(weights, layers=[])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95))

    def loss(trained, weights, fixed, rows, states, passes):
        whole = dataclasses.replace(trained, **fixed)
        return head.loss(whole, weights, config, rows, states[:, :, :-1], states[:, :, -1], passes)

    @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=7)
    def step(trained, moments, rate, weights, fixed, rows, states, passes):
        (value, chains), gradient = jax.value_and_grad(loss, has_aux=True)(
            trained, weights, fixed, rows, states, passes
        )
        change, moments = optimizer.update(gradient, moments)
        trained = jax.tree.map(lambda x, by: x - rate * by, trained, change)
        return trained, moments, value, chains

    is_checked = np.arange(len(rows.tokens)) % CHECKED == 0
    of_training, checked = np.flatnonzero(~is_checked), np.flatnonzero(is_checked)
    moments, random, evaluate = optimizer.init(trained), np.random.default_rng(0), jax.jit(loss, static_argnums=5)
    begin, done, number, losses = time.monotonic(), 0.0, 0, []
    args.log.write_text("")
    while done < 1:
        batch = random.choice(of_training, BATCH, replace=False)
        rate = args.rate * min(1.0, (number + 1) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * done))
        passes = 1 if done < ALONE else PASSES
        inputs = rate, weights, fixed, rows[batch], np.asarray(states[batch]), passes
        trained, moments, value, _ = step(trained, moments, *inputs)
        losses.append(float(value))
        number += 1
        done = (time.monotonic() - begin) / (60 * args.minutes)
        if number % REPORT and done < 1:
            continue
        found = np.zeros(PASSES + 1)
        for i in checked:
            inputs = rows[i : i + 1], np.asarray(states[i : i + 1]), PASSES
            found += np.asarray(evaluate(trained, weights, fixed, *inputs)[1])
        line = {
            "step": number,
            "minutes": round(done * args.minutes, 1),
            "epochs": round(number * BATCH / len(of_training), 2),
        }
        line |= {"passes": passes, "loss": round(float(np.mean(losses)), 3)}
        line |= {"right": (found[:-1] / found[-1]).round(3).tolist()}
        line |= {"accept_length": round(float(1 + found[:-1].sum() / found[-1]), 3)}
        losses = []
        print(line, flush=True)
        with args.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        head.save(dataclasses.replace(trained, **fixed), args.out, config)


if __name__ == "__main__":
    main()
