-- of: leaderboard
-- Every strategy ran with as many seeds as the others at its budget.
select task, generation, budget, min(seeds) as fewest, max(seeds) as most
from leaderboard
group by task, generation, budget
having min(seeds) <> max(seeds)
