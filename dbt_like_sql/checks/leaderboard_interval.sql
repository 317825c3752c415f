-- of: leaderboard
-- The interval holds the difference; every strategy but random has both, and both verdicts.
select task, generation, strategy, budget, diff_low, diff, diff_high, verdict, validation_verdict
from leaderboard
where strategy <> 'random'
    and not coalesce(
        diff between diff_low - 1e-9 and diff_high + 1e-9
        and verdict is not null and validation_verdict is not null,
        false
    )
