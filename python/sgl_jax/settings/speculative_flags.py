"""Flags of speculative decoding."""

from dataclasses import dataclass

from sgl_jax.settings.flags import Rule, at_least, between, flag

SPECULATIVE = "Speculative decoding"
ALGORITHMS = ("NGRAM", "EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
MAX_DRAFTS = 31

_ALGORITHM = Rule(lambda value: value.upper() in ALGORITHMS, "NGRAM, EAGLE, EAGLE3, NEXTN or STANDALONE")
_CHAIN = Rule(lambda value: value == 1, "1: when requests share a step, a chain of drafts gains more than a tree")
_EXACT = Rule(lambda value: value == 1, "1: a draft is accepted only where it is the token that is sampled")
_NGRAM = between(1, 32)


@dataclass(frozen=True, kw_only=True)
class SpeculativeFlags:
    """Flags that settings/speculation.py reads together."""

    speculative_algorithm: str | None = flag(
        None,
        "where drafts come from: the request's own tokens (NGRAM), a head on the model's states (EAGLE, EAGLE3), the model's "
        "own MTP layers (NEXTN, also EAGLE without a draft model), or a smaller model with the same tokens (STANDALONE)",
        unset="nothing is drafted",
        metavar="NAME",
        rule=_ALGORITHM,
        group=SPECULATIVE,
    )
    speculative_draft_model_path: str | None = flag(
        None,
        "the draft model, a folder or a hub id",
        unset="NGRAM and NEXTN have none",
        metavar="PATH",
        aliases=("--speculative-draft-model",),
        per_host=True,  # the files are compared
    )
    speculative_num_steps: int | None = flag(
        None,
        "tokens drafted for a request in each step",
        unset="3, or 7 with NGRAM except on CPUs",
        rule=between(1, MAX_DRAFTS),
    )
    speculative_num_draft_tokens: int | None = flag(
        None,
        "tokens verified in each step, the drafts and one more",
        unset="one more than --speculative-num-steps",
        rule=between(2, MAX_DRAFTS + 1),
    )
    speculative_eagle_topk: int | None = flag(None, "drafts for each place; only 1", unset="1", rule=_CHAIN)
    speculative_accept_threshold_single: float = flag(1.0, "only 1: drafts do not change the output", rule=_EXACT)
    speculative_accept_threshold_acc: float = flag(1.0, "only 1: drafts do not change the output", rule=_EXACT)
    speculative_ngram_min_match_window_size: int | None = flag(
        None, "tokens of the shortest n-gram that NGRAM looks for", unset="1", rule=_NGRAM
    )
    speculative_ngram_max_match_window_size: int | None = flag(
        None,
        "tokens of the longest one; on CPUs a step drafts at most one more",
        unset="4, or the shortest if that is longer",
        rule=_NGRAM,
    )
    speculative_disable_by_batch_size: int | None = flag(
        None, "decoding requests above which nothing is drafted", unset="chosen for the device", rule=at_least(1)
    )
    speculative_simulated_acceptance: float | None = flag(
        None, "for measurements: share of drafts that count, right or wrong", unset="right ones do", rule=between(0, 1)
    )
    speculative_config: str | None = flag(
        None, "JSON as vLLM takes it, in place of all other flags of this group", unset="none", metavar="JSON"
    )

    @property
    def speculative_flag(self) -> str | None:
        """The flag that asks for drafts, where one does."""
        given = {"--speculative-config": self.speculative_config, "--speculative-algorithm": self.speculative_algorithm}
        return next((name for name, value in given.items() if value is not None), None)
