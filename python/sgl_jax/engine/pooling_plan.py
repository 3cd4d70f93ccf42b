"""Decisions of a launch about vectors: whether it makes them, of which hidden states, and the head of their logits."""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from sgl_jax.engine.pooler import Head, Pooler
from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.models.architecture import CLASSIFIER
from sgl_jax.models.checkpoint import Checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import Families, tensor_names
from sgl_jax.models.model_errors import faults_named
from sgl_jax.models.sentence_transformers import SentencePooling, sentence_pooling
from sgl_jax.models.stored_names import named_tensors
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_HEAD = "score.weight"
_NO_YES = ["no", "yes"]
_RANDOM_SCALE = np.float32(0.02)  # deviation of random weights


def with_pooling(args: ServerArgs, model: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """Return the model with the states that vectors are made of, in a launch that makes any. Raises ValueError for a
    task that the checkpoint cannot do, for attention in both directions, and for drafts in such a launch."""
    if (info := pooling_of(args, model, checkpoint)) is None:
        return model
    if (flag := args.speculative_flag) is not None:
        reason = f"{args.model_path} makes vectors (--task {info.kind}) and generates no tokens"
        raise ValueError(f"{flag} cannot be had: {reason}; leave it out, or give --task generate")
    config = checkpoint.config
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        raise ValueError(f"{args.model_path} attends in both directions, as its config.json says; that is not built")
    return dataclasses.replace(model, pooling=info.method)


def pooling_of(args: ServerArgs, model: DecoderConfig, checkpoint: Checkpoint) -> PoolingInfo | None:
    """Return what vectors the launch makes, as its flags or else its checkpoint say; None: it generates."""
    classes = checkpoint.config.get("architectures") or []
    has_labels = any(name.endswith(CLASSIFIER) for name in classes)
    task, found = args.task, None
    if task in (None, "embed"):
        found = sentence_pooling(checkpoint.path, checkpoint.config)
        task = task or ("classify" if has_labels else "embed" if found or args.is_embedding else None)
    match task:
        case "embed":
            return _embeddings(model, found or SentencePooling())
        case "classify" | "score" if has_labels:
            return _labels(checkpoint)
        case "generate" if has_labels:
            raise ValueError(f"--task is generate; {args.model_path} is a *{CLASSIFIER}, whose head makes no tokens")
        case "classify":
            cure = "give --task embed for vectors, or score for the tokens no and yes"
            raise ValueError(f"--task is classify; {args.model_path} is no *{CLASSIFIER} and has no labels: {cure}")
        case "score":
            tokens = checkpoint.config.get("classifier_from_token") or _NO_YES
            if not isinstance(tokens, list) or len(tokens) != 2:
                raise ValueError(f"config.json has classifier_from_token {tokens!r}; it must be two tokens, no first")
            return PoolingInfo("score", 2, labels=[str(token) for token in tokens], activation="softmax")
        case _:
            return None


def _embeddings(model: DecoderConfig, found: SentencePooling) -> PoolingInfo:
    return PoolingInfo(
        "embed",
        model.hidden_size,
        found.method,
        normalize=found.normalize,
        prompts=dict(found.prompts),
    )


def _labels(checkpoint: Checkpoint) -> PoolingInfo:
    config = checkpoint.config
    with faults_named("config.json", "its id2label or num_labels names no labels"):
        named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
        labels = [str(named[number]) for number in sorted(named, key=int)]
    match config.get("problem_type"):
        case "regression":
            activation = "none"
        case "multi_label_classification":
            activation = "sigmoid"
        case _:
            activation = "sigmoid" if len(labels) == 1 else "softmax"
    return PoolingInfo("classify", len(labels), labels=labels, activation=activation)


def pooler_of(args: ServerArgs, model: DecoderConfig, checkpoint: Checkpoint, families: Families) -> Pooler | None:
    """Return the host's part of making vectors, with its head as float32; None in a launch that generates. Raises
    ValueError for a head that the checkpoint lacks or that has another shape."""
    info = pooling_of(args, model, checkpoint)
    if info is None:
        return None
    if info.kind == "embed":
        _warn_of_default_prompt(checkpoint.path)
        return Pooler(info)
    shape = info.size, model.hidden_size
    if checkpoint.format == "dummy":
        rows = np.random.default_rng(args.random_seed or 0).standard_normal(shape, np.float32) * _RANDOM_SCALE
        return Pooler(info, Head(rows))
    if info.kind == "score":
        rows = _rows_of_tokens(args, info, model, checkpoint, families)
        return Pooler(info, Head(rows, model.logit_scale, model.final_logit_softcap))
    stored = checkpoint.tensors.get(_HEAD)
    if stored is None or stored.shape != shape:
        found = f"has {_HEAD} of shape {list(stored.shape)}" if stored else f"has no {_HEAD}"
        raise ValueError(f"{checkpoint.path} {found}; its {info.size} labels need one of shape {list(shape)}")
    return Pooler(info, Head(stored.read().astype(np.float32)))


def _warn_of_default_prompt(folder: Path) -> None:
    if (found := sentence_pooling(folder)) is not None and found.default_prompt:
        text = "the checkpoint has default_prompt_name %s; its text is put before an input only with prompt_name"
        logger.warning(text, found.default_prompt)


def _rows_of_tokens(
    args: ServerArgs, info: PoolingInfo, model: DecoderConfig, checkpoint: Checkpoint, families: Families
) -> np.ndarray:
    """Read the rows of the output head, which may be tied, for the tokens that answer."""
    tokenizer = load_tokenizer(args.tokenizer_path or args.model_path, args.chat_template, args.downloads)
    names = tensor_names(model, families)
    tensors = named_tensors(checkpoint.tensors, model, names)
    head = tensors.get(names.embed if model.tie_embeddings else names.lm_head)
    if head is None:
        raise ValueError(f"--task is score; {checkpoint.path} has no output head, which scores are read from")
    rows = []
    for word in info.labels:
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"--task is score; {word!r} is {len(ids)} tokens in {args.model_path}, and must be one")
        rows.append(head.rows(ids[0], ids[0] + 1))
    return np.concatenate(rows).astype(np.float32)
