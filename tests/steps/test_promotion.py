from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsel_assets.resources.store import StoreError
from dsel_assets.steps.cells import cells
from dsel_assets.steps.champion import champion, crown, history, rollback
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.verdict import compare, promote, promote_by_hand, verdict_identity

ROW = {
    "split": "validation",
    "budget": 10,
    "diff": 0.02,
    "diff_low": 0.01,
    "diff_high": 0.03,
    "p": 0.01,
    "p_holm": 0.02,
    "metric": "accuracy",
    "confidence": 0.95,
    "corrected": True,
    "task": "tiny",
    "generation": 1,
}


def decided(ws: Any, *rows: dict[str, Any]) -> Any:
    """A verdict with these rows, the rest as in ROW."""
    content = [ROW | row for row in rows]
    with ws.store.write("tiny", "verdict", {"made by": "the test", "rows": content}) as draft:
        pq.write_table(pa.Table.from_pylist(content), draft.path / "comparisons.parquet")
    return draft.done


SAME = "no difference shown"


def test_nothing_better_promotes_nothing(done: Any) -> None:
    ws = done.workspace()
    before = champion(ws)
    rows = [{"strategy": "itl", "verdict": SAME}, {"strategy": "skmm", "verdict": "worse"}]
    assert promote(ws, current_generation(ws), decided(ws, *rows)) == before
    assert champion(ws) == before


def test_the_best_of_the_better_becomes_champion_once(done: Any) -> None:
    ws = done.workspace()
    generation, before = current_generation(ws), len(history(ws))
    verdict = decided(
        ws,
        {"strategy": "itl", "verdict": "better", "diff": 0.01},
        {"strategy": "skmm", "verdict": "better", "diff": 0.05},
        {"strategy": "bads", "verdict": SAME, "diff": 0.5},
    )
    chosen = promote(ws, generation, verdict)
    assert chosen is not None and chosen["strategy"] == "skmm"
    cell = next(c for c in cells(ws, generation, "skmm") if c.budget == 10 and c.seed == 0)
    assert chosen["selection"] == cell.identities["subsets"]
    assert chosen["checkpoint"] == cell.identities["checkpoints"]
    assert chosen["verdict"] == verdict.identity
    for _ in range(2):
        assert promote(ws, generation, verdict) == chosen == champion(ws)
    assert len(history(ws)) == before + 1 and history(ws)[-1] == chosen


