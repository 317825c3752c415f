-- of: leaderboard
-- Every strategy has random beside it, at every budget.
select l.task, l.generation, l.strategy, l.budget
from leaderboard as l
anti join leaderboard as r
    on r.task = l.task and r.generation = l.generation
    and r.budget = l.budget and r.strategy = 'random'
