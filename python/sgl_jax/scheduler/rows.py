"""Table of the running requests: numpy columns indexed by row, so that a decode step costs no Python per request.

The host knows num_known tokens of a row, and each step in flight adds 1 to W. When all of them are done the row has between
num_sure and num_tokens tokens. Pages are allocated for the upper bound; the lower bound decides whether the request needs
another step. With W = 1 the two are equal.
"""

import numpy as np

from sgl_jax.request import PARAMETERS, Request
from sgl_jax.step_plan import Param, RowFlag

_STOP_IDS = 8  # stop ids that fit a row before the table is widened


class RowTable:
    def __init__(self, num_rows: int, context_length: int, pages_per_row: int):
        def column(dtype: type = np.int32) -> np.ndarray:
            return np.zeros(num_rows, dtype)

        self.requests: list[Request | None] = [None] * num_rows
        self.key = np.full(num_rows, -1, np.int64)
        self.rank = column()  # the data rank that holds the row's pages; any row may belong to any rank
        self.prompt_len = column()
        self.max_total = column()  # tokens with which the request ends by length
        self.num_known = column()  # tokens the host has
        self.num_sure = column()  # num_known, plus one for each step in flight that samples
        self.num_tokens = column()  # num_known, plus all that the steps in flight may sample
        self.num_computed = column()  # tokens whose KV is written, with all that the steps in flight may write
        self.num_pages = column()
        self.has_sampled = column(np.bool_)  # the row decodes: the device holds its last token
        self.tokens = np.zeros((num_rows, context_length), np.int32)  # [:, :num_known] are valid
        self.page_table = np.zeros((num_rows, pages_per_row), np.int32)  # [:, :num_pages] are valid
        self.stop_ids = np.full((num_rows, _STOP_IDS), -1, np.int32)
        self.params = np.zeros((num_rows, len(Param)), np.int32)
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def seat(self, request: Request, rank: int = 0) -> int:
        """Put the request on a free row and return the row. All its tokens are known, none is computed, and it has no pages."""
        row = request.row = self._free.pop()
        n = len(request.tokens)
        self.requests[row] = request
        self.key[row] = request.key
        self.rank[row] = rank
        self.prompt_len[row] = len(request.prompt)
        self.max_total[row] = request.max_total_tokens
        self.num_known[row] = self.num_sure[row] = self.num_tokens[row] = n
        self.num_computed[row] = self.num_pages[row] = 0
        self.has_sampled[row] = False
        self.tokens[row, :n] = request.tokens
        self._set_stop_ids(row, request.stop_token_ids)
        self.params[row] = encode_params(request)
        return row

    def unseat(self, row: int) -> Request:
        """Take the request off its row, its tokens with it."""
        request = self.requests[row]
        assert request is not None
        request.tokens = self.tokens[row, : self.num_known[row]].copy()
        request.row = -1
        self.requests[row] = None
        self.key[row] = -1
        self._free.append(row)
        return request

    def next_tokens(self, rows: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        """Return the next num_new[i] tokens of rows[i], i32[num_new.sum()] in row order; zeros for decoding rows."""
        tokens = np.zeros(int(num_new.sum()), np.int32)
        start, end = self.num_computed[rows], np.cumsum(num_new)
        for i in np.flatnonzero(~self.has_sampled[rows]):
            tokens[end[i] - num_new[i] : end[i]] = self.tokens[rows[i], start[i] : start[i] + num_new[i]]
        return tokens

    def chunks(self, rows: np.ndarray, budget: list[int]) -> np.ndarray:
        """Spend each rank's budget on its rows, in their order. Return the new tokens of each row, i32[len(rows)]."""
        chunks = np.zeros(len(rows), np.int32)
        for i, rank in enumerate(self.rank[rows]):
            chunks[i] = min(self.num_tokens[rows[i]] - self.num_computed[rows[i]], budget[rank])
            budget[rank] -= int(chunks[i])
        return chunks

    def check_invariants(self, rows: np.ndarray, width: int) -> None:
        """Raise AssertionError unless the counters of these rows are in order."""
        known, sure, tokens = self.num_known[rows], self.num_sure[rows], self.num_tokens[rows]
        computed = self.num_computed[rows]
        assert (computed <= tokens).all()
        assert (known <= sure).all()
        assert (sure <= tokens).all()
        assert (sure - known <= 2).all(), "a row has more than two steps in flight"
        assert (tokens - known <= 2 * width).all(), "more tokens in flight than two steps make"
        assert (tokens - computed == 1)[self.has_sampled[rows]].all()

    def _set_stop_ids(self, row: int, ids: np.ndarray) -> None:
        missing = len(ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(ids)] = ids


# Names of the parameters that are stored unchanged, in the order of their columns.
_BY_COLUMN = {each.about.column: each.name for each in PARAMETERS}
_INTS = tuple(_BY_COLUMN[column.name] for column in Param if Param.FLAGS < column < Param.TEMPERATURE)
_FLOATS = tuple(_BY_COLUMN[column.name] for column in Param if column >= Param.TEMPERATURE)


def encode_params(request: Request) -> np.ndarray:
    """Encode a request's sampling parameters for the step program, i32[len(Param)]."""
    p = request.params
    flags = RowFlag(0)
    if p.logprobs is not None:
        flags |= RowFlag.LOGPROBS
    if p.has_penalties:
        flags |= RowFlag.PENALTIES
    if p.has_bias:
        flags |= RowFlag.BIAS
    if request.wants_prompt_logprobs:
        flags |= RowFlag.PROMPT_LOGPROBS
    if p.disable_speculation:
        flags |= RowFlag.NO_DRAFTS
    if p.grammar is not None:
        flags |= RowFlag.GRAMMAR | RowFlag.NO_DRAFTS
    encoded = np.empty(len(Param), np.int32)
    encoded[Param.SEED] = np.uint32(request.seed).view(np.int32)
    encoded[Param.ADAPTER] = 0  # until it has a slot
    encoded[Param.FLAGS] = int(flags)
    encoded[Param.FLAGS + 1 : Param.TEMPERATURE] = [getattr(p, name) for name in _INTS]
    if p.top_k <= 0:
        encoded[Param.TOP_K] = 2**31 - 1
    encoded[Param.TEMPERATURE :] = np.array([getattr(p, name) for name in _FLOATS], np.float32).view(np.int32)
    return encoded
