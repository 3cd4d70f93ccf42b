"""Totals of a scheduler since its start."""

import dataclasses

import numpy as np


@dataclasses.dataclass(slots=True)
class Counters:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    draft_steps: int = 0  # one for each row and step that verified drafts
    drafted_tokens: int = 0  # verified drafts
    accepted_drafts: int = 0
    accepted_per_position: list[int] = dataclasses.field(default_factory=list)  # the W - 1 places of drafts in a row

    def count_drafts(self, drafts: np.ndarray) -> None:
        """Add the drafts of StepResult.drafts. The accepted ones of a row are its first."""
        _, drafted, accepted = drafts.T
        self.draft_steps += len(drafts)
        self.drafted_tokens += int(drafted.sum())
        self.accepted_drafts += int(accepted.sum())
        reached = accepted[:, None] > np.arange(len(self.accepted_per_position))
        self.accepted_per_position = (reached.sum(0) + self.accepted_per_position).tolist()
