"""Reads draft models: heads of EAGLE and EAGLE-3, MTP layers in the target's own checkpoint, and whole models."""

import dataclasses
from collections.abc import Mapping

from sgl_jax.models.checkpoint import Checkpoint
from sgl_jax.models.decoder_config import DecoderConfig, DraftConfig
from sgl_jax.models.draft_head import head_config, head_names, same_vocabulary
from sgl_jax.models.families import FAMILIES, Families, decoder_config, tensor_names
from sgl_jax.models.model_errors import ModelError, faults_named
from sgl_jax.models.names import TensorNames
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.stored_names import named_tensors
from sgl_jax.settings.speculation import Algorithm


def draft_config(
    checkpoint: Checkpoint | None,
    target: DecoderConfig,
    algorithm: Algorithm,
    families: Families = FAMILIES,
    stored: Mapping[str, StoredTensor] | None = None,
) -> DraftConfig:
    """Describe the draft model in `checkpoint`, or with NEXTN the target's own MTP layer. A head's copy of the embedding among
    the target's `stored` tensors is left out. Raises ModelError for one that is not served or does not fit the target."""
    if algorithm == "NEXTN":
        return _mtp_config(target)
    assert checkpoint is not None
    try:
        with faults_named("config.json", "it describes no draft model"):
            if algorithm == "STANDALONE":
                return _whole_config(checkpoint, target, families)
            names = tensor_names(target, families)
            embed = named_tensors(stored, target, names).get(names.embed) if stored else None
            return head_config(checkpoint, target, algorithm, embed)
    except ModelError as error:
        raise ModelError(f"Draft model {checkpoint.path}: {error}") from error


def draft_names(config: DecoderConfig, families: Families = FAMILIES) -> TensorNames:
    """Return the names of the draft model's tensors, in its own checkpoint or, of an MTP layer, in the target's."""
    draft = config.draft
    assert draft is not None
    if draft.kind == "standalone":
        return tensor_names(draft.decoder, families)
    return _mtp_names(config, tensor_names(config, families)) if draft.kind == "mtp" else head_names(draft)


def describe(draft: DraftConfig) -> str:
    """Say which draft model it is, and which states of the target its features are made of."""
    kinds = {"eagle": "EAGLE head", "eagle3": "EAGLE-3 head", "mtp": "MTP layer", "standalone": "draft model"}
    ids = draft.target_layers, [i - 1 for i in draft.target_layers]
    inputs, outputs = (", ".join(map(str, each)) for each in ids)
    states = f"inputs of layers {inputs} (outputs of {outputs})" if inputs else "output after its final norm"
    features = "" if draft.kind == "standalone" else f", from the target's {states}"
    own, n = draft.decoder, draft.decoder.num_layers
    layers = "1 layer" if n == 1 else f"{n} layers"
    return f"{kinds[draft.kind]} ({own.architecture}) with {layers} and {own.vocab_size} token ids{features}"


def _mtp_config(target: DecoderConfig) -> DraftConfig:
    """Describe the first MTP layer (https://arxiv.org/abs/2412.19437): one like the target's last, with the target's
    embedding and head, of which checkpoints hold copies."""
    if not target.num_mtp_layers:
        found = "config.json has no num_nextn_predict_layers"
        raise ModelError(f"--speculative-algorithm NEXTN drafts with the model's MTP layer; it has none ({found})")
    layer = dataclasses.replace(
        target,
        num_layers=1,
        moe_layers=target.moe_layers and target.moe_layers[-1:],
        sliding_windows=target.sliding_windows and target.sliding_windows[-1:],
        local_layers=target.local_layers[-1:],
        num_mtp_layers=0,
        draft=None,
    )
    return DraftConfig("mtp", layer, recycles_normed=True)


def _mtp_names(config: DecoderConfig, family: TensorNames) -> TensorNames:
    """Return the family's names for the layer after the last, and those of what joins token and feature before it."""
    number = str(config.num_layers)
    at = family.layer["attn_norm"][0].partition("{i}")[0] + number + "."

    def view(stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        own = {name: tensor for name, tensor in family.view(stored).items() if name.startswith(at)}
        return {name.replace(".final_layernorm.", ".shared_head.norm."): tensor for name, tensor in own.items()}

    return dataclasses.replace(
        family,
        final_norm=f"{at}shared_head.norm.weight",
        layer={path: tuple(n.replace("{i}", number) for n in names) for path, names in family.layer.items()},
        more={"fc": f"{at}eh_proj.weight", "embed_norm": f"{at}enorm.weight", "feature_norm": f"{at}hnorm.weight"},
        ignored=(*family.ignored, r"\.(embed_tokens|word_embeddings|shared_head\.head)\.weight$"),
        view=view,
    )


def _whole_config(checkpoint: Checkpoint, target: DecoderConfig, families: Families) -> DraftConfig:
    decoder = decoder_config(checkpoint.config, checkpoint.generation_config, checkpoint.tensors, families)
    same_vocabulary(decoder, target)
    return DraftConfig("standalone", decoder, own_embed=True, own_head=not decoder.tie_embeddings)
