"""The interface between APIs and backends: token limits, and joining deltas."""

from __future__ import annotations

import pytest

from moesaic.backend import Delta, Finished, TokenInfo, TokenLimits, ToolCall, join
from moesaic.errors import InvalidRequest


@pytest.mark.parametrize(
    ("limits", "prompt", "asked", "context", "expected"),
    [
        (TokenLimits(), 3, 5, None, 5),
        (TokenLimits(), 3, None, None, None),
        (TokenLimits(), 3, None, 10, 7),
        (TokenLimits(total=8), 3, None, 10, 5),
        (TokenLimits(total=80), 3, None, 10, 7),
        (TokenLimits(total=8), 3, 5, 10, 5),
        (TokenLimits(prompt=3), 3, None, 10, 7),
        (TokenLimits(), 9, None, 10, 1),
    ],
)
def test_token_limits_give_the_room_for_an_answer(limits, prompt, asked, context, expected):
    assert limits.max_tokens(prompt, asked, context) == expected


@pytest.mark.parametrize(
    ("limits", "prompt", "asked", "context", "message"),
    [
        (TokenLimits(total=8), 3, 6, 10, "`max_new_tokens` must be <= 8. Given: 3 `inputs` tokens and 6"),
        (TokenLimits(), 3, 8, 10, "must be <= 10"),
        (TokenLimits(prompt=2), 3, None, 10, "less than 2 tokens. Given: 3"),
        (TokenLimits(), 10, None, 10, "less than 9 tokens. Given: 10"),
    ],
)
def test_token_limits_refuse_what_does_not_fit(limits, prompt, asked, context, message):
    with pytest.raises(InvalidRequest) as refused:
        limits.max_tokens(prompt, asked, context)
    assert message in str(refused.value)


def test_only_neighbouring_deltas_of_one_answer_are_joined():
    one, two = TokenInfo(1, "a"), TokenInfo(2, "b")
    call = Delta(0, calls=(ToolCall(0, "id", "name"),))
    end = Finished(0, "stop", 1, 2)
    assert join([Delta(0, "a", (one,)), Delta(0, "b", (two,)), end]) == [Delta(0, "ab", (one, two)), end]
    assert join([Delta(0, "a"), Delta(1, "b")]) == [Delta(0, "a"), Delta(1, "b")]
    assert join([Delta(0, "a"), call, Delta(0, "b")]) == [Delta(0, "a"), call, Delta(0, "b")]
