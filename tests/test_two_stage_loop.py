"""experiments/_two_stage_loop.py: a closed loop over lanes of two stages, by laws that are known beforehand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

EXPERIMENTS = str(Path(__file__).parents[1] / "experiments")


@pytest.fixture
def loops(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import _two_stage_loop

    yield _two_stage_loop
    sys.modules.pop("_two_stage_loop")


PREFILL_S, STEP_S, HAND_OVER_S, FIRST_S = 0.2, 0.01, 0.03, 0.005


def steps_of(loops, slots: int = 64, most_together: int = 1, kv_tokens: float = 1e9):
    return loops.Steps(
        decode_s=[STEP_S] * (slots + 1),
        per_token_s=[0.0] * (slots + 1),
        prefill_s=[PREFILL_S] * most_together,
        hand_over_s=HAND_OVER_S,
        first_token_s=FIRST_S,
        most_together=most_together,
        slots=slots,
        kv_tokens=kv_tokens,
    )


def test_a_lone_request_takes_the_sum_of_its_stages(loops):
    loop = loops.Loop(1000, 50, 0.8, concurrency=1, n_prefill=1, n_decode=1, prefill_groups=1)
    ttft_s, tpot_s = loops.played(loop, steps_of(loops))
    assert ttft_s == pytest.approx(PREFILL_S + HAND_OVER_S + STEP_S + FIRST_S)
    assert tpot_s == pytest.approx(STEP_S)


def test_where_prefill_is_too_little_the_rest_waits_for_it(loops):
    """Of 64 in flight each waits until 63 others are prefilled, but for the time in which it decodes; twice the
    instances, or two prompts at a time, halve the round."""
    loop = loops.Loop(1000, 100, 1.0, concurrency=64, n_prefill=1, n_decode=2, prefill_groups=1)
    in_decode_s = 100 * STEP_S + HAND_OVER_S

    def round_s(loop, steps) -> float:
        ttft_s, tpot_s = loops.played(replace(loop, requests_per_sequence=40), steps)
        assert tpot_s == pytest.approx(STEP_S)
        return ttft_s - FIRST_S - HAND_OVER_S + in_decode_s

    assert round_s(loop, steps_of(loops)) == pytest.approx(64 * PREFILL_S, rel=0.03)
    assert round_s(replace(loop, n_prefill=2), steps_of(loops)) == pytest.approx(32 * PREFILL_S, rel=0.03)
    assert round_s(replace(loop, prefill_groups=2), steps_of(loops)) == pytest.approx(32 * PREFILL_S, rel=0.03)


def test_who_finds_no_slot_or_memory_waits(loops):
    """Everybody is prefilled at once, and one after the other decodes."""
    loop = loops.Loop(1000, 100, 1.0, 8, n_prefill=1, n_decode=1, prefill_groups=8, requests_per_sequence=40)
    alone = [steps_of(loops, slots=1), steps_of(loops, kv_tokens=1200)]
    for steps in alone:
        ttft_s, tpot_s = loops.played(loop, steps)
        assert tpot_s == pytest.approx(STEP_S)
        assert ttft_s == pytest.approx(7 * 100 * STEP_S, rel=0.03)
