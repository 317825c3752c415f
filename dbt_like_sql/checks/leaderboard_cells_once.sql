-- of: leaderboard
-- Every mean is over each seed once: a comparison that is published twice would weigh twice.
select l.task, l.generation, l.strategy, l.budget, l.seeds, count(*) as cells
from leaderboard as l
join cells as c
    on c.task = l.task and c.generation = l.generation
    and c.strategy = l.strategy and c.budget = l.budget
group by l.task, l.generation, l.strategy, l.budget, l.seeds
having count(*) <> l.seeds