def test_a_champion_stays_until_something_is_better(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    first = promote(ws, generation, decided(ws, {"strategy": "skmm", "verdict": "better"}))
    assert promote(ws, generation, decided(ws, {"strategy": "itl", "verdict": SAME})) == first
    second = promote(ws, generation, decided(ws, {"strategy": "itl", "verdict": "better"}))
    assert second is not None and second["strategy"] == "itl"
    assert [line["strategy"] for line in history(ws)][-2:] == ["skmm", "itl"]


@pytest.mark.parametrize(
    "row",
    [
        {"split": "test"},
        {"budget": 5},
        {"strategy": "full"},
        {"strategy": "target_only"},
    ],
)
def test_what_may_not_promote(done: Any, row: dict[str, Any]) -> None:
    ws = done.workspace()
    before = champion(ws)
    row = {"strategy": "itl", "verdict": "better"} | row
    assert promote(ws, current_generation(ws), decided(ws, row)) == before


def test_the_verdict_depends_on_every_cell_and_the_rule(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    found = compare(ws, generation)
    assert found.reused and found.identity == verdict_identity(ws, generation)
    for changes in ({"promote": {"confidence": 0.9}}, {"promote": {"budget": 5}}, {"seeds": 3}):
        other = done.workspace(**changes)
        assert verdict_identity(other, generation) != found.identity
    assert compare(done.workspace(promote={"budget": 5}), generation).manifest["rows"] == 2 * 2 * 6


def test_a_strategy_is_compared_on_the_same_examples(done: Any) -> None:
    ws = done.workspace()
    rows = pq.read_table(compare(ws, current_generation(ws)).file("comparisons.parquet"))
    rows = rows.to_pylist()
    assert {row["strategy"] for row in rows} == {
        "full", "target_only", "skmm", "bads", "itl", "gradmatch",
    }  # fmt: skip
    assert {(row["split"], row["budget"]) for row in rows} == {
        (split, budget) for split in ("validation", "test") for budget in (5, 10)
    }
    for row in rows:
        assert row["diff_low"] <= row["diff"] <= row["diff_high"]
        assert row["corrected"] == (row["budget"] == 10)
        assert row["p_holm"] >= row["p"]


def test_a_rollback_goes_back_and_holds_until_another_verdict(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    with pytest.raises(StoreError, match="no champion, so nothing can be rolled back"):
        rollback(ws, "me")
    one, two, three = (
        decided(ws, {"strategy": name, "verdict": "better", "diff": diff})
        for name, diff in (("itl", 0.01), ("skmm", 0.02), ("bads", 0.03))
    )
    first, second = promote(ws, generation, one), promote(ws, generation, two)
    assert first is not None and second is not None and second["by"] == "verdict"
    assert rollback(ws, "me") == first == champion(ws)
    assert promote(ws, generation, two) == first  # the same verdict does not bring it back
    assert history(ws)[-1]["by"] == "me" and history(ws)[-1]["selection"] == second["selection"]
    third = promote(ws, generation, three)
    assert third is not None and third["strategy"] == "bads"
    assert rollback(ws, "me") == first
    assert rollback(ws, "me") is None and champion(ws) is None


def test_a_move_that_a_kill_cut_short_is_none(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    first = promote(ws, generation, decided(ws, {"strategy": "itl", "verdict": "better"}))
    path = ws.store.folder("tiny", "champion") / "promotions.jsonl"
    path.write_text(path.read_text() + '{"move": "promo')
    assert champion(ws) == first
    second = promote(ws, generation, decided(ws, {"strategy": "skmm", "verdict": "better"}))
    assert second is not None and second["strategy"] == "skmm" and len(history(ws)) == 2


def test_what_several_verdicts_promote_is_rolled_back_at_once(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    a, b, again = (
        decided(ws, {"strategy": name, "verdict": "better", "diff": diff})
        for name, diff in (("itl", 0.01), ("skmm", 0.02), ("skmm", 0.03))
    )
    first = promote(ws, generation, a)
    promote(ws, generation, b)
    promote(ws, generation, again)
    assert rollback(ws, "me") == first
    # an earlier verdict that holds again promotes again
    promote(ws, generation, decided(ws, {"strategy": "bads", "verdict": "better"}))
    back = promote(ws, generation, a)
    assert back is not None and back["strategy"] == "itl"


def test_a_person_promotes_with_a_reason(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    with pytest.raises(StoreError, match=r"validation says: .* give a reason"):
        promote_by_hand(ws, "random", 5, 1, "me", "")
    chosen = promote_by_hand(ws, "random", 5, 1, "me", "the vendor asked")
    cell = next(c for c in cells(ws, generation, "random") if (c.budget, c.seed) == (5, 1))
    assert chosen == champion(ws) and chosen["selection"] == cell.identities["subsets"]
    assert (chosen["by"], chosen["why"], chosen["when"][:2]) == ("me", "the vendor asked", "20")
    itl = promote_by_hand(ws, "itl", 10, 0, "me", "better for us")
    assert itl["evidence"].keys() == {"verdict", "diff", "diff_low", "diff_high", "p_holm"}
    assert rollback(ws, "me") == chosen
    # unlike a verdict, a person may insist
    assert promote_by_hand(ws, "itl", 10, 0, "me", "still")["strategy"] == "itl"
    for wrong in (("nobody", 10, 0), ("itl", 11, 0), ("itl", 10, 9)):
        with pytest.raises(StoreError, match="tiny has no"):
            promote_by_hand(ws, *wrong, "me", "why")
    with pytest.raises(StoreError, match="not compared yet"):
        promote_by_hand(done.workspace(seeds=3), "itl", 10, 0, "me", "why")


def test_a_verdict_that_a_person_overruled_stays_overruled(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    found = compare(ws, generation)
    rows = [{"strategy": "itl", "verdict": "better"}]
    by_verdict = promote(ws, generation, decided(ws, *rows))
    assert by_verdict is not None and by_verdict["strategy"] == "itl"
    chosen = promote_by_hand(ws, "skmm", 10, 0, "me", "I know better")
    again = {**by_verdict, "verdict": chosen["verdict"]}
    assert chosen["verdict"] == found.identity
    assert crown(ws, again, "verdict") == chosen  # the same verdict, run once more
    other = promote(ws, generation, decided(ws, *rows))  # another verdict may promote
    assert other is not None and other["strategy"] == "itl"
